//! Handle page faults in user space with Linux `userfaultfd`: the whole kernel interface, and a fault engine, trackers
//! and snapshots above it.
//!
//! A program registers a range of memory with a [`Uffd`]. When a thread touches a missing (or protected) page of it, the
//! kernel suspends the thread and reports the fault to the program's handler. The handler fills the page (or lifts the
//! protection), and the thread goes on. VM monitors restore snapshots and migrate guests with it; other programs read
//! data that is larger than memory, track writes, and save their memory while they run.
//!
//! Map one page, register it, and resolve its fault by a copy:
//!
//! ```
//! use std::{error::Error, thread};
//!
//! use userfaultfd::{Event, UffdBuilder, page_size};
//!
//! fn main() -> Result<(), Box<dyn Error>> {
//!     // Map one page and register it, so that its first access is reported to us.
//!     let mut memory = memmap2::MmapMut::map_anon(page_size())?;
//!     let uffd = UffdBuilder::new().create()?;
//!     uffd.register(memory.as_mut_ptr().cast(), memory.len())?;
//!
//!     let handler = thread::spawn(move || {
//!         let Some(Event::Pagefault { addr, rw, .. }) = uffd.read_event()? else { unreachable!() };
//!         println!("{rw:?} fault at {addr:p}");
//!         let content = vec![42u8; page_size()];
//!         // SAFETY: `content` is a readable page, and any bytes are valid in `memory`.
//!         unsafe { uffd.copy(content.as_ptr().cast(), addr, page_size(), true) }
//!     });
//!
//!     let byte = memory[0]; // sleeps here until the copy is done
//!     let copied = handler.join().unwrap()?;
//!     println!("copied {copied} bytes, the first is {byte}");
//!     assert_eq!(byte, 42);
//!     Ok(())
//! }
//! ```
//!
//! - [Which tool for which job](#which-tool-for-which-job)
//! - [Which mode for what](#which-mode-for-what)
//! - [Kernels and features](#kernels-and-features)
//! - [Cargo features](#cargo-features)
//! - [Rights](#rights)
//! - [A fault handler that is right](#a-fault-handler-that-is-right)
//! - [Events](#events)
//! - [Deadlocks to avoid](#deadlocks-to-avoid)
//! - [Closing the descriptor](#closing-the-descriptor)
//! - [What is `unsafe`, and why](#what-is-unsafe-and-why)
//! - [What it doesn't do](#what-it-doesnt-do)
//! - [Guides](guide): when not to use it, a cookbook, moving from 0.9
//!
//! # Which tool for which job
//!
//! | to do this | use |
//! | --- | --- |
//! | memory whose pages are read or computed on first access; data larger than memory | [`LazyMemory`] |
//! | a file or another store as memory, written back, within a limit | [`PagedMemory`] |
//! | memory of other processes whose pages are read on first access: restored snapshots, migration, sandboxes | [`pager::Pager`] |
//! | the same where a VM monitor or CRIU hands the memory over on a socket | `handoff` (cargo feature), the program [`uffd`](guide::program) |
//! | content that is loaded once for the memory of many processes | [`pager::SharedImage`] |
//! | know which pages a program has written since the last look | [`DirtyTracker`] |
//! | bring memory back to an image, again and again: sandboxes, fuzzers | [`Pristine`] |
//! | know which pages are in use | [`AccessTracker`] |
//! | save memory as it is at one moment, while threads go on writing; save the changes since | [`Snapshot`], [`snapshot`] |
//! | do any of this with guest memory of the crate `vm-memory` | `guest` (cargo feature `vm-memory`) |
//! | read events in an async program | `AsyncUffd` (cargo features `tokio`, `async-io`) |
//! | anything else, exactly as the kernel does it | [`Uffd`], [`pagemap`] |
//!
//! # Which mode for what
//!
//! | to do this | register for | resolve by |
//! | --- | --- | --- |
//! | supply content on first access: snapshots, migration, far memory | [`MISSING`] | [`copy`](Uffd::copy), [`zeropage`](Uffd::zeropage), [`move_pages`](Uffd::move_pages) |
//! | the same without a copy, where the handler maps the same memfd or hugetlb file | [`MINOR`] | [`continue`](Uffd::continue) |
//! | act before a write: live [snapshots](snapshot), dirty tracking with an action | [`WRITE_PROTECT`] | [`remove_write_protection`](Uffd::remove_write_protection) |
//! | know what was written, cheaply | [`WRITE_PROTECT`] and [`WP_ASYNC`] | nothing: [`DirtyTracker`] reports it |
//! | act before any access, or know what is in use | [`READ_WRITE_PROTECT`] and [`RWP`] | [`remove_read_write_protection`](Uffd::remove_read_write_protection) |
//! | content that is lost for good | any | [`poison`](Uffd::poison) |
//! | faults resolved in the faulting thread itself | [`SIGBUS`] | a signal handler that fills the page: [`LazyMemory::sigbus`] |
//!
//! What works on which memory:
//!
//! | | private anonymous | memfd, tmpfs, shared anonymous | hugetlb | other files |
//! | --- | --- | --- | --- | --- |
//! | [`MISSING`] | yes | yes | yes | no |
//! | [`WRITE_PROTECT`] | yes | yes (5.19) | yes (5.19) | with [`WP_ASYNC`], alone |
//! | [`MINOR`] | no | yes (5.14) | yes (5.13) | no |
//! | [`READ_WRITE_PROTECT`] | yes | yes | yes | no |
//! | [`copy`](Uffd::copy), [`poison`](Uffd::poison) | yes | yes | yes | no |
//! | [`zeropage`](Uffd::zeropage) | yes | yes | no | no |
//! | [`continue`](Uffd::continue) | no | yes | yes | no |
//! | [`move_pages`](Uffd::move_pages) | yes, within one process | no | no | no |
//!
//! What resolves which fault, and since which release of Linux:
//!
//! | fault | register for | resolve with | on memory | since Linux |
//! | --- | --- | --- | --- | --- |
//! | page missing | `MISSING` | `copy` | private anonymous | 4.3 |
//! | | | | shared¹, hugetlb | 4.11 |
//! | | | `zeropage` | private anonymous | 4.3 |
//! | | | | shared¹ | 4.11 |
//! | | | `move_pages` | private anonymous, within one process | 6.8 |
//! | | | `poison` | private anonymous, shared¹, hugetlb | 6.6 |
//! | page cached and not mapped | `MINOR` | `continue` | hugetlb | 5.13 |
//! | | | | shared¹ | 5.14 |
//! | write to a protected page | `WRITE_PROTECT` | `remove_write_protection` | private anonymous | 5.7 |
//! | | | | shared¹, hugetlb | 5.19 |
//! | the same, only noted | `WRITE_PROTECT`, feature `WP_ASYNC` | nothing; `DirtyTracker` reports it | these and regular files | 6.7 |
//! | access to a protected page | `READ_WRITE_PROTECT`, feature `RWP` | `remove_read_write_protection` | private anonymous, shared¹, hugetlb | 7.3 |
//! | the same, only noted | `READ_WRITE_PROTECT`, `RWP`, `RWP_ASYNC` | nothing; `AccessTracker` reports it | the same | 7.3 |
//!
//! ¹ memfd, tmpfs, shared anonymous; private mappings of a memfd, too. Not segments of System V.
//!
//! Write protection exists on x86-64, arm64 and some riscv64, minor faults also on loongarch64 and all
//! riscv64. Ask the kernel with `Support::probe()` and `require_features`, and don't compare versions.
//!
//! Addresses and lengths are bytes, multiples of the [page size](page_size()); on hugetlb memory multiples of
//! the huge page size.
//!
//! # Kernels and features
//!
//! The crate always has every operation up to Linux 7.3; the running kernel, from 5.10 on, decides at run time. **Ask the
//! kernel, don't compare versions**: distributions backport features, and an architecture or a CPU may lack one.
//!
//! - [`Support::probe`] returns what the kernel offers, with a throw-away descriptor.
//! - [`UffdBuilder::require_features`] makes creation fail with the names of missing features;
//!   [`UffdBuilder::request_features`] enables those that exist, and [`Uffd::features`] returns the result.
//! - [`Uffd::register_with_mode`] returns the operations that a range accepts.
//!
//! "Not built in", "not permitted" ([`OpenFailure::reason`]) and "not in this kernel"
//! ([`Error::UnsupportedFeatures`]) are three different answers. Flags, events and faults of newer kernels
//! come through as they are: [`FaultKind::Unknown`], [`Error::UnrecognizedEvent`], unknown bits.
//!
//! # Cargo features
//!
//! | feature | default | brings | crates |
//! | --- | --- | --- | --- |
//! | `pager` | yes | [`LazyMemory`], [`PagedMemory`], [`pager`], [`source`] | allocator-api2, crc32fast, memmap2 |
//! | `tracking` | yes | [`DirtyTracker`], [`AccessTracker`], [`dirty`] | memmap2 |
//! | `snapshot` | yes | [`Snapshot`], [`snapshot`], [`source`] | blake3, crc32fast, memmap2 |
//! | `tracing` | no | spans and events of the pager; enables `pager` | tracing |
//! | `metrics` | no | `pager::MetricsPublisher`: statistics for the facade `metrics`; enables `pager` | metrics |
//! | `handoff` | no | `handoff`: memory that VM monitors and CRIU hand over; enables `serde` | serde, serde_json |
//! | `http` | no | `source::HttpSource`; enables `pager` | ureq |
//! | `lz4` | no | snapshot files that LZ4 compresses; enables `snapshot` | lz4_flex |
//! | `zstd` | no | `source::SeekableZstd`; with `snapshot` files that zstd compresses; enables `pager`, compiles C | twox-hash, zstd-safe |
//! | `tokio` | no | `AsyncUffd`, events awaited; with `pager`: `source::TokioSource` | tokio |
//! | `async-io` | no | `AsyncUffd`, on any executor | async-io |
//! | `object-store` | no | `source::ObjectSource`, `source::ObjectWriter`; enables `pager` and `tokio` | object_store |
//! | `vm-memory` | no | `guest`: memory of the crate `vm-memory` served, tracked, saved, its addresses translated; enables `pager` | vm-memory |
//! | `serde` | no | missing ranges can be serialised; enables `pager` | serde |
//! | `cli` | no | the program [`uffd`](guide::program); enables `tracking`, `snapshot`, `handoff`, `http`, `lz4`, `zstd` | clap, indicatif, signal-hook |
//! | `bindgen` | no | raw bindings generated at build time, see `userfaultfd-sys` | bindgen |
//!
//! Without features the crate is the kernel's interface, and depends on `bitflags`, `libc`, `nix`, `thiserror` and
//! `userfaultfd-sys` only. Methods that join two parts need both: [`LazyMemory::tracker`] and [`LazyMemory::snapshot`].
//! `linux4_14`, `linux5_7` and `linux5_13`, from userfaultfd 0.9, do nothing.
//!
//! # Rights
//!
//! Every process may handle faults from user mode, and that is the default ([`UffdBuilder::user_mode_only`] is `true`).
//! Then a system call on a missing page fails with `EFAULT`, as if the page weren't mapped: read(2) into it, write(2)
//! from it, a futex on it, a KVM guest that runs on it. To handle these faults, too, set `user_mode_only(false)`; it
//! needs one of: access to `/dev/userfaultfd` (by its file permissions; Linux 6.1), the capability `CAP_SYS_PTRACE`, or
//! the sysctl `vm.unprivileged_userfaultfd=1`. The error lists each try with its errno, and the remedies. Containers
//! often filter the system call itself.
//!
//! # A fault handler that is right
//!
//! ```no_run
//! # use std::ffi::c_void;
//! # use userfaultfd::{Error, Errno, Event, EventBuffer, Result, Uffd};
//! # fn page_for(_: *mut c_void) -> &'static [u8] { &[] }
//! # fn retry_later(_: *mut c_void) {}
//! fn serve(uffd: &Uffd, page: usize) -> Result<()> {
//!     let mut buffer = EventBuffer::new(64);
//!     loop {
//!         uffd.read_batch(&mut buffer)?;
//!         for event in buffer.changes_first().drain() {
//!             let Event::Pagefault { addr, .. } = event? else { continue };
//!             let dst = addr.map_addr(|addr| addr & !(page - 1));
//!             let src = page_for(dst);
//!             // SAFETY: `src` is a page of what belongs at `dst`, which no thread has seen as something else.
//!             match unsafe { uffd.copy(src.as_ptr().cast(), dst, page, true) } {
//!                 Ok(_) => {}
//!                 // Filled by another thread: the waiters of this fault may still sleep.
//!                 Err(Error::CopyFailed(Errno::EEXIST)) => uffd.wake(dst, page)?,
//!                 // Unmapped meanwhile: no thread waits any more.
//!                 Err(Error::CopyFailed(Errno::ENOENT)) => {}
//!                 // The layout is changing: read the next events first, then try again. Dropping it hangs a thread.
//!                 Err(error) if error.is_retryable() => retry_later(dst),
//!                 Err(error) => return Err(error),
//!             }
//!         }
//!     }
//! }
//! ```
//!
//! - **Resolve every fault that you read**: fill, wake, or poison. A message is delivered once, to one reader.
//! - **The same address comes more than once**: for each thread that waits, after each wake without a fill, after each
//!   signal that a waiting thread takes. Remember which pages are filled, or rely on `EEXIST`.
//! - **`EEXIST` doesn't always mean done.** A marker causes it, too (a write-protected or poisoned empty page for
//!   [`zeropage`](Uffd::zeropage)), and, since a kernel between 6.12 and 6.18, an empty pool for a copy into hugetlb
//!   memory. If a fault comes back after a wake, escalate: waking it again would go on for ever.
//! - **A fill stays inside one mapping.** mprotect(2), a partial unmapping or registration splits one in two;
//!   a copy across the border is `ENOENT` and copies nothing. Go page by page then.
//! - **`EAGAIN` after some bytes hides the reason.** [`Error::progress`] returns the bytes done; the call for the rest
//!   returns the reason.
//! - **A fault from kernel mode with a signal pending spins** at full load until it is resolved. Keep
//!   periodic signals away from slow handlers.
//!
//! # Events
//!
//! With [`EVENT_FORK`], [`EVENT_REMAP`], [`EVENT_REMOVE`] and [`EVENT_UNMAP`] the descriptor also reports changes of the
//! address space. The thread that makes the change sleeps until the event is *read*; from before the change until that
//! thread runs again, every fill fails with `EAGAIN`.
//!
//! - **Faults are delivered before events**, whatever happened first; within each, in order. So a fault may
//!   be for a page whose removal comes later in the same batch: [`EventBuffer::changes_first`].
//! - REMOVE comes before the pages go, UNMAP after, REMAP after. After a REMOVE the range is still registered, and zeros
//!   belong there. After an UNMAP it is gone. A moving mremap(2) sends UNMAP for the range that it overwrites, REMAP, and
//!   UNMAP for the old range.
//! - **Without the event the change happens silently**: moved memory is not registered at its new place, and
//!   a forked child reads zeros where pages are missing.
//! - No event reports holes that are punched with fallocate(2), changes through other mappings, execve(2) and exit(2).
//!   After the last two, operations fail with `ESRCH` and no event comes any more; use a pidfd to notice the end.
//!
//! # Deadlocks to avoid
//!
//! - The thread that reads events unmaps, removes, moves or forks itself, on memory that is registered with
//!   events.
//! - The handler touches missing memory: its own stack, the heap, the source of a copy. Register nothing that
//!   the handler uses, and read the source into memory of its own first.
//! - The handler takes a lock that a faulting thread holds: the allocator's, stdout's, a lazily initialised
//!   static's.
//! - A thread forks before the handler of fork events runs: starting a thread takes locks that fork(2) holds until the
//!   event is read. Wait until the handler thread has started.
//! - A handler of fork events allocates, while the forking thread holds the allocator's locks. Reading and
//!   decoding here allocates nothing.
//! - One thread retries on `EAGAIN` without reading the event that must be read first.
//! - `std::process::Command` with `pre_exec` really forks: with EVENT_FORK another thread must read the event.
//! - The handler locks or populates registered ranges: mlockall(2), `MADV_POPULATE_READ`.
//!
//! # Closing the descriptor
//!
//! When the last descriptor of a userfaultfd is closed, also by the death of the handler's process, the kernel unregisters
//! everything and every waiting thread goes on. **Missing pages then read as zeros**, with no error anywhere. A handler
//! that must not lose data first fills the missing pages, [poisons](Uffd::poison) them, or hands a
//! [duplicate](Uffd::try_clone) over.
//!
//! # What is `unsafe`, and why
//!
//! [`copy`](Uffd::copy), [`zeropage`](Uffd::zeropage), [`move_pages`](Uffd::move_pages) and [`poison`](Uffd::poison) decide
//! what memory holds, behind the compiler's back. A page behind a reference is missing only until its first access. What
//! is filled in must be valid for the reference's type, and a page that was seen must not change: only the caller can
//! know that. Moving takes pages away from under references, and an access through a reference to poison ends the
//! process.
//!
//! Everything else is safe. [`register`](Uffd::register), [`unregister`](Uffd::unregister), [`wake`](Uffd::wake) and the
//! protections decide when a thread waits, not what it reads. A thread that waits for ever hangs, which isn't unsound.
//! After an `unregister` missing pages are zeros, as they would be without this crate. [`continue`](Uffd::continue) maps
//! pages of a shared file's page cache, which other mappings may write at any time: a program that maps a file shared
//! accepts that. Events own the descriptors that they carry, after a check that these come from the kernel.
//!
//! **One thing the compiler can't check.** Memory with a [budget](LazyBuilder::budget), and [`PagedMemory`], drop a page
//! that nothing has changed, and read it again. A source that delivers other bytes then, such as a file that another process
//! writes meanwhile, changes what a `&[u8]` shows: a `&str` made of it may not be UTF-8 any more. It is the
//! promise that a mapped file asks for, too. No function is `unsafe` for it, since nearly every source keeps it. Where one
//! may not, use [`read_at`](LazyMemory::read_at), which copies.
//!
//! # What it doesn't do
//!
//! [`Uffd`] doesn't start threads, keep a table of what is registered, or retry for you: the operations are the
//! kernel's, one to one. Raw structures and numbers, for seccomp filters and tracers, are in the crate
//! `userfaultfd-sys`.
//!
//! Sources: [userfaultfd(2)](https://man7.org/linux/man-pages/man2/userfaultfd.2.html),
//! [ioctl_userfaultfd(2)](https://man7.org/linux/man-pages/man2/ioctl_userfaultfd.2.html), the kernel's
//! [admin-guide/mm/userfaultfd](https://docs.kernel.org/admin-guide/mm/userfaultfd.html). Where they and the
//! kernel differ, this documentation follows the kernel.
//!
//! [`MISSING`]: RegisterMode::MISSING
//! [`MINOR`]: RegisterMode::MINOR
//! [`WRITE_PROTECT`]: RegisterMode::WRITE_PROTECT
//! [`READ_WRITE_PROTECT`]: RegisterMode::READ_WRITE_PROTECT
//! [`WP_ASYNC`]: FeatureFlags::WP_ASYNC
//! [`RWP`]: FeatureFlags::RWP
//! [`SIGBUS`]: FeatureFlags::SIGBUS
//! [`EVENT_FORK`]: FeatureFlags::EVENT_FORK
//! [`EVENT_REMAP`]: FeatureFlags::EVENT_REMAP
//! [`EVENT_REMOVE`]: FeatureFlags::EVENT_REMOVE
//! [`EVENT_UNMAP`]: FeatureFlags::EVENT_UNMAP

