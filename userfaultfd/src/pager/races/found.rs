//! What the soak found (`cargo run --example soak`), made to happen each time.

#![expect(unsafe_code, reason = "the memory is the test's")]

use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;

use super::harness::{
    Flavour, PAGES, Reader, Seen, Source, Stop, clear, content, read, room, start, tell_signals,
    wait_for_progress,
};
use crate::pager::fill::work::{Outcome, Work};
use crate::pager::memory::descriptor::Descriptor;
use crate::pager::memory::page_run::PageRun;
use crate::pager::{FaultAround, PageData, Pager, Region};
use crate::support::memory::Memory;
use crate::support::proc::wait_until;
use crate::support::{child, has, has_features, require, test_name, uffd};
use crate::sync_point::Point;
use crate::sync_point::tests::at;
use crate::{FeatureFlags, Uffd};

fn add(pager: &Pager, uffd: Uffd, region: Region) -> Arc<Descriptor> {
    // SAFETY: bytes are good whatever they are, and only raw pointers and atomics lead to them.
    let added = unsafe { pager.add_own(uffd, [region]) }.unwrap();
    pager.shared.table.find(added.descriptor.0).unwrap()
}

fn write(memory: &Memory, page: usize, byte: u8) {
    // SAFETY: a byte of the test's memory, to which no reference leads.
    unsafe { memory.at(page).cast::<u8>().write_volatile(byte) };
}

fn remove(memory: &Memory, page: usize) {
    // SAFETY: a page of the test's memory, to which no reference leads.
    let removed = unsafe { libc::madvise(memory.at(page), memory.page(), libc::MADV_DONTNEED) };
    assert_eq!(removed, 0);
}

#[test]
fn zeros_put_aside_are_zeros_after_longer_ones() {
    require!();
    let test = test_name!();
    if !has_features(test, FeatureFlags::PAGEFAULT_FLAG_WP) {
        return;
    }
    let memory = Flavour::Anonymous.memory(test, PAGES).unwrap();
    let (pager, source) = (Pager::new().unwrap(), Source::of(&memory));
    let region = Flavour::Anonymous.region(&memory, source).write_protected();
    let descriptor = add(&pager, uffd(FeatureFlags::PAGEFAULT_FLAG_WP), region);
    let mut filler = pager.shared.lease();
    let segment = &descriptor.segments(pager.shared.outside_id(), None)[0];
    segment.region.pages.remove(0..PAGES, false);
    let (short, next) = PageRun::claim(segment, 0..1, 1);
    let (long, _) = PageRun::claim(segment, next..PAGES, PAGES);
    let (short, long) = (short.unwrap(), long.unwrap());
    let put_aside = filler.content(&pager.shared.fill, &short).unwrap();
    for work in [Work::Load(long, 0), Work::Install(short, put_aside)] {
        let done = filler.resume(&pager.shared.fill, &descriptor, work);
        assert!(matches!(done, Outcome::Settled), "{done:?}");
    }
    drop(filler);
    assert_eq!(pager.statistics().zero_fills, PAGES as u64);
    assert!((0..PAGES).all(|page| read(memory.at(page).addr()) == Seen::ZERO));
}

#[test]
fn hole_punched_before_a_cached_page_maps_is_no_poison() {
    require!();
    let test = test_name!();
    child::run_well(test, || {
        tell_signals();
        let Some(memory) = Flavour::Minor.memory(test, PAGES) else { return };
        let pager = Pager::new().unwrap();
        add(&pager, uffd(FeatureFlags::empty()), Flavour::Minor.region(&memory, Source::of(&memory)));
        let stop = Stop::at(Point::BeforeMap, 0..usize::MAX);
        let reader = Reader::of(memory.at(1).addr());
        stop.reached();
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let len = memory.len() as libc::off_t;
        // SAFETY: touches no memory of the test's but the file's.
        assert_eq!(unsafe { libc::fallocate(memory.file().as_raw_fd(), mode, 0, len) }, 0);
        stop.go();
        assert_eq!(reader.wait(), content(1));
        // The kernel had nothing to map, and the content was put there again.
        assert!(pager.statistics().retries > 0);
    });
}

