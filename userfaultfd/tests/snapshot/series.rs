//! Snapshots that hold what has changed since the one before.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;

use userfaultfd::snapshot::{Error, Options, Series};
use userfaultfd::{FeatureFlags, Pid, RegisterMode, Uffd};

use crate::image::{Image, addresses, content, number};
use crate::ring::Ring;
use crate::support::memory::{self, Kind, Memory};
use crate::support::random::Random;
use crate::support::{child, features, has, mapping, require, test_name, uffd};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

fn each(test: &str, pages: usize) -> impl Iterator<Item = Memory> {
    memory::each(test, RegisterMode::WRITE_PROTECT, pages).inspect(|memory| println!("{memory:?}"))
}

fn take(series: &mut Series) -> Image {
    let image = Image::new();
    series.begin(image.clone()).unwrap().wait().unwrap();
    image
}

/// Which pages of the memory an image holds.
fn pages(image: &Image, memory: &Memory) -> Vec<usize> {
    let small = memory.page() / crate::support::page();
    let mut pages: Vec<usize> = image.pages().into_iter().map(|page| page / small).collect();
    pages.dedup();
    pages
}

#[test]
fn second_snapshot_holds_changes_since_first() {
    require!(WRITE_PROTECT);
    for memory in each(test_name!(), 6) {
        let mut series = Options::new().range(addresses(&memory)).series().unwrap();
        // Before the first there is nothing to be told.
        let before = number(&memory, 1);
        let first = take(&mut series);
        assert_eq!(first.content(&memory), before, "{memory:?}");
        memory.write(1, 50);
        memory.write(4, 51);
        memory.read(3);
        let second = take(&mut series);
        assert_eq!(pages(&second, &memory), [1, 4], "{memory:?}");
        assert!(second.with(|delivered| delivered.geometry.as_ref().unwrap().incremental));
        let bytes =
            |image: &Image, page: usize| image.with(|delivered| delivered.bytes[page * memory.page()]);
        assert_eq!((bytes(&second, 1), bytes(&second, 4)), (50, 51));
        // Nothing.
        assert!(pages(&take(&mut series), &memory).is_empty());
        memory.write(1, 52);
        let last = take(&mut series);
        assert_eq!((pages(&last, &memory), bytes(&last, 1)), (vec![1], 52));
        drop(series);
        number(&memory, 2);
    }
}

/// What is written while a snapshot is taken isn't in it, and is in the next.
#[test]
fn writes_during_a_snapshot_belong_to_the_next() {
    require!(WRITE_PROTECT);
    for memory in each(test_name!(), 6) {
        let before = number(&memory, 1);
        let mut series = Options::new().range(addresses(&memory)).series().unwrap();
        let image = Image::closed();
        let snapshot = series.begin(image.clone()).unwrap();
        image.wait_for_piece();
        let again = series.begin(Image::new()).map(drop).unwrap_err();
        assert!(matches!(again, Error::Running), "{again:?}");
        thread::scope(|scope| {
            scope.spawn(|| [0, 5].into_iter().for_each(|page| memory.write(page, 99)));
            image.open();
        });
        snapshot.wait().unwrap();
        assert_eq!(image.content(&memory), before, "{memory:?}");
        let second = take(&mut series);
        assert_eq!(pages(&second, &memory), [0, 5], "{memory:?}");
    }
}

#[test]
fn failed_snapshot_is_no_member_of_its_series() {
    require!(WRITE_PROTECT);
    for memory in each(test_name!(), 4) {
        let mut series = Options::new().range(addresses(&memory)).series().unwrap();
        number(&memory, 1);
        take(&mut series);
        memory.write(1, 50);
        let failing = Image::new();
        failing.with(|delivered| delivered.fails_at = Some(1));
        series.begin(failing).unwrap().wait().map(drop).unwrap_err();
        memory.write(2, 51);
        // Aborted before anything was taken.
        let image = Image::closed();
        let snapshot = series.begin(image.clone()).unwrap();
        image.wait_for_piece();
        snapshot.abort();
        image.open();
        snapshot.wait().map(drop).unwrap_err();
        memory.write(3, 52);
        let next = take(&mut series);
        assert_eq!(pages(&next, &memory), [1, 2, 3], "{memory:?}");
        assert!(pages(&take(&mut series), &memory).is_empty());
    }
}

#[test]
fn dropped_pages_have_changed() {
    require!(WRITE_PROTECT);
    for memory in each(test_name!(), 6) {
        let mut series = Options::new().range(addresses(&memory)).series().unwrap();
        number(&memory, 1);
        take(&mut series);
        if memory.advise(1, 2, libc::MADV_DONTNEED).is_err() {
            continue; // hugetlb memory before Linux 5.18
        }
        let now = content(&memory);
        let next = take(&mut series);
        assert_eq!(pages(&next, &memory), [1, 2], "{memory:?}");
        next.with(|delivered| {
            assert!((1..3).all(|page| delivered.bytes[page * memory.page()] == now[page]), "{memory:?}");
            assert!(delivered.gone.is_empty());
        });
        memory.write(2, 60);
        // Other memory than private anonymous doesn't tell whether the drop was made before the snapshot began: for some
        // seconds it may be made yet.
        let (again, then) =
            if memory.kind() == Kind::Anonymous { (vec![2], vec![]) } else { (vec![1, 2], vec![1, 2]) };
        assert_eq!(pages(&take(&mut series), &memory), again, "{memory:?}");
        assert_eq!(pages(&take(&mut series), &memory), then, "{memory:?}");
    }
}

