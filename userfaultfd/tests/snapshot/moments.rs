//! Memory that isn't any more what it was when a snapshot began, or when the one before did, and nothing tells, or only
//! later.

use std::io;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

#[cfg(feature = "tracking")]
use userfaultfd::DirtyTracker;
use userfaultfd::snapshot::{
    Content, Finished, Geometry, Options, Removal, Series, Sink, Snapshot, SnapshotReader, SnapshotWriter,
};
use userfaultfd::{FeatureFlags, MoveMode, RegisterMode};

use crate::changes::during;
use crate::file::file;
use crate::image::{Image, addresses, number};
use crate::support::memory::{self, Kind, Memory};
use crate::support::{self, child, maps, page, proc, require, test_name, uffd};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

fn each(test: &str, pages: usize) -> impl Iterator<Item = Memory> {
    memory::each_of(test, &Kind::SMALL, RegisterMode::WRITE_PROTECT, pages)
        .inspect(|memory| println!("{memory:?}"))
}

/// Of enough pages that the walk doesn't reach the end while the sink takes nothing.
const MANY: usize = 8 * (256 << 10) / 4096;

fn take(series: &mut Series) -> Image {
    let image = Image::new();
    series.begin(image.clone()).unwrap().wait().unwrap();
    image
}

fn gone(image: &Image) -> Vec<u64> {
    image.with(|delivered| delivered.gone.clone())
}

/// Maps other memory in the place of some pages.
fn map_anew(memory: &Memory, first: usize, pages: usize) {
    let (start, len) = (memory.at(first), pages * memory.page());
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: the pages are this mapping's, whose content nobody borrows.
    let mapped = unsafe { libc::mmap(start, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_eq!(mapped, start);
}

#[test]
fn memory_mapped_anew_before_snapshot_is_gone() {
    require!(WRITE_PROTECT);
    for memory in each(test_name!(), 8) {
        number(&memory, 1);
        let mut series = Options::new().range(addresses(&memory)).series().unwrap();
        // Before the first one.
        map_anew(&memory, 1, 2);
        memory.write(1, 99);
        let first = take(&mut series);
        assert_eq!((gone(&first), first.pages().len()), (vec![1, 2], 8), "{memory:?}");
        // And before one that holds what has changed.
        map_anew(&memory, 4, 1);
        memory.write(4, 99);
        memory.write(5, 99);
        let second = take(&mut series);
        assert_eq!((gone(&second), second.pages()), (vec![4], vec![4, 5]), "{memory:?}");
        assert!(take(&mut series).pages().is_empty(), "{memory:?}");
    }
}

/// Memory is unmapped while the sink begins: the file says so, and can be read.
#[test]
fn memory_unmapped_while_snapshot_begins_is_gone() {
    require!(WRITE_PROTECT);
    struct Unmapping<'a>(SnapshotWriter<Vec<u8>>, &'a Memory);
    impl Sink for Unmapping<'static> {
        fn begin(&mut self, geometry: &Geometry) -> io::Result<()> {
            self.1.unmap(3, 2);
            self.0.begin(geometry)
        }
        fn write(&mut self, offset: u64, content: Content<'_>) -> io::Result<()> {
            self.0.write(offset, content)
        }
        fn finish(&mut self) -> io::Result<()> {
            self.0.finish()
        }
    }
    child::run_well(test_name!(), || {
        for memory in each(test_name!(), 8) {
            let memory: &Memory = Box::leak(Box::new(memory));
            number(memory, 1);
            let sink = Unmapping(SnapshotWriter::new(Vec::new()).unwrap(), memory);
            let Finished { sink, progress, .. } =
                Snapshot::begin(addresses(memory), sink).unwrap().wait().unwrap();
            assert_eq!(progress.gone, 2 * page() as u64);
            let reader = SnapshotReader::new(file(&sink.0.into_inner())).unwrap();
            reader.verify().unwrap();
            assert_eq!(reader.gone_len(), 2 * page() as u64);
        }
    });
}