#![cfg_attr(docsrs, feature(doc_cfg))]
#![deny(unsafe_code)]

// Tests of the inside share what the others have, which names the crate from outside.
#[cfg(test)]
extern crate self as userfaultfd;

#[cfg(any(feature = "tokio", feature = "async-io"))]
mod async_uffd;
mod builder;
#[cfg(any(feature = "tracking", feature = "snapshot"))]
mod create_in;
#[cfg(feature = "tracking")]
pub mod dirty;
mod error;
mod event;
mod features;
mod fill;
#[cfg(feature = "vm-memory")]
pub mod guest;
#[cfg(all(feature = "pager", feature = "tracking", feature = "snapshot"))]
pub mod guide;
#[cfg(feature = "handoff")]
pub mod handoff;
mod holder;
#[cfg(feature = "pager")]
mod lazy;
#[cfg(any(feature = "pager", feature = "tracking", feature = "snapshot"))]
mod lease;
mod lock_order;
#[cfg(feature = "pager")]
mod mapped_vec;
mod open;
#[cfg(feature = "pager")]
mod own_mapping;
mod owner;
pub mod pagemap;
#[cfg(feature = "pager")]
pub mod pager;
#[cfg(any(feature = "pager", feature = "snapshot"))]
mod pending_file;
mod proc_maps;
mod protect;
mod refusal;
#[cfg(feature = "snapshot")]
pub mod snapshot;
#[cfg(any(feature = "pager", feature = "snapshot"))]
pub mod source;
#[cfg(test)]
#[path = "../tests/support/mod.rs"]
#[expect(dead_code, unsafe_code, reason = "it has what the tests of the kernel need")]
mod support;
mod sync;
#[cfg(any(feature = "pager", feature = "tracking", feature = "snapshot"))]
mod sync_point;
mod sys;
mod uffd;
#[cfg(any(feature = "tracking", feature = "snapshot"))]
mod watch;

