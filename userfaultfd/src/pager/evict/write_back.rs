//! What becomes of pages at the end of the staging area: those that were written go to the spill file first.

#![expect(unsafe_code, reason = "bytes of pages that nobody else has")]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{io, process, slice};

use super::frames::Victim;
use super::residence::Backing;
use crate::pager::{Problem, RegionId};
use crate::sync_point::{Departure, Point, reach};

/// Creates a file without a name in a directory. It is gone when its last descriptor is closed.
pub(super) fn create(dir: &Path) -> io::Result<File> {
    let options = || {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        options
    };
    let unnamed = options().custom_flags(libc::O_TMPFILE).open(dir);
    match unnamed.as_ref().map_err(io::Error::raw_os_error) {
        // File systems without such files; `EISDIR` and `ENOENT` before Linux 3.11.
        Err(Some(libc::EOPNOTSUPP | libc::EISDIR)) => {}
        _ => return unnamed,
    }
    static FILES: AtomicUsize = AtomicUsize::new(0);
    loop {
        let number = FILES.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!(".userfaultfd-spill-{}-{number}", process::id()));
        match options().create_new(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            file => {
                let file = file?;
                fs::remove_file(&path)?;
                return Ok(file);
            }
        }
    }
}

/// Sorts pages by memory and place, without allocating.
pub(super) fn sort(victims: &mut [Victim]) {
    victims.sort_unstable_by_key(|victim| (victim.member.start, Arc::as_ptr(&victim.member), victim.page));
}

/// How many of the first pages are neighbours in one memory. `None`: there is none.
pub(super) fn run_len(victims: &[Victim]) -> Option<usize> {
    let first = victims.first()?;
    let follows = |(at, victim): (usize, &Victim)| {
        Arc::ptr_eq(&victim.member, &first.member) && victim.page == first.page + at
    };
    Some(victims.iter().enumerate().take_while(|(at, victim)| follows((*at, victim))).count())
}

/// Writes those of some claimed pages of the staging area that were written, sorted and merged, and empties their places.
pub(super) fn drop_staged(victims: &mut [Victim]) {
    sort(victims);
    let mut rest = victims;
    while let Some(len) = run_len(rest) {
        let (run, others) = rest.split_at_mut(len);
        write(run);
        let mut dropped = &mut run[..];
        while let Some(first) = dropped.iter().position(|victim| victim.is_done) {
            dropped = &mut dropped[first..];
            let count = dropped.iter().take_while(|victim| victim.is_done).count();
            let page = dropped[0].page;
            dropped[0].member.residence().empty(&(page..page + count));
            dropped = &mut dropped[count..];
        }
        rest = others;
    }
}

/// Writes those of neighbouring pages that were written. All that needn't be written, or were, are done.
fn write(run: &mut [Victim]) {
    let is_written = |victim: &Victim| {
        let Victim { member, page, .. } = victim;
        // What was removed since is zero, whatever it was.
        member.residence().place(*page).is_written() && !member.region.pages.is_removed(*page)
    };
    let mut rest = run;
    while let Some(first) = rest.first() {
        let writes = is_written(first);
        let len = rest.iter().take_while(|victim| is_written(victim) == writes).count();
        let (part, others) = rest.split_at_mut(len);
        let written = if writes { write_part(part) } else { Ok(()) };
        match written {
            Ok(()) => part.iter_mut().for_each(|victim| victim.is_done = true),
            Err(error) => {
                let Victim { member, page, .. } = &part[0];
                let (region, address) =
                    (RegionId(member.region.id), member.start + page * crate::page_size());
                let len = part.len() * crate::page_size();
                member.pager.report(Problem::WriteBack { region, address, len, error });
            }
        }
        rest = others;
    }
}

fn write_part(part: &[Victim]) -> io::Result<()> {
    let Victim { member, page, .. } = &part[0];
    let (residence, page_size) = (member.residence(), crate::page_size());
    reach(Point::Evict(Departure::BeforeWriteBack), member.start + page * page_size);
    // SAFETY: these pages of the staging area are there, and this thread's as long as it has their claims.
    let bytes = unsafe { slice::from_raw_parts(residence.staged(*page), part.len() * page_size) };
    match &residence.backing {
        Backing::Spill(spill) => spill.write_all_at(bytes, (*page * page_size) as u64),
        // Such pages aren't chosen before they are written.
        Backing::Store(_) => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// Counts what was written of pages that are about to be dropped.
pub(super) fn count_spilled(victims: &[Victim]) {
    for Victim { member, page, is_done, .. } in victims {
        let residence = member.residence();
        match (is_done, residence.place(*page).is_written()) {
            (true, true) => residence.count(|counters| &counters.spilled, 1),
            (true, false) => {}
            (false, _) => residence.count(|counters| &counters.unwritten, 1),
        }
    }
}