#[test]
fn load_during_a_hand_over_does_not_reach_the_file() {
    require!();
    let test = test_name!();
    let Some(memory) = Flavour::Minor.memory(test, PAGES) else { return };
    let (reading, is_reading) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    let may_go = Mutex::new(may_go);
    let slow = move |_: u64, page: &mut [u8]| {
        reading.send(()).unwrap();
        may_go.lock().unwrap().recv().unwrap();
        page.fill(99);
        Ok(PageData::Data)
    };
    let (one, other) = (Pager::new().unwrap(), Pager::new().unwrap());
    let descriptor = add(&one, uffd(FeatureFlags::empty()), Flavour::Minor.region(&memory, slow));
    let reader = Reader::of(memory.at(1).addr());
    is_reading.recv().unwrap();
    let detached = one.remove(crate::pager::DescriptorId(descriptor.id)).unwrap();
    let region = Flavour::Minor.region(&memory, Source::of(&memory)).missing(detached.missing());
    add(&other, detached.uffd, region);
    assert_eq!(reader.wait(), content(1));
    write(&memory, 1, 7);
    go.send(()).unwrap();
    wait_until(|| one.statistics().dropped == 1);
    assert_eq!(read(memory.at(1).addr()), Seen::Byte(7));
}

#[test]
fn load_for_an_ended_child_does_not_reach_the_file() {
    require!();
    let test = test_name!();
    child::run_well(test, || {
        if !has_features(test, FeatureFlags::EVENT_FORK) {
            return;
        }
        let Some(memory) = Flavour::Minor.memory(test, PAGES) else { return };
        let (one, other) = (Pager::new().unwrap(), Pager::new().unwrap());
        let region = Flavour::Minor.region(&memory, Source::of(&memory));
        let descriptor = add(&one, uffd(FeatureFlags::EVENT_FORK), region);
        let stop = Stop::at(Point::BeforeFill, 0..usize::MAX);
        let child = child::fork(|| assert_eq!(memory.read(1), 2));
        stop.reached();
        child.kill();
        child.wait();
        // Another pager serves the parent, and the parent writes.
        let detached = one.remove(crate::pager::DescriptorId(descriptor.id)).unwrap();
        let region = Flavour::Minor.region(&memory, Source::of(&memory)).missing(detached.missing());
        add(&other, detached.uffd, region);
        assert_eq!(read(memory.at(1).addr()), content(1));
        write(&memory, 1, 7);
        stop.go();
        wait_until(|| one.descriptors().is_empty());
        one.join();
        drop(one);
        assert_eq!(read(memory.at(1).addr()), Seen::Byte(7));
    });
}

#[test]
fn of_what_is_unmapped_nothing_is_kept() {
    require!();
    let test = test_name!();
    if !has_features(test, FeatureFlags::EVENT_UNMAP) {
        return;
    }
    let memory = Flavour::Anonymous.memory(test, PAGES).unwrap();
    let pager = Pager::new().unwrap();
    let region = Flavour::Anonymous.region(&memory, Source::of(&memory));
    let descriptor = add(&pager, uffd(FeatureFlags::EVENT_UNMAP), region);
    let region = Arc::clone(&descriptor.segments(0, None)[0].region);
    for (page, parts) in [(1, 2), (3, 3), (0, 2), (2, 1), (4, 1)] {
        memory.unmap(page, 1);
        // The parts that are left, what frees it, and this one.
        wait_until(|| Arc::strong_count(&region) == parts + 2);
    }
}

