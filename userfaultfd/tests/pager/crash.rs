//! What a flush has confirmed is in the file, however its process ends.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use userfaultfd::pager::{Budget, FileStore, WriteBack};
use userfaultfd::{FeatureFlags, PagedMemory};

use crate::support::{child, page, require, test_name};

const PAGES: usize = 200;
/// Pages that a round writes.
const PAGES_OF_ROUND: u64 = 12;

/// The pages that a round writes its number to.
fn pages_of(round: u64) -> impl Iterator<Item = usize> {
    (0..PAGES_OF_ROUND).map(move |number| {
        let mut hash = (round * PAGES_OF_ROUND + number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 29;
        (hash.wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 33) as usize % PAGES
    })
}

/// Writes rounds and flushes each, and says so, until it is killed.
fn write(path: &Path, first: u64, write_back: WriteBack, mut confirm: UnixStream) {
    let budget = Budget::new(24 * page());
    let store = FileStore::open(path).unwrap();
    let mut memory = PagedMemory::builder(store).budget(&budget).write_back(write_back).build().unwrap();
    for round in first.. {
        for at in pages_of(round) {
            for word in memory[at * page()..(at + 1) * page()].chunks_exact_mut(8) {
                word.copy_from_slice(&round.to_ne_bytes());
            }
        }
        memory.flush().unwrap();
        confirm.write_all(&round.to_ne_bytes()).unwrap();
    }
}

/// Finds each page as the last confirmed round left it, unless a later one has begun to write it.
fn check(path: &Path, confirmed: u64) {
    let bytes = fs::read(path).unwrap();
    let mut expected = HashMap::new();
    for round in 1..=confirmed {
        expected.extend(pages_of(round).map(|at| (at, round)));
    }
    let next: Vec<_> = pages_of(confirmed + 1).collect();
    for at in 0..PAGES {
        let wanted = expected.get(&at).copied().unwrap_or(0);
        for word in bytes[at * page()..(at + 1) * page()].chunks_exact(8) {
            let found = u64::from_ne_bytes(word.try_into().unwrap());
            let is_next = found == confirmed + 1 && next.contains(&at);
            assert!(found == wanted || is_next, "page {at} is of round {found}, and not of {wanted}");
        }
    }
}

#[test]
fn what_a_flush_confirmed_survives_the_end_of_its_process() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    child::run_well(test_name!(), || {
        let path = std::env::temp_dir().join(format!("userfaultfd-crash-{}", std::process::id()));
        fs::write(&path, vec![0; PAGES * page()]).unwrap();
        let crashes = std::env::var("USERFAULTFD_CRASHES").ok().and_then(|crashes| crashes.parse().ok());
        let mut confirmed = 0;
        for crash in 0..crashes.unwrap_or(50) {
            let write_back = if crash % 2 == 0 { WriteBack::Any } else { WriteBack::OnFlush };
            let (mut told, confirm) = UnixStream::pair().unwrap();
            // The end of the last one may have left some of the round that it was in.
            let first = confirmed + 1;
            let child = child::fork(|| write(&path, first, write_back, confirm.try_clone().unwrap()));
            drop(confirm);
            let mut round = [0; 8];
            for _ in 0..1 + crash * 7 % 5 {
                told.read_exact(&mut round).unwrap();
            }
            child.kill();
            assert_eq!(child.wait(), libc::SIGKILL);
            // Those that it confirmed before it was killed.
            confirmed = u64::from_ne_bytes(round);
            while told.read_exact(&mut round).is_ok() {
                confirmed = u64::from_ne_bytes(round);
            }
            check(&path, confirmed);
        }
        fs::remove_file(&path).unwrap();
    });
}