/// Takes a page away and gives it to another place, of which no event tells.
fn move_away(memory: &Memory, number: usize) {
    let (target, uffd) = (Memory::anonymous(1), uffd(FeatureFlags::MOVE));
    uffd.register(target.start(), page()).unwrap();
    // SAFETY: nobody borrows the pages.
    unsafe { uffd.move_pages(memory.at(number), target.start(), page(), MoveMode::empty()) }.unwrap();
}

#[test]
fn unreported_unprotected_pages_have_changed() {
    require!(WRITE_PROTECT | FeatureFlags::MOVE);
    let memory = Memory::anonymous(16);
    number(&memory, 1);
    let mut series = Options::new().range(addresses(&memory)).series().unwrap();
    take(&mut series);
    move_away(&memory, 3);
    memory.write(3, 98);
    move_away(&memory, 7);
    let second = take(&mut series);
    assert_eq!((second.pages(), gone(&second)), (vec![3, 7], vec![]));
    second.with(|delivered| assert_eq!([3, 7].map(|number| delivered.bytes[number * page()]), [98, 0]));
    // They are protected again.
    memory.write(3, 97);
    assert_eq!(take(&mut series).pages(), [3]);
    assert!(take(&mut series).pages().is_empty());
}

#[test]
fn guard_pages_are_gone_and_no_thread_waits_for_them() {
    require!(WRITE_PROTECT);
    const MADV_GUARD_INSTALL: libc::c_int = 102;
    const MADV_GUARD_REMOVE: libc::c_int = 103;
    let memory = Memory::anonymous(16);
    number(&memory, 1);
    let mut series = Options::new().range(addresses(&memory)).series().unwrap();
    take(&mut series);
    if !support::has(test_name!(), "guard pages", memory.advise(5, 1, MADV_GUARD_INSTALL).is_ok()) {
        return;
    }
    let second = take(&mut series);
    assert_eq!((second.pages(), gone(&second)), (vec![5], vec![5]));
    memory.advise(5, 1, MADV_GUARD_REMOVE).unwrap();
    memory.write(5, 99);
    let third = take(&mut series);
    assert_eq!((third.pages(), gone(&third)), (vec![5], vec![]));
    third.with(|delivered| assert_eq!(delivered.bytes[5 * page()], 99));
}

/// Equal pages become one, which is mapped in the place of each, without its protection.
#[test]
fn merged_pages_have_changed() {
    require!(WRITE_PROTECT, root);
    const PAGES: usize = 64;
    /// Time for which the kernel's thread may take: it is of low priority.
    const SOME_TIME: Duration = Duration::from_secs(15);
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(PAGES);
        (0..PAGES).for_each(|number| memory.write(number, 123));
        let mut series = Options::new().range(addresses(&memory)).series().unwrap();
        take(&mut series);
        let settings = [
            ("/sys/kernel/mm/ksm/run", "1"),
            ("/sys/kernel/mm/ksm/sleep_millisecs", "1"),
            ("/sys/kernel/mm/ksm/pages_to_scan", "1000"),
        ];
        let settings =
            settings.map(|(path, value)| support::sysctl::lock(path).filter(|setting| setting.set(value)));
        let merges =
            settings.iter().all(Option::is_some) && memory.advise(0, PAGES, libc::MADV_MERGEABLE).is_ok();
        if !support::has(test_name!(), "a kernel that merges equal pages", merges) {
            return;
        }
        let merged = || {
            let statistics = std::fs::read_to_string("/proc/self/ksm_stat").unwrap_or_default();
            let count = statistics.lines().find_map(|line| line.strip_prefix("ksm_merging_pages "));
            count.map_or(0, |count| count.trim().parse::<usize>().unwrap())
        };
        let start = Instant::now();
        while merged() < PAGES && start.elapsed() < SOME_TIME {
            thread::yield_now();
        }
        drop(settings);
        if !support::has(test_name!(), "equal pages merged within some seconds", merged() == PAGES) {
            return;
        }
        memory.write(3, 98);
        memory.write(60, 99);
        let second = take(&mut series);
        assert!([3, 60].iter().all(|number| second.pages().contains(number)), "{:?}", second.pages());
        assert!(gone(&second).is_empty());
        second.with(|delivered| assert_eq!([3, 60].map(|number| delivered.bytes[number * page()]), [98, 99]));
        // They are protected again.
        memory.write(5, 97);
        let third = take(&mut series);
        assert!(third.pages().contains(&5));
        third.with(|delivered| assert_eq!(delivered.bytes[5 * page()], 97));
    });
}

