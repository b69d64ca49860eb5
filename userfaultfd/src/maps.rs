//! What `/proc` tells of a process: its mappings, and the size of their pages.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;

use crate::error::errno_of;
use crate::pagemap::Pagemap;
use crate::{Error, Pid, Result};

/// Whose memory it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Process {
    Own,
    Other(Pid),
}

impl fmt::Display for Process {
    /// Its name in `/proc`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Process::Own => f.write_str("self"),
            Process::Other(pid) => pid.fmt(f),
        }
    }
}

/// A mapping, as far as it lies in the range that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) range: Range<usize>,
    /// It is private anonymous memory.
    pub(crate) anonymous: bool,
    /// Bytes of a page; 0 if that wasn't asked for.
    pub(crate) page: usize,
    /// Whether it is registered with some userfaultfd. `None` if that wasn't asked for, or isn't told.
    pub(crate) registered: Option<bool>,
}

impl Process {
    pub(crate) fn pagemap(self) -> Result<Pagemap> {
        match self {
            Process::Own => Pagemap::of_self(),
            Process::Other(pid) => Pagemap::of(pid),
        }
    }

    /// The mappings in a range, in the order of their addresses.
    pub(crate) fn mappings(self, range: &Range<usize>) -> Result<Vec<Mapping>> {
        self.read("maps", range)
    }

    /// The same, with the size of their pages, and whether they are registered. Walks the page tables of everything before, so it takes a while.
    pub(crate) fn mappings_with_pages(self, range: &Range<usize>) -> Result<Vec<Mapping>> {
        self.read("smaps", range)
    }

    fn read(self, file: &str, range: &Range<usize>) -> Result<Vec<Mapping>> {
        let path = format!("/proc/{self}/{file}");
        let read = || parse(BufReader::new(File::open(path)?).split(b'\n'), range);
        read().map_err(|error: std::io::Error| Error::SystemError(errno_of(&error)))
    }
}

/// Reads lines such as `7f83e60b2000-7f83e60b3000 rw-p 00000000 00:00 0 [heap]`, and in smaps, below each,
/// `KernelPageSize:        4 kB` and `VmFlags: rd wr mr mw me um`.
///
/// Lines are bytes: the name of a mapped file need not be UTF-8. The kernel escapes a newline in it.
fn parse(
    lines: impl Iterator<Item = std::io::Result<Vec<u8>>>,
    range: &Range<usize>,
) -> std::io::Result<Vec<Mapping>> {
    let mut found: Vec<Mapping> = Vec::new();
    let mut inside = false;
    for line in lines {
        let line = line?;
        if let Some((bounds, rest)) = header(&line) {
            if bounds.start >= range.end {
                break;
            }
            inside = bounds.end > range.start;
            if inside {
                // What is shared or of a file has an inode.
                let anonymous = words(rest).nth(3) == Some(b"0");
                let range = bounds.start.max(range.start)..bounds.end.min(range.end);
                found.push(Mapping { range, anonymous, page: 0, registered: None });
            }
        } else if let (true, Some(flags)) = (inside, line.strip_prefix(b"VmFlags:")) {
            // Missing, write-protect, minor, read-write-protect.
            let registered = |flag: &[u8]| matches!(flag, b"um" | b"uw" | b"ui" | b"ur");
            if let Some(mapping) = found.last_mut() {
                mapping.registered = Some(words(flags).any(registered));
            }
        } else if let (true, Some(size)) = (inside, line.strip_prefix(b"KernelPageSize:")) {
            let kib = words(size).next().and_then(|kib| number(kib, 10));
            if let (Some(mapping), Some(kib)) = (found.last_mut(), kib) {
                mapping.page = 1024 * kib;
            }
        }
    }
    Ok(found)
}

/// The bounds in the first line of a mapping, and the rest of the line.
fn header(line: &[u8]) -> Option<(Range<usize>, &[u8])> {
    let (bounds, rest) = split_once(line, b' ')?;
    let (start, end) = split_once(bounds, b'-')?;
    Some((number(start, 16)?..number(end, 16)?, rest))
}

fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty())
}

fn split_once(line: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let index = line.iter().position(|byte| *byte == at)?;
    Some((&line[..index], &line[index + 1..]))
}

fn number(digits: &[u8], radix: u32) -> Option<usize> {
    usize::from_str_radix(std::str::from_utf8(digits).ok()?, radix).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &[u8] = b"\
1000-3000 rw-p 00000000 00:00 0 \nSize:                  8 kB\nKernelPageSize:        4 kB\nVmFlags: rd wr \n\
3000-5000 rw-s 00000000 00:01 1024                       /dev/zero (deleted)\nKernelPageSize:       64 kB\nVmFlags: rd wr sh um \n\
8000-9000 r-xp 00000000 08:01 77                         /bin/a\xff b\nKernelPageSize:        4 kB\n\
a000-b000 rw-p 00000000 00:00 0                          [heap]\nKernelPageSize:        4 kB\n";

    #[test]
    fn mappings_are_cut_to_the_range() {
        crate::support::require!();
        let read = |range: Range<usize>| parse(BufRead::split(SMAPS, b'\n'), &range).unwrap();
        let mapping = |range, anonymous, kib: usize, registered| Mapping {
            range,
            anonymous,
            page: 1024 * kib,
            registered,
        };
        assert_eq!(
            read(0x2000..0xc000),
            [
                mapping(0x2000..0x3000, true, 4, Some(false)),
                mapping(0x3000..0x5000, false, 64, Some(true)),
                mapping(0x8000..0x9000, false, 4, None),
                mapping(0xa000..0xb000, true, 4, None),
            ]
        );
        assert_eq!(read(0x3000..0x4000), [mapping(0x3000..0x4000, false, 64, Some(true))]);
        assert_eq!(read(0x5000..0x8000), []);
        assert_eq!(read(0..usize::MAX).len(), 4);
    }

    #[test]
    fn this_process_has_a_mapping_of_this_variable() {
        crate::support::require!();
        let variable = [1u8; 64];
        let range = variable.as_ptr_range();
        let range = range.start.addr()..range.end.addr();
        let found = Process::Own.mappings_with_pages(&range).unwrap();
        let page = crate::page_size();
        assert_eq!(found, [Mapping { range, anonymous: true, page, registered: Some(false) }]);
    }
}
