//! Images that are loaded once for all regions made of them.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use memmap2::{MmapMut, MmapOptions};
use userfaultfd::pager::{
    BytesSource, Error, FaultAround, PageData, PageSource, Pager, Region, RetryPolicy, SharedImage,
    ZeroSource,
};
use userfaultfd::{FeatureFlags, RegisterMode, Uffd, UffdBuilder};

use crate::support::gate::Gate;
use crate::support::{child, maps, page, require, test_name};

/// A source of pages with their numbers, every fifth zeros, that counts the reads of each.
#[derive(Clone)]
struct Counted {
    reads: Arc<Vec<AtomicUsize>>,
    fails: Arc<AtomicBool>,
    /// Whether it knows its zeros without a read.
    knows: bool,
}

fn is_zero(number: usize) -> bool {
    number % 5 == 4
}

fn byte(number: usize) -> u8 {
    if is_zero(number) { 0 } else { number as u8 | 1 }
}

impl Counted {
    fn new(pages: usize) -> Self {
        let reads = Arc::new((0..pages).map(|_| AtomicUsize::new(0)).collect());
        Self { reads, fails: Arc::default(), knows: true }
    }

    /// How often each page was read.
    fn reads(&self) -> Vec<usize> {
        self.reads.iter().map(|reads| reads.load(Ordering::SeqCst)).collect()
    }
}

impl PageSource for Counted {
    fn read(&self, offset: u64, pages: &mut [u8]) -> io::Result<PageData> {
        if self.fails.load(Ordering::SeqCst) {
            return Err(ErrorKind::TimedOut.into());
        }
        let first = offset as usize / page();
        for (number, bytes) in (first..self.reads.len()).zip(pages.chunks_mut(page())) {
            self.reads[number].fetch_add(1, Ordering::SeqCst);
            bytes.fill(byte(number));
        }
        Ok(PageData::Data)
    }

    fn len(&self) -> Option<u64> {
        Some((self.reads.len() * page()) as u64)
    }

    fn zeros(&self, offset: u64) -> u64 {
        if self.knows && is_zero(offset as usize / page()) { page() as u64 } else { 0 }
    }
}

fn uffd() -> Uffd {
    UffdBuilder::new().close_on_exec(true).require_features(FeatureFlags::MINOR_SHMEM).create().unwrap()
}

/// A guest's mapping of an image.
fn map(image: &SharedImage) -> MmapMut {
    // SAFETY: the file can't be written, and keeps its length.
    unsafe { MmapOptions::new().len(image.mapped_len()).map_copy(image.file()) }.unwrap()
}

fn region(guest: &MmapMut, image: &Arc<SharedImage>) -> Region {
    Region::image(guest.as_ptr().addr(), guest.len(), image)
}

fn serve(pager: &Pager, region: Region) {
    // SAFETY: references to the mapping are of one byte at a time.
    unsafe { pager.add_own(uffd(), [region]) }.unwrap();
}

/// Reads the first byte of a page.
fn at(guest: &MmapMut, number: usize) -> u8 {
    guest[number * page()]
}

/// The bytes of a mapping that are no other's, and those that are in memory.
fn anonymous_and_resident(guest: &MmapMut) -> (usize, usize) {
    let start = guest.as_ptr().addr();
    let [anonymous, resident] = ["Anonymous", "Rss"].map(|field| maps::sum_of(start..start + 1, field));
    (anonymous, resident)
}

/// Sixteen guests that read the same take the memory of one.
#[test]
fn guests_that_read_take_no_memory_of_their_own() {
    require!(FeatureFlags::MINOR_SHMEM);
    const PAGES: usize = 100;
    let image = SharedImage::new(Counted::new(PAGES)).unwrap();
    let data = (0..PAGES).filter(|number| !is_zero(*number)).count() * page();
    let pager = Pager::new().unwrap();
    let mut guests: Vec<MmapMut> = (0..16).map(|_| map(&image)).collect();
    for guest in &guests {
        serve(&pager, region(guest, &image).fault_around(FaultAround::Page));
        (0..PAGES).for_each(|number| assert_eq!(at(guest, number), byte(number)));
        assert_eq!(anonymous_and_resident(guest), (0, data));
    }
    assert_eq!(image.file().metadata().unwrap().blocks() * 512, data as u64);
    guests[3][5 * page()] = 1;
    assert_eq!(anonymous_and_resident(&guests[3]).0, page());
}

