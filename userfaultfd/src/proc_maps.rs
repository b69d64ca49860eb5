//! What `/proc` tells of a process: its mappings, what they are of, and how they are registered.
//!
//! Reading allocates nothing unless it collects: a thread that asks why an operation was refused may handle the events of a fork,
//! and the forking thread holds the allocator's locks until its event is read.

#![cfg_attr(
    not(all(feature = "pager", feature = "tracking", feature = "snapshot")),
    allow(dead_code, reason = "each feature uses a part")
)]

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::{ControlFlow, Range};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;

use bitflags::bitflags;

use crate::error::errno_of;
use crate::pagemap::Pagemap;
use crate::refusal::MemoryKind;
use crate::{Error, Pid, RegisterMode, Result};

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

/// A mapping, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) range: Range<usize>,
    /// What its name and inode say, without the file system being asked.
    pub(crate) memory: MemoryKind,
    /// Neither shared nor of a file.
    pub(crate) anonymous: bool,
    /// Whether any access is allowed.
    pub(crate) accessible: bool,
    /// Where it begins in its file, in bytes.
    pub(crate) offset: usize,
    /// The number of its file; 0 if it has none.
    pub(crate) inode: u64,
    /// Bytes of a page; 0 if that wasn't asked for.
    pub(crate) page: usize,
    /// `None` if they weren't asked for, or aren't told.
    pub(crate) flags: Option<VmFlags>,
}

bitflags! {
    /// Of the line `VmFlags` those that registering depends on.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct VmFlags: u32 {
        const MAY_WRITE = 1;
        const MISSING = 1 << 1;
        const WRITE_PROTECT = 1 << 2;
        const MINOR = 1 << 3;
        const READ_WRITE_PROTECT = 1 << 4;
    }
}

impl VmFlags {
    /// What it is registered for.
    pub(crate) fn modes(self) -> RegisterMode {
        let all = [
            (Self::MISSING, RegisterMode::MISSING),
            (Self::WRITE_PROTECT, RegisterMode::WRITE_PROTECT),
            (Self::MINOR, RegisterMode::MINOR),
            (Self::READ_WRITE_PROTECT, RegisterMode::READ_WRITE_PROTECT),
        ];
        let set = all.into_iter().filter(|(flag, _)| self.contains(*flag));
        set.fold(RegisterMode::empty(), |modes, (_, mode)| modes | mode)
    }
}

/// Which file of `/proc/PID` is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Maps,
    /// Tells the size of pages and the flags, too. Walks the page tables of everything before the range, so it takes a
    /// while.
    Smaps,
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
        self.collect(Source::Maps, range)
    }

    /// The same, with the size of their pages, and whether they are registered: [`Source::Smaps`].
    pub(crate) fn mappings_with_pages(self, range: &Range<usize>) -> Result<Vec<Mapping>> {
        self.collect(Source::Smaps, range)
    }

    fn collect(self, source: Source, range: &Range<usize>) -> Result<Vec<Mapping>> {
        let mut found = Vec::new();
        let read = self.each_mapping(source, range, |entry| {
            found.push(entry.cut(range));
            ControlFlow::Continue(())
        });
        read.map_err(|error| match (self, errno_of(&error)) {
            (Process::Other(process), errno) => Error::NoAccess { process, errno },
            (Process::Own, errno) => Error::SystemError(errno),
        })?;
        Ok(found)
    }

    /// Passes on the mappings that have a part in a range, in the order of their addresses. Allocates nothing.
    pub(crate) fn each_mapping(
        self,
        source: Source,
        range: &Range<usize>,
        visit: impl FnMut(&Entry) -> ControlFlow<()>,
    ) -> io::Result<()> {
        let file = match source {
            Source::Maps => "maps",
            Source::Smaps => "smaps",
        };
        parse(&mut Lines::new(open(format_args!("/proc/{self}/{file}"))?), range, visit)
    }
}