pub use nix::errno::Errno;
pub use nix::unistd::Pid;

#[cfg(any(feature = "tokio", feature = "async-io"))]
pub use crate::async_uffd::{AsyncUffd, NotRegistered};
pub use crate::builder::UffdBuilder;
#[cfg(any(feature = "tracking", feature = "snapshot"))]
pub use crate::create_in::CreateInRefusal;
#[cfg(feature = "tracking")]
pub use crate::dirty::{AccessTracker, DirtyTracker};
pub use crate::error::{Error, Result};
pub use crate::event::{Drain, Event, EventBuffer, FaultKind, ReadWrite};
pub use crate::features::{FeatureFlags, IoctlFlags, Known, RegisterMode, Support};
pub use crate::fill::{ContinueMode, CopyMode, MoveMode, ZeropageMode};
pub use crate::holder::Holder;
#[cfg(feature = "pager")]
pub use crate::lazy::{
    CloseError, LazyBuilder, LazyMemory, PagedBuilder, PagedMemory, PagedStatistics, Pinned, SigbusBuilder,
};
#[cfg(all(feature = "pager", feature = "tracking"))]
pub use crate::lazy::{Pristine, PristineBuilder, ResetMethod, ResetReport};
pub use crate::open::{OpenFailure, OpenRefusal, OpenWith};
#[cfg(feature = "pager")]
pub use crate::pager::{FlushError, FlushStep, WriteBack};
#[cfg(any(feature = "pager", feature = "snapshot"))]
pub use crate::pending_file::PendingFile;
pub use crate::refusal::{MemoryKind, Reason, Refusal};
#[cfg(feature = "snapshot")]
pub use crate::snapshot::Snapshot;
pub use crate::uffd::Uffd;

/// Returns the page size of the system, in bytes. Addresses and lengths are multiples of it, except on huge pages.
///
/// It isn't 4096 everywhere: arm64 kernels also have 16 KiB or 64 KiB, powerpc64 kernels mostly 64 KiB.
#[must_use]
pub fn page_size() -> usize {
    sys::page_size()
}