#[test]
fn page_is_loaded_once_for_all_guests() {
    require!(FeatureFlags::MINOR_SHMEM);
    const PAGES: usize = 100;
    for around in [FaultAround::Page, FaultAround::Block(8 * page()), FaultAround::Adaptive { most: 1 << 20 }]
    {
        let source = Counted::new(PAGES);
        let image = SharedImage::new(source.clone()).unwrap();
        // Two pagers, as two kinds of guests would have.
        let pagers = [(); 2].map(|()| Pager::builder().threads(2).build().unwrap());
        let mut guests: Vec<MmapMut> = (0..4).map(|_| map(&image)).collect();
        for (number, guest) in guests.iter().enumerate() {
            serve(&pagers[number % 2], region(guest, &image).fault_around(around));
        }
        for guest in &mut guests {
            for number in (0..PAGES).rev() {
                assert_eq!(at(guest, number), byte(number));
            }
            // A copy of its own.
            guest[7 * page()] = 99;
            guest[4 * page() + 1] = 98;
        }
        // A page of zeros is read with its neighbours, if at all.
        let reads = source.reads();
        let least: Vec<_> = (0..PAGES).map(|number| usize::from(!is_zero(number))).collect();
        assert!(reads.iter().zip(&least).all(|(reads, least)| (*least..=1).contains(reads)), "{reads:?}");
        let data = reads.iter().sum::<usize>() * page();
        assert_eq!(image.loaded(), (data, PAGES * page() - data));
        if around == FaultAround::Page {
            assert_eq!(reads, least);
            assert_eq!(image.file().metadata().unwrap().blocks() * 512, data as u64);
        }
        // Written copies are no one else's.
        let late = map(&image);
        serve(&pagers[0], region(&late, &image));
        assert_eq!((at(&late, 7), late[4 * page() + 1]), (byte(7), 0));
        drop(pagers);
    }
}

#[test]
fn guests_that_start_at_once_load_each_page_once() {
    require!(FeatureFlags::MINOR_SHMEM);
    const PAGES: usize = 64;
    const GUESTS: usize = 8;
    let source = Counted { knows: false, ..Counted::new(PAGES) };
    let image = SharedImage::new(source.clone()).unwrap();
    let pager = Pager::builder().threads(4).build().unwrap();
    let guests: Vec<MmapMut> = (0..GUESTS).map(|_| map(&image)).collect();
    for guest in &guests {
        serve(&pager, region(guest, &image).block(4 * page()));
    }
    let barrier = Barrier::new(GUESTS);
    std::thread::scope(|scope| {
        for (seed, guest) in guests.iter().enumerate() {
            let barrier = &barrier;
            scope.spawn(move || {
                barrier.wait();
                for number in 0..PAGES {
                    // Each in another order, two of them in the same.
                    let number = (number * (1 + seed / 2 * 2)) % PAGES;
                    assert_eq!(at(guest, number), byte(number));
                }
            });
        }
    });
    assert_eq!(source.reads(), [1; PAGES]);
}

/// The guests are processes, served by a pager outside of them.
#[test]
fn guests_in_other_processes_share_what_is_loaded() {
    require!(FeatureFlags::MINOR_SHMEM);
    child::run_well(test_name!(), || {
        const PAGES: usize = 40;
        let source = Counted::new(PAGES);
        let image = SharedImage::new(source.clone()).unwrap();
        // Forked before there are threads.
        let mut guests = [(); 3].map(|()| {
            let (socket, there) = UnixStream::pair().unwrap();
            let mut guest = map(&image);
            let address = guest.as_ptr().addr();
            let process = child::fork(|| {
                let own = uffd();
                let modes = RegisterMode::MISSING | RegisterMode::MINOR;
                own.register_with_mode(guest.as_mut_ptr().cast(), guest.len(), modes).unwrap();
                child::send_fd(&there, own.as_fd());
                drop(own);
                let mut byte = [0];
                while (&there).read(&mut byte).unwrap() == 1 {
                    let number = byte[0] as usize;
                    byte[0] = at(&guest, number);
                    guest[number * page() + 1] = 55;
                    (&there).write_all(&byte).unwrap();
                }
            });
            (process, Uffd::from(child::receive_fd(&socket)), socket, address)
        });
        let pager = Pager::new().unwrap();
        for (_, descriptor, _, address) in &guests {
            let region = Region::image(*address, image.mapped_len(), &image);
            let region = region.fault_around(FaultAround::Page);
            pager.add(descriptor.try_clone().unwrap(), [region]).unwrap();
        }
        for (.., socket, _) in &mut guests {
            for number in 0..PAGES {
                socket.write_all(&[number as u8]).unwrap();
                let mut found = [0];
                socket.read_exact(&mut found).unwrap();
                assert_eq!(found, [byte(number)]);
            }
        }
        let expected: Vec<_> = (0..PAGES).map(|number| usize::from(!is_zero(number))).collect();
        assert_eq!(source.reads(), expected);
        // Nothing that a guest has written is in the image.
        let mut bytes = vec![0; image.mapped_len()];
        image.file().read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.chunks(page()).enumerate().all(|(number, page)| page[1] == byte(number)));
        for (process, ..) in guests {
            process.kill();
        }
    });
}