/// How many mappings a process may have: `vm.max_map_count`. Allocates nothing.
pub(crate) fn max_mappings() -> Option<usize> {
    let mut lines = Lines::new(File::open("/proc/sys/vm/max_map_count").ok()?);
    number(lines.next().ok()??, 10)
}

/// A line of `/proc/self/fdinfo/FD` that begins so, of few bytes, passed on without its beginning. Allocates nothing.
pub(crate) fn fdinfo<T>(fd: RawFd, key: &[u8], parse: impl FnOnce(&[u8]) -> Option<T>) -> Option<T> {
    let mut lines = Lines::new(open(format_args!("/proc/self/fdinfo/{fd}")).ok()?);
    loop {
        if let Some(value) = lines.next().ok()??.strip_prefix(key) {
            return parse(value);
        }
    }
}

/// The process of a pidfd. `None`: it has ended, is in another namespace, or the descriptor is something else.
#[cfg(feature = "pager")]
pub(crate) fn process_of_pidfd(fd: RawFd) -> Option<Process> {
    let pid = fdinfo(fd, b"Pid:", |pid| std::str::from_utf8(pid).ok()?.trim().parse().ok())?;
    (pid > 0).then(|| Process::Other(Pid::from_raw(pid)))
}

/// Opens a file of `/proc`. Allocates nothing.
fn open(path: fmt::Arguments<'_>) -> io::Result<File> {
    let mut buffer = [0; 40];
    let mut rest = &mut buffer[..];
    rest.write_fmt(path)?;
    let unused = rest.len();
    let path = &buffer[..buffer.len() - unused];
    File::open(OsStr::from_bytes(path))
}

impl Entry {
    fn cut(&self, range: &Range<usize>) -> Mapping {
        Mapping {
            range: self.range.start.max(range.start)..self.range.end.min(range.end),
            anonymous: self.anonymous,
            page: self.page,
            registered: self.flags.map(|flags| !flags.modes().is_empty()),
        }
    }
}

/// Lines of bytes: the name of a mapped file need not be UTF-8, and the kernel escapes a newline in it.
struct Lines<R> {
    read: R,
    buffer: [u8; 4096],
    /// `buffer[next..end]` was read and isn't handed out yet.
    next: usize,
    end: usize,
    line: [u8; 256],
}

impl<R: Read> Lines<R> {
    fn new(read: R) -> Self {
        Self { read, buffer: [0; 4096], next: 0, end: 0, line: [0; 256] }
    }

    /// The next line without its end. Of one that is longer than there is room only so much: what matters stands at its
    /// beginning.
    fn next(&mut self) -> io::Result<Option<&[u8]>> {
        let mut len = 0;
        loop {
            if self.next == self.end {
                self.next = 0;
                self.end = match self.read.read(&mut self.buffer) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                    // The kernel ends the last line, too.
                    Ok(0) => return Ok(None),
                    read => read?,
                };
                continue;
            }
            let unread = &self.buffer[self.next..self.end];
            let part = unread.split(|byte| *byte == b'\n').next().unwrap_or_default();
            let room = &mut self.line[len..];
            let fits = part.len().min(room.len());
            room[..fits].copy_from_slice(&part[..fits]);
            len += fits;
            self.next += part.len();
            if part.len() < unread.len() {
                self.next += 1;
                return Ok(Some(&self.line[..len]));
            }
        }
    }
}

