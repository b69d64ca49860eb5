//! Errors taken apart, passed on and wrapped.

use std::error::Error as StdError;
use std::io;

use nix::errno::Errno;
use userfaultfd::{Error as UffdError, Uffd, UffdBuilder};

use crate::mapping::{Mapping, page_size};
use crate::support::require;

/// An error of a program that has others, too.
#[derive(Debug, thiserror::Error)]
enum PagerError {
    #[error("userfaultfd: {0}")]
    Uffd(#[from] UffdError),
    #[error("there is a page already")]
    Exists,
    #[error("the process is gone")]
    Gone,
}

/// Copies all of it, over as many calls as it takes.
fn copy_all(uffd: &Uffd, mut src: &[u8], mut dst: usize) -> Result<(), PagerError> {
    loop {
        // SAFETY: the source lives on, and nothing refers to the destination.
        match unsafe { uffd.copy(src.as_ptr().cast(), dst as *mut libc::c_void, src.len(), true) } {
            Ok(_) => return Ok(()),
            Err(UffdError::PartiallyCopied(copied)) => {
                src = &src[copied..];
                dst += copied;
            }
            Err(UffdError::CopyFailed(errno)) if errno as i32 == libc::EEXIST => {
                return Err(PagerError::Exists);
            }
            Err(UffdError::CopyFailed(Errno::ESRCH)) => return Err(PagerError::Gone),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether an error says that a page is there.
fn is_eexist(error: &userfaultfd::Error) -> bool {
    matches!(
        error,
        userfaultfd::Error::CopyFailed(errno) | userfaultfd::Error::ZeropageFailed(errno)
            if *errno as i32 == libc::EEXIST
    )
}

#[test]
fn copy_that_stops_at_a_page_goes_on_and_says_so() {
    require!();
    let memory = Mapping::anonymous(4);
    let uffd = UffdBuilder::new().close_on_exec(true).create().unwrap();
    uffd.register(memory.ptr, memory.len).unwrap();
    let content = vec![7u8; memory.len];
    copy_all(&uffd, &content[..page_size()], memory.page(2) as usize).unwrap();
    // Two pages are copied; the call for the rest tells why it stopped.
    let stopped = copy_all(&uffd, &content, memory.ptr as usize).unwrap_err();
    assert!(matches!(stopped, PagerError::Exists), "{stopped}");
    assert_eq!((memory.get(0), memory.get(1), memory.get(2)), (7, 7, 7));

    // SAFETY: nothing refers to the memory.
    let error = unsafe { uffd.zeropage(memory.ptr, page_size(), false) }.unwrap_err();
    assert!(is_eexist(&error), "{error}");
    // SAFETY: nothing refers to the memory.
    let error = unsafe { uffd.copy(content.as_ptr().cast(), memory.ptr, page_size(), true) }.unwrap_err();
    assert!(is_eexist(&error), "{error}");
}

#[test]
fn unregistered_range_is_enoent() {
    require!();
    let memory = Mapping::anonymous(1);
    let uffd = UffdBuilder::new().close_on_exec(true).create().unwrap();
    let content = vec![7u8; memory.len];
    let copied = copy_all(&uffd, &content, memory.ptr as usize);
    let Err(PagerError::Uffd(UffdError::CopyFailed(errno))) = copied else { panic!("{copied:?}") };
    assert_eq!(errno, Errno::ENOENT);
    // SAFETY: nothing refers to the memory.
    match unsafe { uffd.zeropage(memory.ptr, memory.len, true) } {
        Err(UffdError::ZeropageFailed(nix::Error::ENOENT)) => {}
        result => panic!("{result:?}"),
    }
    let unaligned = uffd.register(memory.ptr.wrapping_byte_add(1), memory.len);
    assert_eq!(unaligned.unwrap_err().errno(), Some(Errno::EINVAL));
}

#[test]
fn errors_pass_through_question_marks() {
    require!();
    fn fails() -> userfaultfd::Result<()> {
        Err(Errno::EBADF)?
    }
    fn boxed() -> Result<(), Box<dyn StdError + Send + Sync>> {
        Ok(fails()?)
    }
    fn io() -> io::Result<()> {
        fails().map_err(io::Error::other)
    }
    assert!(matches!(fails(), Err(userfaultfd::Error::SystemError(nix::Error::EBADF))));
    assert!(boxed().unwrap_err().downcast::<UffdError>().is_ok());
    assert!(io().unwrap_err().get_ref().unwrap().is::<UffdError>());
    assert!(PagerError::from(fails().unwrap_err()).to_string().starts_with("userfaultfd: "));

    let UffdError::SystemError(errno) = UffdError::from(Errno::ENOMEM) else { panic!("another variant") };
    assert_eq!(errno as i32, libc::ENOMEM);
    assert_eq!(io::Error::from(errno).raw_os_error().unwrap(), libc::ENOMEM);
    assert_eq!(errno, Errno::ENOMEM);
}