#[test]
fn image_cannot_be_written_or_mapped_to_write() {
    require!(FeatureFlags::MINOR_SHMEM);
    let image = SharedImage::new(BytesSource::new(vec![3; 2 * page() + 1])).unwrap();
    assert_eq!((image.mapped_len(), image.len()), (3 * page(), Some(2 * page() as u64 + 1)));
    let file = image.file();
    for refused in [
        file.write_at(&[1], 0).map(drop),
        file.set_len(0),
        file.set_len(1 << 20),
        // SAFETY: it isn't made.
        unsafe { MmapOptions::new().map_mut(file) }.map(drop),
    ] {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
    let guest = map(&image);
    let pager = Pager::new().unwrap();
    serve(&pager, region(&guest, &image));
    // Beyond the source there are zeros.
    assert_eq!((guest[0], guest[2 * page()], guest[2 * page() + 1]), (3, 3, 0));
    // A shared mapping can't be registered.
    // SAFETY: nobody writes to it while it is mapped.
    let shared = unsafe { MmapOptions::new().len(image.mapped_len()).map(file) }.unwrap();
    let region = Region::image(shared.as_ptr().addr(), shared.len(), &image);
    // SAFETY: nothing looks at it.
    let refused = unsafe { pager.add_own(uffd(), [region]) }.unwrap_err();
    assert!(matches!(refused.error, Error::Register { .. }), "{:?}", refused.error);
    // Memory of other kinds, and descriptors without these faults.
    let other = MmapMut::map_anon(3 * page()).unwrap();
    let of = |memory: &MmapMut| Region::image(memory.as_ptr().addr(), memory.len(), &image);
    // SAFETY: likewise.
    let refused = unsafe { pager.add_own(uffd(), [of(&other)]) }.unwrap_err();
    let is_refused = matches!(refused.error, Error::Register { .. } | Error::MissingIoctls { .. });
    assert!(is_refused, "{:?}", refused.error);
    for region in [
        of(&guest).offset(1),
        of(&guest).minor(file.try_clone().unwrap(), 0),
        of(&guest).offset(page() as u64),
    ] {
        // SAFETY: likewise.
        let refused = unsafe { pager.add_own(uffd(), [region]) }.unwrap_err();
        let is_refused = matches!(refused.error, Error::FileRange { .. } | Error::BeyondSource { .. });
        assert!(is_refused, "{:?}", refused.error);
    }
    let kind = |image: io::Result<_>| image.map(drop).unwrap_err().kind();
    assert_eq!(kind(SharedImage::new(ZeroSource)), ErrorKind::InvalidInput);
    assert_eq!(kind(SharedImage::new(BytesSource::new(Vec::new()))), ErrorKind::InvalidInput);
}

#[test]
fn failed_load_is_tried_anew_and_leaves_no_page() {
    require!(FeatureFlags::MINOR_SHMEM);
    let source = Counted::new(8);
    let image = SharedImage::new(source.clone()).unwrap();
    let guests = [map(&image), map(&image)];
    let pager = Pager::builder().retry(RetryPolicy { attempts: 1, delay: Duration::ZERO }).build().unwrap();
    serve(&pager, region(&guests[0], &image).fault_around(FaultAround::Page));
    serve(&pager, region(&guests[1], &image).fault_around(FaultAround::Page));
    source.fails.store(true, Ordering::SeqCst);
    // Without a fault, which would be the end of this thread.
    let mut page_of = vec![0xee; page()];
    assert_eq!(image.read(0, &mut page_of).unwrap_err().kind(), ErrorKind::TimedOut);
    assert_eq!(image.loaded(), (0, 0));
    source.fails.store(false, Ordering::SeqCst);
    assert_eq!([at(&guests[0], 0), at(&guests[1], 0)], [byte(0); 2]);
    assert_eq!(image.read(0, &mut page_of).unwrap(), PageData::Data);
    assert!(page_of.iter().all(|found| *found == byte(0)));
    assert_eq!(source.reads()[0], 1);
    // A panic, too.
    let panics = |_: u64, _: &mut [u8]| -> io::Result<PageData> { panic!("on purpose") };
    let mut bounded = userfaultfd::pager::ConcatSource::new();
    bounded.push_part(panics, 0..page() as u64).unwrap();
    let image = SharedImage::new(bounded).unwrap();
    for _ in 0..2 {
        let read = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| image.read(0, &mut page_of)));
        assert!(read.is_err(), "it doesn't wait for the load that panicked");
    }
}