/// Reads lines such as `7f83e60b2000-7f83e60b3000 rw-p 00000000 00:00 0 [heap]`, and in smaps, below each,
/// `KernelPageSize:        4 kB` and `VmFlags: rd wr mr mw me um`.
fn parse(
    lines: &mut Lines<impl Read>,
    range: &Range<usize>,
    mut visit: impl FnMut(&Entry) -> ControlFlow<()>,
) -> io::Result<()> {
    // The mapping whose lines are being read.
    let mut entry: Option<Entry> = None;
    while let Some(line) = lines.next()? {
        if let Some((bounds, rest)) = header(line) {
            if entry.take().is_some_and(|entry| visit(&entry).is_break()) || bounds.start >= range.end {
                return Ok(());
            }
            entry = (bounds.end > range.start).then(|| Entry::of_header(bounds, rest));
        } else if let Some(entry) = &mut entry {
            if let Some(flags) = line.strip_prefix(b"VmFlags:") {
                entry.take_flags(flags);
            } else if let Some(size) = line.strip_prefix(b"KernelPageSize:") {
                entry.page = words(size).next().and_then(|kib| number(kib, 10)).map_or(0, |kib| 1024 * kib);
            }
        }
    }
    let _done = entry.map(|entry| visit(&entry));
    Ok(())
}

impl Entry {
    /// Of what is behind the bounds: `rw-p 00000000 00:00 0 [heap]`.
    fn of_header(range: Range<usize>, rest: &[u8]) -> Self {
        let mut fields = words(rest);
        let permissions = fields.next().unwrap_or_default();
        let offset = fields.next().and_then(|offset| number(offset, 16)).unwrap_or_default();
        let inode = fields.nth(1);
        let name = fields.next().unwrap_or_default();
        // What is shared or of a file has an inode, or at least a path: the first segment of System V has number 0.
        let anonymous = inode == Some(b"0") && !name.starts_with(b"/");
        let memory = match name {
            b"" | b"[heap]" | b"[stack]" => MemoryKind::Anonymous,
            _ if name.starts_with(b"[anon:") => MemoryKind::Anonymous,
            b"/dev/zero" => MemoryKind::Shared,
            _ if name.starts_with(b"/memfd:") || name.starts_with(b"[anon_shmem:") => MemoryKind::Shared,
            _ if name.starts_with(b"/SYSV") => MemoryKind::SystemV,
            b"/anon_hugepage" => MemoryKind::Hugetlb,
            b"/secretmem" => MemoryKind::Secret,
            _ if name.starts_with(b"[") || name.starts_with(b"anon_inode:") => MemoryKind::Special,
            _ => MemoryKind::File,
        };
        let accessible = !permissions.starts_with(b"---");
        let inode = inode.and_then(|inode| std::str::from_utf8(inode).ok()?.parse().ok()).unwrap_or_default();
        Self { range, memory, anonymous, accessible, offset, inode, page: 0, flags: None }
    }

    /// Of the names behind `VmFlags:`.
    fn take_flags(&mut self, names: &[u8]) {
        let mut flags = VmFlags::empty();
        for name in words(names) {
            match name {
                b"mw" => flags |= VmFlags::MAY_WRITE,
                b"um" => flags |= VmFlags::MISSING,
                b"uw" => flags |= VmFlags::WRITE_PROTECT,
                b"ui" => flags |= VmFlags::MINOR,
                b"ur" => flags |= VmFlags::READ_WRITE_PROTECT,
                b"ht" => self.memory = MemoryKind::Hugetlb,
                // Of a device: its addresses, not memory.
                b"io" | b"pf" => self.memory = MemoryKind::Special,
                b"dp" => self.memory = MemoryKind::Droppable,
                b"ss" => self.memory = MemoryKind::ShadowStack,
                _ => {}
            }
        }
        self.flags = Some(flags);
    }
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

    fn entries(text: &[u8], range: &Range<usize>) -> Vec<Entry> {
        let mut found = Vec::new();
        let visit = |entry: &Entry| {
            found.push(entry.clone());
            ControlFlow::Continue(())
        };
        parse(&mut Lines::new(text), range, visit).unwrap();
        found
    }

