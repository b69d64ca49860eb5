//! Whether memory may be this process's own.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;

/// Whether this process has memory in a range that is registered with some userfaultfd.
///
/// Asked of a range that was just registered with a descriptor, it tells whether the descriptor may belong to this
/// process: then the range is mapped here, and registered.
pub(super) fn is_registered_here(range: &Range<usize>) -> io::Result<bool> {
    is_registered(BufReader::new(File::open("/proc/self/smaps")?), range)
}

/// Reads /proc/PID/smaps: a line `start-end perms …` for each mapping, then lines `Name: value`, among them the flags.
fn is_registered(smaps: impl BufRead, range: &Range<usize>) -> io::Result<bool> {
    let (mut inside, mut mappings, mut flags) = (false, 0, 0);
    for line in smaps.lines() {
        let line = line?;
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("VmFlags:") => {
                flags += 1;
                // Missing, write-protect, minor, read-write-protect.
                if inside && words.any(|flag| matches!(flag, "um" | "uw" | "ui" | "ur")) {
                    return Ok(true);
                }
            }
            Some(word) if !word.ends_with(':') => {
                let addresses = word.split_once('-').and_then(|(start, end)| {
                    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
                });
                let mapping = addresses.ok_or(io::ErrorKind::InvalidData)?;
                inside = mapping.start < range.end && range.start < mapping.end;
                mappings += 1;
            }
            _ => {}
        }
    }
    // A kernel that tells no flags can't answer.
    if mappings > 0 && flags == mappings { Ok(false) } else { Err(io::ErrorKind::InvalidData.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::UffdBuilder;

    const SMAPS: &str = "\
55d0-55e0 r--p 00000000 fe:00 1234       /usr/bin/program
Size:                  4 kB
VmFlags: rd mr mw me
7f00-7f80 rw-p 00000000 00:00 0
Size:                  4 kB
VmFlags: rd wr mr um
";

    #[test]
    fn only_registered_mappings_in_the_range_count() {
        let ask = |range| is_registered(SMAPS.as_bytes(), &range).unwrap();
        assert!(ask(0x7f00..0x7f01));
        assert!(ask(0x7000..0x8000));
        assert!(!ask(0x55d0..0x55e0));
        assert!(!ask(0x7f80..0x7f90));
        assert!(!ask(0x1000..0x2000));
    }

    #[test]
    fn what_cannot_be_told_is_an_error() {
        let without = SMAPS.replace("VmFlags", "Flags");
        assert!(is_registered(without.as_bytes(), &(0..1)).is_err());
        assert!(is_registered("".as_bytes(), &(0..1)).is_err());
        assert!(is_registered("nonsense".as_bytes(), &(0..1)).is_err());
    }

    #[test]
    fn this_process_knows_its_own() {
        let page = crate::page_size();
        let mut memory = memmap2::MmapMut::map_anon(3 * page).unwrap();
        let start = memory.as_mut_ptr();
        let uffd = UffdBuilder::new().close_on_exec(true).create().unwrap();
        let middle = start.addr() + page..start.addr() + 2 * page;
        assert!(!is_registered_here(&middle).unwrap());
        uffd.register(start.wrapping_add(page).cast(), page).unwrap();
        assert!(is_registered_here(&middle).unwrap());
        assert!(!is_registered_here(&(start.addr()..middle.start)).unwrap());
    }
}
