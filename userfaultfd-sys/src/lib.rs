//! Raw bindings to Linux [userfaultfd]: structures, constants and ioctl numbers, and nothing else. They are for programs
//! that make the system calls themselves, or only need the numbers: seccomp filters, tracers, `no_std` programs. All
//! others are better off with the crate `userfaultfd`, which is built on this one.
//!
//! Names, values and layouts are those of `linux/userfaultfd.h`, and of the ioctl `PAGEMAP_SCAN` in `linux/fs.h`. What
//! they mean is said in the manual pages [userfaultfd(2)][userfaultfd] and [ioctl_userfaultfd(2)][ioctls], and in the
//! kernel's [guide][guide].
//!
#![doc = concat!("# Older kernels, and bindings of Linux ", include_str!("bindings/VERSION"))]
//!
//! The committed bindings have everything that the headers of that release have, and they are right for every kernel
//! since 4.3, because this interface grows without changing what is there:
//!
//! - No structure that an ioctl takes has ever changed its size, which is part of the ioctl's number. What is new comes
//!   as a new ioctl, a new flag or a new feature bit.
//! - A kernel refuses what it doesn't know: a system call flag, an ioctl, a mode or a feature of a newer kernel is
//!   `EINVAL`. (Kernels from 6.1 to 6.1.25 ignored unknown features, so compare what the handshake returns, too.)
//! - The handshake, [`UFFDIO_API`] with `features` zero, answers with the features and ioctls that the running kernel
//!   has. It succeeds once for each descriptor, so ask on one that is closed afterwards.
//!
//! So ask the kernel, and never compare versions. Three things need care:
//!
//! - [`UFFD_API_FEATURES`], [`UFFD_API_IOCTLS`], [`UFFD_API_RANGE_IOCTLS`] and [`UFFD_API_REGISTER_MODES`] say what
//!   *these bindings* know, and grow with them. A program that requests all of them fails on an older kernel.
//! - The event and the flag bits that a newer kernel reports may be ones that these bindings don't name.
//! - [`pm_scan_arg`] has its size as its first field, but kernels so far accept exactly one size.
//!
//! # One page fault, by hand
//!
//! ```
//! use std::io::{Error, Result};
//! use std::mem::size_of;
//! use std::{ptr, slice, thread};
//!
//! use userfaultfd_sys::*;
//!
//! fn check(result: i64) -> Result<i64> {
//!     if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
//! }
//!
//! fn main() -> Result<()> {
//!     // Without `UFFD_USER_MODE_ONLY` (since Linux 5.11) it takes a privilege.
//!     let flags = libc::O_CLOEXEC | UFFD_USER_MODE_ONLY as i32;
//!     let uffd = check(unsafe { libc::syscall(SYS_userfaultfd, flags) }.into())? as i32;
//!
//!     // Nothing else works before the handshake.
//!     let mut api = uffdio_api { api: UFFD_API, ..Default::default() };
//!     check(unsafe { libc::ioctl(uffd, UFFDIO_API as _, &mut api) }.into())?;
//!
//!     // A page of memory, whose missing content we want to supply.
//!     let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
//!     let (prot, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
//!     let page = unsafe { libc::mmap(ptr::null_mut(), size, prot, private, -1, 0) };
//!     assert_ne!(page, libc::MAP_FAILED);
//!     let mut register = uffdio_register {
//!         range: uffdio_range { start: page as u64, len: size as u64 },
//!         mode: UFFDIO_REGISTER_MODE_MISSING,
//!         ioctls: 0,
//!     };
//!     check(unsafe { libc::ioctl(uffd, UFFDIO_REGISTER as _, &mut register) }.into())?;
//!     assert_ne!(register.ioctls & 1 << _UFFDIO_COPY, 0);
//!
//!     // A thread reads from it, and sleeps in the fault.
//!     let address = page as usize;
//!     let reader = thread::spawn(move || unsafe { *(address as *const u8) });
//!
//!     // The fault arrives as a message. Its fields are copied out: they may be unaligned.
//!     let mut msg = uffd_msg::default();
//!     let read = unsafe { libc::read(uffd, (&raw mut msg).cast(), size_of::<uffd_msg>()) };
//!     assert_eq!(check(read as i64)?, size_of::<uffd_msg>() as i64);
//!     assert_eq!(msg.event, UFFD_EVENT_PAGEFAULT);
//!     let fault = unsafe { msg.arg.pagefault };
//!     assert_eq!(fault.address, page as u64);
//!
//!     // The answer: a page full of sevens, put there and the thread woken in one step.
//!     let sevens = vec![7_u8; size];
//!     let mut copy =
//!         uffdio_copy { dst: fault.address, src: sevens.as_ptr() as u64, len: size as u64, ..Default::default() };
//!     check(unsafe { libc::ioctl(uffd, UFFDIO_COPY as _, &mut copy) }.into())?;
//!     assert_eq!(copy.copy, size as i64);
//!
//!     assert_eq!(reader.join().unwrap(), 7);
//!     assert_eq!(unsafe { slice::from_raw_parts(page as *const u8, size) }, sevens);
//!     Ok(())
//! }
//! ```
//!
//! `UFFDIO_API as _`: the type of an ioctl number is `c_ulong` in glibc's interface and `c_int` in those of musl and
//! Android. Both take the same 32 bits.
//!
//! # Targets
//!
//! Every Linux and Android target of Rust, of either byte order and any width. Structures are the same on all of them,
//! but numbers are not: mips, powerpc and sparc encode ioctls in another way, and each architecture numbers system calls
//! on its own. The build script selects the right ones; it needs no C compiler, no libclang and no kernel headers.
//!
//! # Bindings of other headers
//!
//! The feature `bindgen` makes the bindings anew on every build, by libclang, from the headers in the directory that
//! the environment variable `LINUX_HEADERS` names by an absolute path: either what
//! `make headers_install INSTALL_HDR_PATH=…` has filled, or a kernel source tree. Without the variable the system's
//! headers are taken. This is for kernels with patches to userfaultfd, and for architectures that have no committed
//! bindings (where `SYS_userfaultfd` isn't defined).
//!
//! Headers without all names that this crate promises, so those before Linux 7.3, are refused with a list of what they
//! lack. The committed bindings have these names and are right for older kernels too.
//!
//! [userfaultfd]: https://man7.org/linux/man-pages/man2/userfaultfd.2.html
//! [ioctls]: https://man7.org/linux/man-pages/man2/ioctl_userfaultfd.2.html
//! [guide]: https://docs.kernel.org/admin-guide/mm/userfaultfd.html

#![no_std]

mod bindings;
#[cfg(not(no_bindings))]
mod layout;
mod types;

pub use bindings::*;
pub use types::*;
