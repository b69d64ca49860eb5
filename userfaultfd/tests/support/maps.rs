//! What /proc tells of the memory of this process.

use std::fs;
use std::ops::Range;

/// A size in /proc/self/status, in bytes: `VmRSS`, `VmPTE`.
pub(crate) fn status_bytes(field: &str) -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let value = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib = value.unwrap_or_else(|| panic!("no {field} in {status}")).trim().trim_end_matches(" kB");
    1024 * kib.parse::<usize>().unwrap()
}

/// The addresses of a mapping, where a line of maps or smaps begins one.
fn bounds(line: &str) -> Option<Range<usize>> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    Some(address(start)?..address(end)?)
}

/// The addresses of the mapping that has an address.
pub(crate) fn mapping_of(address: usize) -> Option<Range<usize>> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter_map(bounds).find(|range| range.contains(&address))
}

/// A field of smaps of the mapping that has an address: `VmFlags`, `AnonHugePages`.
pub(crate) fn mapping_field(address: usize, field: &str) -> Option<String> {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = smaps.lines();
    lines.find(|line| bounds(line).is_some_and(|range| range.contains(&address)))?;
    let mut fields = lines.take_while(|line| bounds(line).is_none());
    fields.find_map(|line| Some(line.strip_prefix(field)?.strip_prefix(':')?.trim().to_owned()))
}

/// The sum of a size in smaps, in bytes, over the mappings that begin in a range of addresses: `Rss`, `Swap`.
pub(crate) fn sum_of(range: Range<usize>, field: &str) -> usize {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut inside, mut found, mut kib) = (false, false, 0);
    for line in smaps.lines() {
        if let Some(mapping) = bounds(line) {
            inside = range.contains(&mapping.start);
        } else if let Some(size) = line.strip_prefix(field).and_then(|rest| rest.strip_prefix(':')) {
            found = true;
            kib += if inside { size.trim().trim_end_matches(" kB").parse::<usize>().unwrap() } else { 0 };
        }
    }
    assert!(found, "no mapping has {field}");
    1024 * kib
}

/// Whether the kernel gave a mapping a flag, of two letters in smaps.
pub(crate) fn has_flag(address: usize, flag: &str) -> bool {
    let flags = mapping_field(address, "VmFlags").expect("something is mapped there");
    flags.split_whitespace().any(|found| found == flag)
}
