//! The backend of a device whose guest migrates: the descriptor goes to the other side as a file, and errors become
//! those of io.

use std::fs::File;
use std::io;
use std::os::unix::io::{FromRawFd, IntoRawFd};

use userfaultfd::{FeatureFlags, Uffd, UffdBuilder};

use crate::mapping::{Mapping, page_size};
use crate::support::require;

#[derive(Debug, thiserror::Error)]
enum BackendError {
    #[error("request failed: {0}")]
    Request(#[source] io::Error),
    #[error("register failed: {0}")]
    Register(#[from] userfaultfd::Error),
}

#[derive(Debug, Default)]
struct Backend {
    uffd: Option<Uffd>,
}

impl Backend {
    fn advise(&mut self) -> Result<File, BackendError> {
        let mut builder = UffdBuilder::new();
        let uffd = builder
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(true)
            .require_features(FeatureFlags::MISSING_SHMEM | FeatureFlags::MISSING_HUGETLBFS)
            .create()
            .map_err(|error| BackendError::Request(io::Error::other(error)))?;
        // The other side fills the pages; this one registers them.
        // SAFETY: the number is a duplicate that nothing else owns.
        let file = unsafe { File::from_raw_fd(uffd.into_raw_fd()) };
        let own = file.try_clone().map_err(BackendError::Request)?;
        // SAFETY: the number is given away by the file.
        self.uffd = Some(unsafe { Uffd::from_raw_fd(own.into_raw_fd()) });
        Ok(file)
    }

    fn listen(&self, regions: &[&Mapping]) -> Result<(), BackendError> {
        let Some(uffd) = &self.uffd else {
            return Err(BackendError::Request(io::Error::from_raw_os_error(libc::EINVAL)));
        };
        for region in regions {
            uffd.register(region.ptr.cast(), region.len)?;
        }
        Ok(())
    }
}

#[test]
fn backend_registers_and_the_other_side_fills() {
    require!(FeatureFlags::MISSING_SHMEM | FeatureFlags::MISSING_HUGETLBFS);
    let (low, high) = (Mapping::anonymous(2), Mapping::anonymous(1));
    let mut backend = Backend::default();
    let early = backend.listen(&[&low]).unwrap_err();
    assert_eq!(early.to_string(), "request failed: Invalid argument (os error 22)");
    let file = backend.advise().unwrap();
    backend.listen(&[&low, &high]).unwrap();
    // SAFETY: the number is given away by the file.
    let other = unsafe { Uffd::from_raw_fd(file.into_raw_fd()) };
    let content = vec![4u8; page_size()];
    for page in [low.page(0), low.page(1), high.page(0)] {
        // SAFETY: the content lives on, and nothing has read the memory.
        unsafe { other.copy(content.as_ptr().cast(), page, page_size(), true) }.unwrap();
    }
    assert_eq!((low.get(0), low.get(1), high.get(0)), (4, 4, 4));
}