    #[test]
    fn mappings_are_cut_to_the_range() {
        crate::support::require!();
        let read = |range: Range<usize>| {
            entries(SMAPS, &range).iter().map(|entry| entry.cut(&range)).collect::<Vec<_>>()
        };
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
    fn first_line_and_flags_give_kind_of_memory() {
        crate::support::require!();
        let cases: [(&str, &str, MemoryKind); 18] = [
            ("rw-p 00000000 00:00 0", "rd wr", MemoryKind::Anonymous),
            ("rw-p 00000000 00:00 0 [stack]", "rd wr gd", MemoryKind::Anonymous),
            ("rw-p 00000000 00:00 0 [anon: a name]", "rd wr", MemoryKind::Anonymous),
            ("rw-p 00000000 00:00 0", "rd wr ht", MemoryKind::Hugetlb),
            ("rw-p 00000000 00:00 0", "rd wr dp", MemoryKind::Droppable),
            ("rw-p 00000000 00:00 0", "rd wr ss", MemoryKind::ShadowStack),
            ("rw-s 00000000 00:01 7 /dev/zero (deleted)", "rd wr sh", MemoryKind::Shared),
            ("rw-s 00000000 00:01 7 [anon_shmem:x]", "rd wr sh", MemoryKind::Shared),
            ("rw-s 00000000 00:01 7 /memfd:x (deleted)", "rd wr sh", MemoryKind::Shared),
            ("rw-s 00000000 00:01 7 /memfd:x (deleted)", "rd wr sh ht", MemoryKind::Hugetlb),
            ("rw-s 00000000 00:0e 7 /anon_hugepage (deleted)", "rd wr ht", MemoryKind::Hugetlb),
            ("rw-s 00000000 00:01 0 /SYSV00000000 (deleted)", "rd wr sh", MemoryKind::SystemV),
            ("rw-s 00000000 00:0d 7 /secretmem (deleted)", "rd wr lo", MemoryKind::Secret),
            ("r-xp 00000000 00:00 0 [vdso]", "rd ex de", MemoryKind::Special),
            ("rw-s 00000000 00:0f 7 anon_inode:[perf_event]", "rd wr", MemoryKind::Special),
            ("rw-s 00000000 00:06 7 /dev/mem", "rd wr io pf", MemoryKind::Special),
            ("rw-s 00000000 08:01 7 /x", "rd wr sh", MemoryKind::File),
            ("r-xp 00000000 08:01 7 /lib/memfd:x", "rd ex", MemoryKind::File),
        ];
        for (line, flags, memory) in cases {
            let text = format!("1000-2000 {line}\nKernelPageSize: 4 kB\nVmFlags: {flags}\n");
            assert_eq!(entries(text.as_bytes(), &(0..usize::MAX))[0].memory, memory, "{line} {flags}");
        }
        let text = b"1000-2000 ---p 00000000 00:00 0\nVmFlags: mr mw me um uw ui ur\n";
        let [entry] = &entries(text, &(0..usize::MAX))[..] else { panic!("one mapping") };
        assert!(!entry.accessible);
        assert_eq!(entry.flags, Some(VmFlags::all()));
        assert_eq!(entry.flags.unwrap().modes(), RegisterMode::all());
    }

    /// Hands out a few bytes at a time.
    struct Slow<'a>(&'a [u8], usize);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let len = self.1.min(self.0.len()).min(buffer.len());
            buffer[..len].copy_from_slice(&self.0[..len]);
            self.0 = &self.0[len..];
            Ok(len)
        }
    }

    #[test]
    fn lines_are_whole_and_long_ones_are_cut() {
        crate::support::require!();
        let long = [&b"ab"[..], &[b'x'; 10_000], b"\n\ncd\n"].concat();
        for step in [1, 2, 3, 255, 256, 257, 4096, 10_000] {
            let mut lines = Lines::new(Slow(&long, step));
            let first = lines.next().unwrap().unwrap();
            assert_eq!((first.len(), &first[..3]), (256, &b"abx"[..]), "{step}");
            assert_eq!(lines.next().unwrap(), Some(&b""[..]), "{step}");
            assert_eq!(lines.next().unwrap(), Some(&b"cd"[..]), "{step}");
            assert_eq!(lines.next().unwrap(), None, "{step}");
        }
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
