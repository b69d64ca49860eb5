//! Where a file has data, and where holes.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsFd;

use super::invalid;
use crate::Errno;
use crate::sys;

/// The ranges of data of a file within a range of it, in order, by `SEEK_DATA` and `SEEK_HOLE`. Moves the file's offset.
pub(super) struct DataRanges<'a> {
    file: &'a File,
    at: u64,
    end: u64,
}

impl<'a> DataRanges<'a> {
    pub(super) fn new(file: &'a File, range: Range<u64>) -> Self {
        Self { file, at: range.start, end: range.end }
    }

    fn find(&mut self) -> Result<Option<Range<u64>>, Errno> {
        while self.at < self.end {
            let start = match sys::seek_data(self.file.as_fd(), self.at) {
                Ok(start) if start < self.end => start,
                // None follows.
                Ok(_) | Err(Errno::ENXIO) => break,
                Err(error) => return Err(error),
            };
            let end = match sys::seek_hole(self.file.as_fd(), start) {
                Ok(end) => end.min(self.end),
                // It became shorter meanwhile.
                Err(Errno::ENXIO) => break,
                Err(error) => return Err(error),
            };
            self.at = end;
            if start < end {
                return Ok(Some(start..end));
            }
        }
        self.at = self.end;
        Ok(None)
    }
}

impl Iterator for DataRanges<'_> {
    type Item = Result<Range<u64>, Errno>;

    fn next(&mut self) -> Option<Self::Item> {
        let found = self.find();
        if found.is_err() {
            self.at = self.end;
        }
        found.transpose()
    }
}

/// All ranges of data of a file where holes mean something: an error if the file system can't be believed.
pub(super) fn meaningful(file: &File) -> io::Result<Vec<Range<u64>>> {
    let stamp = sys::file_stamp(file.as_fd())?;
    let page = crate::page_size() as u64;
    if stamp.block_len > page {
        let text = "the file system keeps blocks of {} bytes, more than a page: its holes don't tell which pages were \
                    written; give the extents";
        return Err(invalid(text.replace("{}", &stamp.block_len.to_string())));
    }
    let mut seeking = file;
    let before = seeking.stream_position()?;
    let (mut ranges, mut data_len) = (Vec::new(), 0);
    for range in DataRanges::new(file, 0..stamp.len) {
        let range = range?;
        data_len += range.end - range.start;
        ranges.try_reserve(1).map_err(|_| io::ErrorKind::OutOfMemory)?;
        ranges.push(range);
    }
    seeking.seek(SeekFrom::Start(before))?;
    // As Linux answers for a file system that doesn't know: all is data.
    if data_len > stamp.allocated.saturating_add(page) {
        let allocated = stamp.allocated;
        let text = format!(
            "{data_len} bytes are data and {allocated} are allocated: the file system doesn't tell holes; give the extents"
        );
        return Err(invalid(text));
    }
    Ok(ranges)
}