#[test]
fn a_descriptor_is_removed_once_others_have_let_go_of_it() {
    require!();
    let test = test_name!();
    let memory = Flavour::Anonymous.memory(test, PAGES).unwrap();
    let pager = Pager::new().unwrap();
    let region = Flavour::Anonymous.region(&memory, Source::of(&memory));
    let descriptor = add(&pager, uffd(FeatureFlags::empty()), region);
    let still = descriptor.lock_shard(0).as_ref().map(|serving| Arc::clone(&serving.uffd));
    thread::scope(|scope| {
        let removing = scope.spawn(|| pager.remove(crate::pager::DescriptorId(descriptor.id)));
        pager.join();
        for _ in 0..10_000 {
            assert!(!removing.is_finished());
            thread::yield_now();
        }
        drop(still);
        assert_eq!(removing.join().unwrap().unwrap().missing().len(), 1);
    });
}

#[test]
fn unpollable_descriptor_is_given_back_while_looked_at() {
    require!();
    let pager = Pager::new().unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        // It is in the table for a moment, where statistics find it.
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::SeqCst) {
                drop(pager.statistics());
            }
        });
        for _ in 0..200 {
            // Files are always ready, and can't be waited for.
            let file = std::fs::File::open("/proc/self/exe").unwrap();
            // SAFETY: nothing is served.
            let refused =
                unsafe { pager.add_own(Uffd::from(std::os::fd::OwnedFd::from(file)), []) }.unwrap_err();
            assert!(matches!(&refused.error, crate::pager::Error::System(_)), "{refused:?}");
        }
        done.store(true, std::sync::atomic::Ordering::SeqCst);
    });
    assert_eq!(pager.descriptors(), []);
}

#[test]
fn another_pager_goes_on_where_one_has_stopped() {
    require!();
    let test = test_name!();
    for flavour in [Flavour::Anonymous, Flavour::Minor] {
        let Some(memory) = flavour.memory(test, PAGES) else { continue };
        let source = Source::of(&memory);
        let one = Pager::new().unwrap();
        let descriptor = add(&one, uffd(FeatureFlags::EVENT_REMOVE), flavour.region(&memory, source.clone()));
        write(&memory, 0, 7);
        remove(&memory, 1);
        assert_eq!(read(memory.at(2).addr()), content(2));
        let detached = one.remove(crate::pager::DescriptorId(descriptor.id)).unwrap();
        let other = Pager::new().unwrap();
        let missing = detached.missing();
        let region = flavour.region(&memory, source.clone()).missing(missing.clone());
        let descriptor = add(&other, detached.uffd, region);
        let region = descriptor.segments(0, None)[0].region.id;
        let told = other.missing(crate::pager::RegionId(region)).unwrap();
        assert!(
            told.iter().map(|part| (part.address, part.len, part.offset)).eq(missing.iter().map(|part| (
                part.address,
                part.len,
                part.offset
            )))
        );
        if flavour == Flavour::Minor {
            // Takes only the mapping: the page is there all the same.
            remove(&memory, 0);
        }
        other.finish(|_| {}).unwrap();
        let seen: Vec<_> = (0..PAGES).map(|page| read(memory.at(page).addr())).collect();
        let right = [Seen::Byte(7), Seen::ZERO].into_iter().chain((2..PAGES).map(content));
        assert!(seen.iter().copied().eq(right), "{flavour:?}: {seen:?}");
        let reads: Vec<_> = (0..PAGES).map(|page| source.reads(page)).collect();
        assert!(reads.iter().enumerate().all(|(page, reads)| (*reads == 1) == (page != 1)), "{reads:?}");
    }
}

