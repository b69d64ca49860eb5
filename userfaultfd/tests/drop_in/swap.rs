//! A monitor that swaps its guest out: a wrapper around the type, with an error of its own, over the processes that
//! share the guest's memory, of which one may be gone.

use std::ops::Range;
use std::os::unix::io::{AsRawFd, FromRawFd, IntoRawFd, RawFd};

use userfaultfd::Error as UffdError;
use userfaultfd::Event as UffdEvent;
use userfaultfd::{FeatureFlags, IoctlFlags, Uffd, UffdBuilder};

use crate::mapping::{Mapping, page_size};
use crate::support::child;
use crate::support::dead;
use crate::support::memory::Memory;
use crate::support::{require, test_name};

type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("userfaultfd: {0:?}")]
    Userfaultfd(UffdError),
    #[error("copied {0} bytes")]
    PartiallyCopied(usize),
    #[error("the page is there")]
    PageExist,
    #[error("the process is gone")]
    UffdClosed,
}

impl From<UffdError> for Error {
    fn from(error: UffdError) -> Self {
        match error {
            UffdError::PartiallyCopied(copied) => Self::PartiallyCopied(copied),
            UffdError::ZeropageFailed(errno) if errno as i32 == libc::EEXIST => Self::PageExist,
            UffdError::CopyFailed(errno) if errno as i32 == libc::ESRCH => Self::UffdClosed,
            other => Self::Userfaultfd(other),
        }
    }
}

#[derive(Debug)]
struct Userfaultfd {
    uffd: Uffd,
}

impl Userfaultfd {
    fn new() -> Result<Self> {
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(true)
            .require_features(FeatureFlags::MISSING_SHMEM | FeatureFlags::EVENT_REMOVE)
            .create()?;
        Ok(Self { uffd })
    }

    /// The kernel says ENOMEM of a process that is gone.
    unsafe fn register(&self, range: &Range<usize>) -> Result<IoctlFlags> {
        match self.uffd.register(range.start as *mut libc::c_void, range.len()) {
            Ok(flags) => Ok(flags),
            Err(UffdError::SystemError(errno)) if errno as i32 == libc::ENOMEM => Err(Error::UffdClosed),
            Err(error) => Err(error.into()),
        }
    }

    fn unregister(&self, range: &Range<usize>) -> Result<()> {
        match self.uffd.unregister(range.start as *mut libc::c_void, range.len()) {
            Ok(()) => Ok(()),
            Err(UffdError::SystemError(errno)) if errno as i32 == libc::ENOMEM => Err(Error::UffdClosed),
            Err(error) => Err(error.into()),
        }
    }

    fn zero(&self, start: usize, len: usize, wake: bool) -> Result<usize> {
        // SAFETY: the guest's memory is its own.
        Ok(unsafe { self.uffd.zeropage(start as *mut libc::c_void, len, wake) }?)
    }

    fn copy(&self, start: usize, len: usize, data: *const u8, wake: bool) -> Result<usize> {
        // SAFETY: the guest's memory is its own.
        Ok(unsafe { self.uffd.copy(data.cast::<libc::c_void>(), start as *mut libc::c_void, len, wake) }?)
    }

    fn read_event(&self) -> Result<Option<UffdEvent>> {
        Ok(self.uffd.read_event()?)
    }
}

impl From<Uffd> for Userfaultfd {
    fn from(uffd: Uffd) -> Self {
        Self { uffd }
    }
}

impl AsRawFd for Userfaultfd {
    fn as_raw_fd(&self) -> RawFd {
        self.uffd.as_raw_fd()
    }
}

/// Whether an answer is of a process that is gone.
fn is_dead(uffd: &Userfaultfd, page: usize) -> bool {
    match uffd.zero(page, page_size(), false) {
        Err(Error::Userfaultfd(UffdError::ZeropageFailed(errno))) => errno as i32 == libc::ESRCH,
        _ => false,
    }
}

#[test]
fn processes_that_are_gone_are_passed_over() {
    require!(FeatureFlags::MISSING_SHMEM | FeatureFlags::EVENT_REMOVE);
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(4);
        let regions = [memory.range(0, 2), memory.range(2, 2)];
        let uffds = [Userfaultfd::new().unwrap(), Userfaultfd::from(dead::uffd(&memory))];
        for region in &regions {
            for uffd in &uffds {
                // SAFETY: the range is the guest's.
                match unsafe { uffd.register(region) } {
                    Ok(_) => assert_eq!(uffd.as_raw_fd(), uffds[0].as_raw_fd()),
                    Err(Error::UffdClosed) => assert_eq!(uffd.as_raw_fd(), uffds[1].as_raw_fd()),
                    Err(error) => panic!("{error}"),
                }
            }
        }
        let content = vec![7u8; page_size()];
        let gone = uffds[1].copy(regions[0].start, page_size(), content.as_ptr(), true);
        assert!(matches!(gone, Err(Error::UffdClosed)), "{gone:?}");
        assert!(is_dead(&uffds[1], regions[0].start) && !is_dead(&uffds[0], regions[0].start));
        for region in &regions {
            assert!(uffds[0].unregister(region).is_ok());
            assert!(matches!(uffds[1].unregister(region), Err(Error::UffdClosed)));
        }
    });
}

#[test]
fn pages_are_swapped_in_once() {
    require!(FeatureFlags::MISSING_SHMEM | FeatureFlags::EVENT_REMOVE);
    let memory = Mapping::anonymous(4);
    let range = memory.ptr as usize..memory.ptr as usize + memory.len;
    let uffd = Userfaultfd::new().unwrap();
    // SAFETY: the range is the guest's.
    unsafe { uffd.register(&range) }.unwrap();
    let content = vec![7u8; memory.len];
    assert_eq!(
        uffd.copy(memory.page(1) as usize, page_size(), content.as_ptr(), false).unwrap(),
        page_size()
    );
    let again = uffd.zero(memory.page(1) as usize, page_size(), false);
    assert!(matches!(again, Err(Error::PageExist)), "{again:?}");
    let partly = uffd.copy(range.start, memory.len, content.as_ptr(), true);
    assert!(matches!(partly, Err(Error::PartiallyCopied(copied)) if copied == page_size()), "{partly:?}");
    assert!(uffd.read_event().unwrap().is_none());

    // Another number of the same userfaultfd, which owns itself.
    // SAFETY: touches no memory.
    let number = unsafe { libc::fcntl(uffd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3) };
    // SAFETY: the number was just made, and nothing else owns it.
    let twin = Userfaultfd::from(unsafe { Uffd::from_raw_fd(number) });
    drop(uffd);
    assert_eq!(twin.zero(memory.page(2) as usize, 2 * page_size(), true).unwrap(), 2 * page_size());
    twin.unregister(&range).unwrap();
    let number = twin.uffd.into_raw_fd();
    // SAFETY: the number was just given away.
    drop(unsafe { Uffd::from_raw_fd(number) });
}