/// Nothing wrong is passed off as content: pages that were taken away before they were saved read as zeros.
#[test]
fn pages_removed_unsaved_are_gone() {
    require!(WRITE_PROTECT | FeatureFlags::MOVE);
    let memory = Memory::anonymous(MANY);
    let before = number(&memory, 1);
    let image = during(&memory, Removal::Save, None, || {
        move_away(&memory, MANY - 5);
        move_away(&memory, MANY - 3);
        memory.write(MANY - 3, 99);
    });
    assert_eq!(gone(&image), [MANY as u64 - 5, MANY as u64 - 3]);
    let content = image.content(&memory);
    assert!((0..MANY).all(|page| content[page] == before[page] || gone(&image).contains(&(page as u64))));
}

/// A page is moved over another one: it is protected, and not the page that it seems.
#[test]
fn page_moved_over_another_is_not_mistaken() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        for memory in each(test_name!(), MANY) {
            let before = number(&memory, 1);
            let image = during(&memory, Removal::Save, Some(libc::SYS_mremap), || {
                memory.try_move(MANY - 5, 1, memory.at(MANY - 9), 0).unwrap();
            });
            assert_eq!(gone(&image), [MANY as u64 - 9], "{memory:?}");
            let content = image.content(&memory);
            assert!((0..MANY).all(|page| page == MANY - 9 || content[page] == before[page]), "{memory:?}");
        }
    });
}

/// What was mapped in the place of a page, and is protected by another descriptor, isn't taken for it.
#[cfg(feature = "tracking")]
#[test]
fn pages_of_another_tracker_are_not_mistaken() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(MANY);
        let before = number(&memory, 1);
        let image = during(&memory, Removal::Save, None, || {
            map_anew(&memory, MANY - 5, 1);
            memory.write(MANY - 5, 250);
            let mut tracker = DirtyTracker::new().unwrap();
            tracker.track(memory.range(MANY - 5, 1)).unwrap();
            std::mem::forget(tracker);
        });
        assert_eq!(gone(&image), [MANY as u64 - 5]);
        let content = image.content(&memory);
        assert!((0..MANY).all(|page| page == MANY - 5 || content[page] == before[page]));
    });
}

/// A page was dropped and written before the snapshot began. It isn't zero then, however it ends.
#[test]
fn pages_written_after_a_drop_and_unmapped_are_gone() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        for (unmap, memory) in
            [true, false].into_iter().flat_map(|unmap| each(test_name!(), MANY).map(move |m| (unmap, m)))
        {
            number(&memory, 1);
            let mut series = Options::new().range(addresses(&memory)).buffer(0).series().unwrap();
            take(&mut series);
            number(&memory, 2);
            memory.advise(MANY - 5, 1, libc::MADV_DONTNEED).unwrap();
            memory.write(MANY - 5, 77);
            let image = Image::closed();
            let snapshot = series.begin(image.clone()).unwrap();
            image.wait_for_piece();
            thread::scope(|scope| {
                let (tell, told) = mpsc::channel();
                let memory = &memory;
                let changing = scope.spawn(move || {
                    tell.send(proc::thread_id()).unwrap();
                    if unmap { memory.unmap(MANY - 5, 1) } else { map_anew(memory, MANY - 5, 1) }
                });
                // A thread that unmaps it doesn't wait. One that maps something in its place does, until its event is read:
                // it may be gone when it is looked at.
                match unmap {
                    true => changing.join().unwrap(),
                    false => {
                        let thread = told.recv().unwrap();
                        proc::wait_until(|| proc::is_in(thread, libc::SYS_mmap) != Some(false));
                        // It may sleep before it has got the lock of the mappings.
                        let place = memory.at(MANY - 5).addr();
                        proc::wait_until(|| {
                            maps::mapping_of(place).is_some_and(|found| found.start == place)
                        });
                    }
                }
                image.open();
            });
            snapshot.wait().unwrap();
            assert_eq!(gone(&image), [MANY as u64 - 5], "{memory:?}");
        }
    });
}