#[test]
fn dropped_pages_show_the_image_again() {
    require!(FeatureFlags::MINOR_SHMEM | FeatureFlags::EVENT_REMOVE);
    for features in [FeatureFlags::MINOR_SHMEM, FeatureFlags::MINOR_SHMEM | FeatureFlags::EVENT_REMOVE] {
        let source = Counted::new(30);
        let image = SharedImage::new(source.clone()).unwrap();
        let mut guest = map(&image);
        let uffd = UffdBuilder::new().close_on_exec(true).require_features(features).create().unwrap();
        let pager = Pager::new().unwrap();
        let region = region(&guest, &image).fault_around(FaultAround::Page);
        // SAFETY: references to the mapping are of one byte at a time.
        unsafe { pager.add_own(uffd, [region]) }.unwrap();
        for round in 0..3 {
            for number in 0..20 {
                assert_eq!(at(&guest, number), byte(number), "{round}");
                guest[number * page()] = 200;
            }
            // Also of pages that nobody has touched.
            // SAFETY: the range is that of the mapping, whose bytes are good whatever they are.
            let dropped =
                unsafe { libc::madvise(guest.as_mut_ptr().cast(), guest.len(), libc::MADV_DONTNEED) };
            assert_eq!(dropped, 0);
        }
        (0..30).for_each(|number| assert_eq!(at(&guest, number), byte(number)));
        let expected: Vec<_> = (0..30).map(|number| usize::from(!is_zero(number))).collect();
        assert_eq!(source.reads(), expected);
    }
}

#[test]
fn all_of_an_image_is_filled_in_the_background() {
    require!(FeatureFlags::MINOR_SHMEM);
    let source = Counted::new(200);
    let image = SharedImage::new(source.clone()).unwrap();
    let guests = [map(&image), map(&image)];
    let pager = Pager::new().unwrap();
    for guest in &guests {
        serve(&pager, region(guest, &image));
    }
    pager.finish(|_| {}).unwrap();
    for guest in &guests {
        (0..200).for_each(|number| assert_eq!(at(guest, number), byte(number)));
    }
    assert!(source.reads().iter().all(|reads| *reads <= 1));
}

/// A page of a source that holds up each thread that reads it.
struct Held(Gate);

impl PageSource for Held {
    fn read(&self, _: u64, bytes: &mut [u8]) -> io::Result<PageData> {
        self.0.pass();
        bytes.fill(7);
        Ok(PageData::Data)
    }

    fn len(&self) -> Option<u64> {
        Some(page() as u64)
    }
}

/// A thread loads a page when the process forks: in the child there is no such thread.
#[test]
fn load_in_a_forked_child_is_an_error() {
    require!();
    child::run_well(test_name!(), || {
        let gate = Gate::default();
        let image = SharedImage::new(Held(gate.clone())).unwrap();
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| image.read(0, &mut vec![0; page()]));
            gate.wait_for_arrival();
            child::fork(|| {
                let error = image.read(0, &mut vec![0; page()]).unwrap_err();
                assert!(error.to_string().contains("parent process"), "{error}");
            })
            .succeed();
            gate.open();
            assert_eq!(reading.join().unwrap().unwrap(), PageData::Data);
        });
    });
}
