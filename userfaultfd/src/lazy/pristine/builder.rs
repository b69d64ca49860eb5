//! [`PristineBuilder`].

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::hot::HotPages;
use super::{Pristine, ResetMethod};
use crate::dirty::{Mode, Options};
use crate::error::errno_of;
use crate::own_mapping::OwnMapping;
use crate::{DirtyTracker, Errno, Error, Result, page_size, sys};

/// Bytes that are compared with zeros, and written, at a time: a few pages.
const PART_BYTES: usize = 64 << 10;

/// Builder for a [`Pristine`], from [`Pristine::builder`].
#[derive(Clone, Copy)]
#[must_use]
pub struct PristineBuilder<'a> {
    image: &'a [u8],
    len: Option<usize>,
    method: Option<ResetMethod>,
}

impl<'a> PristineBuilder<'a> {
    pub(super) fn new(image: &'a [u8]) -> Self {
        Self { image, len: None, method: None }
    }

    /// Sets the length of the memory, in bytes. What is behind the end of the image is zeros; of an image that is longer
    /// only the beginning is used. The default is the length of the image.
    pub fn len(mut self, len: usize) -> Self {
        self.len = Some(len);
        self
    }

    /// Sets how [`reset`](Pristine::reset) works. The default is [`ResetMethod::CopyBack`] where the kernel has it, and
    /// [`ResetMethod::Drop`] elsewhere.
    pub fn method(mut self, method: ResetMethod) -> Self {
        self.method = Some(method);
        self
    }

    /// Copies the image into a sealed memfd, and maps that privately. Pages of zeros aren't copied.
    ///
    /// # Errors
    ///
    /// - [`SystemError`](Error::SystemError) with `EINVAL`: the length is 0, or more than the address space; `ENOMEM`,
    ///   `EMFILE`, `ENFILE`, `ENOSPC`.
    /// - For [`ResetMethod::CopyBack`], if it was required: those of [`DirtyTracker::with`].
    /// - Those of [`DirtyTracker::track`].
    pub fn build(self) -> Result<Pristine> {
        let len = self.len.unwrap_or(self.image.len());
        let whole = len.checked_next_multiple_of(page_size()).filter(|len| isize::try_from(*len).is_ok());
        let whole = whole.filter(|len| *len != 0).ok_or(Errno::EINVAL)?;
        let image = File::from(sys::sealable_memfd(c"userfaultfd-pristine")?);
        let write = || {
            image.set_len(whole as u64)?;
            let content = &self.image[..len.min(self.image.len())];
            for (part, bytes) in content.chunks(PART_BYTES).enumerate() {
                if bytes.iter().any(|byte| *byte != 0) {
                    image.write_all_at(bytes, (part * PART_BYTES) as u64)?;
                }
            }
            (&image).flush()
        };
        let system_error = |error: std::io::Error| Error::SystemError(errno_of(&error));
        write().map_err(system_error)?;
        sys::seal_content(image.as_fd())?;
        let inode = image.metadata().map_err(system_error)?.ino();
        let memory = OwnMapping::of_image(image.as_fd(), whole).map_err(system_error)?;
        memory.lock_on_fault().map_err(system_error)?;

        let tracker = match self.method {
            Some(ResetMethod::Drop) => None,
            method => match DirtyTracker::with(Options::new().mode(Mode::Async)) {
                Ok(tracker) => Some(tracker),
                Err(error) if method.is_some() || !is_refusal(&error) => return Err(error),
                Err(_) => None,
            },
        };
        let mut pristine = Pristine {
            hot: HotPages::new(tracker.as_ref().map_or(0, |_| whole / page_size())),
            tracker,
            memory,
            image,
            inode,
            len,
        };
        let range = pristine.range();
        if let Some(tracker) = &mut pristine.tracker {
            tracker.track(range)?;
        }
        Ok(pristine)
    }
}

impl std::fmt::Debug for PristineBuilder<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PristineBuilder")
            .field("image", &self.image.len())
            .field("len", &self.len)
            .field("method", &self.method)
            .finish()
    }
}

/// Whether this kernel, or what filters its system calls, has no asynchronous tracking for this process.
fn is_refusal(error: &Error) -> bool {
    matches!(
        error,
        Error::UnsupportedFeatures { .. }
            | Error::OpenFailed(_)
            | Error::SystemError(Errno::ENOENT | Errno::EACCES | Errno::EPERM | Errno::ENOSYS)
    )
}