#[test]
fn deferred_work_of_an_ending_region_lets_events_be_read() {
    require!();
    let test = test_name!();
    child::run_well(test, || {
        tell_signals();
        if !has_features(test, FeatureFlags::POISON | FeatureFlags::EVENT_REMOVE) {
            return;
        }
        let memory = Arc::new(Flavour::Anonymous.memory(test, PAGES).unwrap());
        let pager = Pager::builder().max_threads(1).build().unwrap();
        let region = Flavour::Anonymous.region(&memory, Source::of(&memory));
        let descriptor = add(&pager, uffd(FeatureFlags::EVENT_REMOVE), region);
        let region = Arc::clone(&descriptor.segments(0, None)[0].region);
        let (reached, is_reached) = mpsc::channel();
        let (go, may_go) = mpsc::channel();
        let may_go = Mutex::new(may_go);
        let _armed = at(Point::BeforeFill, memory.at(1).addr()..memory.at(2).addr(), move |_| {
            // Only the first two times a thread waits there.
            if reached.send(()).is_ok() {
                let _nobody = may_go.lock().unwrap().recv();
            }
        });
        // An event that waits while the pager's only thread is elsewhere.
        let start_removing = |page| {
            let memory = Arc::clone(&memory);
            let (removing, id) = start(move || remove(&memory, page));
            wait_for_progress(&removing, id);
            assert!(!removing.is_finished());
            removing
        };
        let reader = Reader::of(memory.at(1).addr());
        is_reached.recv().unwrap();
        let first = start_removing(4);
        let id = crate::pager::RegionId(region.id);
        let second = thread::scope(|scope| {
            let ending = scope.spawn(|| pager.remove_region(id));
            wait_until(|| region.is_ending());
            go.send(()).unwrap();
            is_reached.recv().unwrap();
            let second = start_removing(5);
            drop(is_reached);
            go.send(()).unwrap();
            ending.join().unwrap().unwrap();
            second
        });
        first.join().unwrap();
        second.join().unwrap();
        let seen = reader.wait();
        assert!(seen == content(1) || seen == Seen::POISON, "{seen:?}");
        assert_eq!(read(memory.at(2).addr()), Seen::POISON);
        assert_eq!(read(memory.at(4).addr()), Seen::ZERO);
    });
}

#[test]
fn failed_page_is_poisoned_in_every_mapping() {
    require!();
    let test = test_name!();
    child::run_well(test, || {
        tell_signals();
        let events = FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP;
        if !has_features(test, events | FeatureFlags::POISON) {
            return;
        }
        let Some(memory) = Flavour::Minor.memory(test, PAGES) else { return };
        let failing = |_: u64, _: &mut [u8]| Err(std::io::ErrorKind::TimedOut.into());
        let pager = Pager::new().unwrap();
        add(&pager, uffd(events), Flavour::Minor.region(&memory, failing).fault_around(FaultAround::Page));
        let to = room(&memory);
        let moved = memory.try_move(0, PAGES, to, libc::MREMAP_DONTUNMAP);
        if !has(test, "mremap of a file that is left behind", moved.is_ok()) {
            return;
        }
        drop(pager);
        let there = (0..PAGES).map(|page| to.addr() + page * memory.page());
        let seen: Vec<_> = (0..PAGES).map(|page| memory.at(page).addr()).chain(there).map(read).collect();
        assert!(seen.iter().all(|seen| *seen == Seen::POISON), "{seen:?}");
        clear(to.addr(), memory.len());
    });
}

#[cfg(feature = "tracking")]
#[test]
fn region_that_is_given_back_while_it_is_lent_is_not_lent() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let memory = Memory::anonymous(PAGES);
    let pager = Arc::new(Pager::new().unwrap());
    let region = Flavour::Anonymous.region(&memory, Source::of(&memory));
    // SAFETY: bytes are good whatever they are, and only raw pointers and atomics lead to them.
    let added = unsafe { pager.add_own(uffd(FeatureFlags::PAGEFAULT_FLAG_WP), [region]) }.unwrap().regions[0];
    let start = memory.start().addr();
    let finishing = Arc::clone(&pager);
    let armed =
        at(Point::BeforeLend, start..start + 1, move |_| finishing.finish_region(added, |_| {}).unwrap());
    let lent = pager.lend(added);
    assert!(matches!(lent, Err(crate::pager::Error::NotServed)), "{lent:?}");
    drop(armed);
    let other = uffd(FeatureFlags::PAGEFAULT_FLAG_WP);
    // Nothing has the memory.
    other.register(memory.start(), memory.len()).unwrap();
}
