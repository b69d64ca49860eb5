//! Where a file is read from.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::source::{PageData, PageSource};

/// Bytes that one read of the end brings, where a read is a request: the footer, and the index of an image of some GiB.
const TAIL_BYTES: u64 = 512 << 10;

/// Bytes of an index that are read at once where that isn't all of it.
const WINDOW_BYTES: u64 = 8 << 20;

/// The bytes of a snapshot file.
#[derive(Clone)]
pub(crate) enum Input {
    File(Arc<File>),
    Source(Arc<dyn PageSource>),
}

impl Input {
    pub(crate) fn len(&self) -> io::Result<u64> {
        match self {
            Self::File(file) => Ok(file.metadata()?.len()),
            Self::Source(source) => source.len().ok_or_else(|| {
                io::Error::new(ErrorKind::InvalidInput, "a snapshot in a source that has no end")
            }),
        }
    }

    /// Reads all of `bytes`. `early`: no thread waits for them.
    pub(crate) fn read_exact_at(&self, bytes: &mut [u8], at: u64, early: bool) -> io::Result<()> {
        let source = match self {
            Self::File(file) => return file.read_exact_at(bytes, at),
            Self::Source(source) => source,
        };
        let end = at.checked_add(bytes.len() as u64);
        if source.len().is_some_and(|len| end.is_none_or(|end| end > len)) {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let found = if early { source.read_early(at, bytes) } else { source.read(at, bytes) };
        if found? == PageData::Zero {
            bytes.fill(0);
        }
        Ok(())
    }
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => file.fmt(f),
            Self::Source(source) => f.debug_tuple("Source").field(&source.len()).finish(),
        }
    }
}

/// Reads small pieces in order. Of a source, where each read may be a request, it reads the end at once and what lies
/// before that in few parts.
pub(crate) struct Window<'a> {
    input: &'a Input,
    pub(crate) len: u64,
    at: u64,
    bytes: Vec<u8>,
}

impl<'a> Window<'a> {
    pub(crate) fn new(input: &'a Input) -> io::Result<Self> {
        let len = input.len()?;
        let mut window = Self { input, len, at: 0, bytes: Vec::new() };
        if matches!(input, Input::Source(_)) {
            window.move_to(len.saturating_sub(TAIL_BYTES), TAIL_BYTES)?;
        }
        Ok(window)
    }

    fn move_to(&mut self, at: u64, most: u64) -> io::Result<()> {
        let len = self.len.saturating_sub(at).min(most) as usize;
        self.bytes.clear();
        self.bytes.try_reserve_exact(len).map_err(|_| ErrorKind::OutOfMemory)?;
        self.bytes.resize(len, 0);
        self.at = at;
        self.input.read_exact_at(&mut self.bytes, at, false)
    }

    fn get(&self, at: u64, len: usize) -> Option<&[u8]> {
        let from = usize::try_from(at.checked_sub(self.at)?).ok()?;
        self.bytes.get(from..from.checked_add(len)?)
    }

    pub(crate) fn read_exact_at(&mut self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        if matches!(self.input, Input::File(_)) {
            return self.input.read_exact_at(bytes, at, false);
        }
        if self.get(at, bytes.len()).is_none() {
            self.move_to(at, WINDOW_BYTES.max(bytes.len() as u64))?;
        }
        let found = self.get(at, bytes.len()).ok_or(ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(found);
        Ok(())
    }
}