/// All snapshots put on one another are what memory held when the last began, whatever happened.
#[test]
fn chain_of_snapshots_equals_memory() {
    require!(WRITE_PROTECT);
    const PAGES: usize = 16;
    let memory = Memory::anonymous(PAGES);
    let mut series = Options::new().range(addresses(&memory)).series().unwrap();
    let mut restored = vec![0xee; PAGES];
    let mut numbers = Random::new(1);
    let mut random = move |limit: usize| numbers.below(limit);
    for round in 0..60 {
        for _ in 0..random(10) {
            match random(4) {
                0 => memory.advise(random(PAGES - 2), 2, libc::MADV_DONTNEED).unwrap(),
                _ => memory.write(random(PAGES), random(251) as u8),
            }
        }
        let before = content(&memory);
        let image = Image::closed();
        let snapshot = match series.begin(image.clone()) {
            Ok(snapshot) => snapshot,
            Err(error) => panic!("{round}: {error}"),
        };
        thread::scope(|scope| {
            let (page, memory) = (random(PAGES), &memory);
            scope.spawn(move || memory.write(page, 99));
            image.open();
        });
        let well = snapshot.wait().is_ok();
        assert!(well);
        let (bytes, held) = image.with(|delivered| (delivered.bytes.clone(), delivered.times.clone()));
        for page in (0..PAGES).filter(|page| held[*page] == 1) {
            restored[page] = bytes[page * memory.page()];
        }
        assert_eq!(restored, before, "{round}");
    }
}

#[test]
fn memory_of_another_process_is_saved() {
    require!(WRITE_PROTECT | FeatureFlags::EVENT_REMOVE);
    child::run_well(test_name!(), || {
        for memory in each(test_name!(), 4).filter(|memory| !memory.kind().is_shared()) {
            use std::io::{Read, Write};
            if memory.kind().is_hugetlb() && !features().contains(FeatureFlags::WP_UNPOPULATED) {
                continue; // such kernels lose protection as a page is read that is shared with a parent: it is gone
            }
            let before = number(&memory, 1);
            let (mut here, there) = UnixStream::pair().unwrap();
            let wanted = FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_UNMAP | FeatureFlags::EVENT_REMAP;
            let wanted = wanted | (features() & FeatureFlags::WP_UNPOPULATED);
            let child = child::fork(|| {
                child::send_fd(&there, uffd(wanted).as_fd());
                (&there).read_exact(&mut [0]).unwrap();
                (0..4).for_each(|page| memory.write(page, 77));
                (&there).write_all(&[1]).unwrap();
                // Until it is killed.
                drop((&there).read(&mut [0]));
            });
            let descriptor = Uffd::from(child::receive_fd(&here));
            let image = Image::closed();
            let options = Options::new().range(addresses(&memory));
            let snapshot =
                options.process(Pid::from_raw(child.pid()), descriptor).begin(image.clone()).unwrap();
            here.write_all(&[1]).unwrap();
            number(&memory, 9);
            image.open();
            snapshot.wait().unwrap();
            assert_eq!(image.content(&memory), before, "{memory:?}");
            here.read_exact(&mut [0]).unwrap();
        }
    });
}

/// The kernel writes to pinned memory without a fault. What is declared is saved all the same.
#[test]
fn declared_pinned_memory_is_in_every_snapshot() {
    require!(WRITE_PROTECT);
    for memory in each(test_name!(), 6).filter(|memory| !memory.kind().is_hugetlb()) {
        number(&memory, 1);
        let ring = Ring::new(memory.at(0), memory.len());
        if !has(test_name!(), "io_uring", ring.is_ok()) {
            return;
        }
        let ring = ring.unwrap();
        let mut file = std::fs::File::from(mapping::memfd(0, 1));
        file.write_all(&vec![9; memory.page()]).unwrap();
        let mut series = Options::new().range(addresses(&memory)).series().unwrap();
        take(&mut series);
        let all = addresses(&memory);
        for wrong in [all.start..all.end + memory.page(), all.start - memory.page()..all.start] {
            let declared = series.set_always_dirty(wrong, true);
            let not_tracked =
                |error: &Error| matches!(error, Error::Kernel(userfaultfd::Error::NeverTracked { .. }));
            assert!(declared.as_ref().is_err_and(not_tracked), "{declared:?}");
        }
        series.set_always_dirty(memory.range(2, 2), true).unwrap();
        for round in 0..2 {
            assert_eq!(ring.read(&file, memory.at(3), memory.page()), memory.page() as i32);
            memory.write(5, 50 + round);
            let image = take(&mut series);
            assert_eq!(pages(&image, &memory), [2, 3, 5], "{memory:?}");
            assert_eq!(image.with(|delivered| delivered.bytes[3 * memory.page()]), 9);
        }
        assert_eq!(ring.read(&file, memory.at(2), memory.page()), memory.page() as i32);
        series.set_always_dirty(memory.range(2, 1), false).unwrap();
        let image = take(&mut series);
        assert_eq!(
            (pages(&image, &memory), image.with(|delivered| delivered.bytes[2 * memory.page()])),
            (vec![2, 3], 9)
        );
        assert_eq!(pages(&take(&mut series), &memory), [3]);
    }
}
