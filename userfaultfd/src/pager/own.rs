//! Whether memory may be this process's own.

use std::io;
use std::ops::Range;

use crate::maps::Process;

/// Whether this process has memory in a range that is registered with some userfaultfd.
///
/// Asked of a range that was just registered with a descriptor, it tells whether the descriptor may belong to this
/// process: then the range is mapped here, and registered.
pub(super) fn is_registered_here(range: &Range<usize>) -> io::Result<bool> {
    let here = Process::Own.mappings_with_pages(range)?;
    // What a kernel doesn't tell may be so.
    Ok(here.iter().any(|mapping| mapping.registered != Some(false)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::UffdBuilder;

    #[test]
    fn this_process_knows_its_own() {
        crate::support::require!();
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
