//! Guest memory of the crate `vm-memory`: served, tracked, saved, and its addresses translated.

#[path = "support/mod.rs"]
#[expect(dead_code, reason = "it has what the tests of the kernel need")]
mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use userfaultfd::guest::vm_memory::{
    Bytes, FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};
use userfaultfd::guest::{ClientAddress, GuestAddress, GuestLayout, GuestPart, LayoutError, Placement};
use userfaultfd::pager::{Error, PageData, PageSource, Pager};
use userfaultfd::snapshot::{Content, Options, Sink};
use userfaultfd::{DirtyTracker, FeatureFlags, Uffd};

use self::support::mapping::{memfd, memfd_of_bytes};
use self::support::maps::mapping_of;
use self::support::proc::wait_until;
use self::support::random::Random;
use self::support::{child, hugetlb, page, require, test_name, uffd};

type Memory = GuestMemoryMmap<()>;

/// Where the second part of the tests' memory begins for the guest, behind a hole.
const HIGH: u64 = 1 << 32;

/// The pages of each part.
const PAGES: usize = 4;

fn page64() -> u64 {
    page() as u64
}

/// A source of which each page holds its number, but not 0.
fn numbers(offset: u64, buffer: &mut [u8]) -> std::io::Result<PageData> {
    for (at, part) in buffer.chunks_mut(page()).enumerate() {
        part.fill(number(offset + (at * page()) as u64));
    }
    Ok(PageData::Data)
}

fn number(offset: u64) -> u8 {
    (offset / page64() % 251) as u8 + 1
}

/// Two parts of anonymous memory.
fn anonymous() -> Memory {
    let len = PAGES * page();
    Memory::from_ranges(&[(GuestAddress(0), len), (GuestAddress(HIGH), len)]).unwrap()
}

/// Two parts that lie in one file in the opposite order.
fn of_file(file: &OwnedFd) -> Memory {
    let len = PAGES * page();
    let at = |start| {
        let file = File::from(file.try_clone().unwrap());
        Some(FileOffset::new(file, start))
    };
    let parts = [(GuestAddress(0), len, at(len as u64)), (GuestAddress(HIGH), len, at(0))];
    Memory::from_ranges_with_files(parts).unwrap()
}

fn byte(memory: &Memory, address: u64) -> u8 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

/// What both parts hold in each of their pages, if the first one's content begins at `low`, and the second one's at `high`.
fn check(memory: &Memory, low: u64, high: u64) {
    for at in (0..PAGES as u64).map(|number| number * page64()) {
        assert_eq!((byte(memory, at), byte(memory, HIGH + at)), (number(low + at), number(high + at)));
    }
}

#[test]
fn content_lies_where_the_placement_says() {
    require!();
    let len = (PAGES * page()) as u64;
    let file = memfd(0, 2 * PAGES);
    for (memory, placement, low, high) in [
        (anonymous(), Placement::GuestAddress, 0, HIGH),
        (anonymous(), Placement::Consecutive, 0, len),
        (of_file(&file), Placement::FileOffset, len, 0),
    ] {
        let pager = Pager::new().unwrap();
        let added = pager.add_guest_memory(uffd(FeatureFlags::empty()), &memory, placement, numbers).unwrap();
        assert_eq!(added.regions.len(), 2);
        check(&memory, low, high);
        pager.finish(|_| {}).unwrap();
    }
}

#[test]
fn pages_of_shared_files_are_put_into_the_file() {
    require!(FeatureFlags::MINOR_SHMEM);
    let file = memfd(0, 2 * PAGES);
    let (memory, other) = (of_file(&file), of_file(&file));
    let (pager, uffd) = (Pager::new().unwrap(), uffd(FeatureFlags::MINOR_SHMEM));
    pager.add_guest_memory(uffd, &memory, Placement::Consecutive, numbers).unwrap();
    assert_eq!(byte(&memory, HIGH), number((PAGES * page()) as u64));
    // The other mapping isn't served: it shows the file.
    assert_eq!(byte(&other, HIGH), byte(&memory, HIGH));
    // A worker counts a page once it has woken its thread.
    wait_until(|| pager.statistics().continues > 0);
    assert_eq!(pager.statistics().fills, 0);
}

#[test]
fn huge_pages_are_served_by_their_size() {
    require!();
    let Some(_pages) = hugetlb::reserve(test_name!(), 2) else { return };
    let huge = hugetlb::page();
    let file = memfd_of_bytes(libc::MFD_HUGETLB, 2 * huge);
    let file = FileOffset::new(File::from(file), 0);
    let memory = Memory::from_ranges_with_files([(GuestAddress(0), 2 * huge, Some(file))]).unwrap();
    assert_eq!(GuestLayout::of(&memory).unwrap().parts()[0].page_size, huge);
    let pager = Pager::new().unwrap();
    let uffd = uffd(FeatureFlags::empty());
    pager.add_guest_memory(uffd, &memory, Placement::GuestAddress, numbers).unwrap();
    assert_eq!(byte(&memory, huge as u64 + page64()), number(huge as u64 + page64()));
    pager.finish(|_| {}).unwrap();
}

#[test]
fn memory_stays_mapped_while_it_is_served() {
    require!();
    child::run_well(test_name!(), || {
        let memory = anonymous();
        let start = memory.iter().next().unwrap().as_ptr().addr();
        let pager = Pager::new().unwrap();
        let uffd = uffd(FeatureFlags::empty());
        let added = pager.add_guest_memory(uffd, &memory, Placement::Consecutive, numbers).unwrap();
        drop(memory);
        assert!(mapping_of(start).is_some());
        assert_eq!(pager.missing(added.regions[0]).unwrap()[0].address, start);
        pager.finish(|_| {}).unwrap();
        wait_until(|| mapping_of(start).is_none());
    });
}

#[test]
fn memory_without_a_file_has_no_place_by_file_offset() {
    require!();
    let (memory, pager) = (anonymous(), Pager::new().unwrap());
    let refused = pager
        .add_guest_memory(uffd(FeatureFlags::empty()), &memory, Placement::FileOffset, numbers)
        .unwrap_err();
    let no_file =
        |error: &Error| matches!(error, Error::GuestMemory(LayoutError::NoFile { guest: GuestAddress(0) }));
    assert!(no_file(&refused.error), "{refused}");
    // The descriptor comes back, and nothing is registered.
    pager.add_guest_memory(refused.uffd, &memory, Placement::Consecutive, numbers).unwrap();
    let short = vec![1; page()];
    let refused = pager.add_guest_memory(
        uffd(FeatureFlags::empty()),
        &anonymous(),
        Placement::GuestAddress,
        userfaultfd::pager::BytesSource::new(short),
    );
    assert!(matches!(refused.unwrap_err().error, Error::BeyondSource { .. }));
}

/// Parts of random places, which don't overlap.
fn random_layout(random: &mut Random) -> Vec<GuestPart> {
    let (mut guest, mut client) = (0, 1 << 30);
    let mut parts = Vec::new();
    for _ in 0..random.below(6) {
        guest += random.below(3) as u64;
        client += random.below(3);
        let len = 1 + random.below(4);
        parts.push((guest, client, len));
        guest += len as u64;
        client += len;
    }
    // The client has them in another order.
    let mut clients: Vec<_> = parts.iter().map(|part| (part.1, part.2)).collect();
    clients.reverse();
    let mut next = 1 << 30;
    let mut placed = Vec::new();
    for (gap, len) in clients.iter().map(|(at, len)| (at % 3, *len)) {
        next += gap;
        placed.push(next);
        next += len;
    }
    placed.reverse();
    let part = |((guest, _, len), client): (&(u64, usize, usize), usize)| {
        GuestPart::new(GuestAddress(*guest), ClientAddress(client), *len)
    };
    parts.iter().zip(placed).map(part).collect()
}

#[test]
fn addresses_are_translated_both_ways() {
    require!();
    let mut random = Random::new(18);
    for _ in 0..500 {
        let parts = random_layout(&mut random);
        let layout = GuestLayout::new(parts.clone()).unwrap();
        // A table of single addresses is the model.
        let all = || {
            parts
                .iter()
                .flat_map(|part| (0..part.len).map(|at| (part.guest.0 + at as u64, part.client.0 + at)))
        };
        for guest in 0..40 {
            let expected = all().find(|pair| pair.0 == guest).map(|pair| ClientAddress(pair.1));
            assert_eq!(layout.to_client(GuestAddress(guest)), expected, "{layout:?}");
        }
        for client in (1 << 30) - 1..(1 << 30) + 40 {
            let expected = all().find(|pair| pair.1 == client).map(|pair| GuestAddress(pair.0));
            assert_eq!(layout.to_guest(ClientAddress(client)), expected, "{layout:?}");
        }
        let range = random.below(40) as u64..random.below(40) as u64;
        let found: Vec<_> = layout
            .client_ranges(GuestAddress(range.start)..GuestAddress(range.end))
            .flat_map(|range| range.start.0..range.end.0)
            .collect();
        let mut expected: Vec<_> = all().filter(|pair| range.contains(&pair.0)).collect();
        expected.sort();
        assert_eq!(found, expected.iter().map(|pair| pair.1).collect::<Vec<_>>(), "{layout:?}");
        let range = (1 << 30) + range.start as usize..(1 << 30) + range.end as usize;
        let found: Vec<_> = layout
            .guest_ranges(ClientAddress::range(range.clone()))
            .flat_map(|range| range.start.0..range.end.0)
            .collect();
        let mut expected: Vec<_> = all().filter(|pair| range.contains(&pair.1)).collect();
        expected.sort_by_key(|pair| pair.1);
        assert_eq!(found, expected.iter().map(|pair| pair.0).collect::<Vec<_>>(), "{layout:?}");
    }
}

#[test]
fn layouts_that_overlap_or_have_no_end_are_refused() {
    require!();
    let part = |guest, client, len| GuestPart::new(GuestAddress(guest), ClientAddress(client), len);
    for (parts, shared) in [
        (vec![part(0, 0x1000, 0)], false),
        (vec![part(u64::MAX, 0x1000, 2)], false),
        (vec![part(0, usize::MAX, 2)], false),
        (vec![part(0, 0x1000, 0x1000), part(0xfff, 0x9000, 0x1000)], true),
        (vec![part(0, 0x1000, 0x1000), part(0x9000, 0x1fff, 0x1000)], true),
        (vec![part(0x9000, 0x1000, 0x1000), part(0, 0x1000, 0x1000)], true),
    ] {
        match GuestLayout::new(parts.clone()) {
            Err(LayoutError::Overlap { .. }) if shared => {}
            Err(LayoutError::Length { .. }) if !shared => {}
            other => panic!("{parts:?}: {other:?}"),
        }
    }
    assert!(GuestLayout::new([]).unwrap().parts().is_empty());
}

/// A backend of vhost-user, which has the guest's memory mapped, and touches what it is told by the guest's addresses.
#[test]
fn faults_of_another_client_are_served_by_guest_address() {
    require!();
    child::run_well(test_name!(), || {
        let (mut here, there) = UnixStream::pair().unwrap();
        let process = child::fork(|| {
            let memory = anonymous();
            let own = uffd(FeatureFlags::empty());
            // What the backend answers to the table of memory regions.
            for region in memory.iter() {
                own.register(region.as_ptr().cast(), region.size()).unwrap();
                (&there).write_all(&region.as_ptr().addr().to_ne_bytes()).unwrap();
            }
            child::send_fd(&there, own.as_fd());
            let mut address = [0; 8];
            while (&there).read(&mut address).unwrap() == 8 {
                (&there).write_all(&[byte(&memory, u64::from_ne_bytes(address))]).unwrap();
            }
        });
        let mut client = || {
            let mut address = [0; size_of::<usize>()];
            here.read_exact(&mut address).unwrap();
            ClientAddress(usize::from_ne_bytes(address))
        };
        let len = PAGES * page();
        let parts = [GuestAddress(0), GuestAddress(HIGH)].map(|guest| GuestPart::new(guest, client(), len));
        let layout = GuestLayout::new(parts).unwrap();
        let descriptor = Uffd::from(child::receive_fd(&here));
        let pager = Pager::new().unwrap();
        let regions = layout.regions(Placement::GuestAddress, numbers).unwrap();
        let added = pager.add(descriptor, regions).unwrap();
        for address in [HIGH, 0, HIGH + 3 * page64(), page64()] {
            here.write_all(&address.to_ne_bytes()).unwrap();
            let mut found = [0];
            here.read_exact(&mut found).unwrap();
            assert_eq!(found, [number(address)]);
        }
        // What is missing still, as the guest calls it.
        let missing = |region: usize| {
            let missing = pager.missing(added.regions[region]).unwrap();
            let ranges =
                missing.iter().map(|part| ClientAddress::range(part.address..part.address + part.len));
            ranges.flat_map(|range| layout.guest_ranges(range).collect::<Vec<_>>()).collect::<Vec<_>>()
        };
        let within = |ranges: &[Range<GuestAddress>], bounds: Range<u64>| {
            ranges.iter().all(|range| bounds.start <= range.start.0 && range.end.0 <= bounds.end)
        };
        assert!(within(&missing(0), 0..len as u64) && within(&missing(1), HIGH..HIGH + len as u64));
        process.kill();
    });
}

#[test]
fn trackers_report_what_the_guest_has_written() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let memory = anonymous();
    let layout = GuestLayout::of(&memory).unwrap();
    let mut tracker = DirtyTracker::new().unwrap();
    tracker.track_guest_memory(&memory).unwrap();
    memory.write_obj(1_u8, GuestAddress(page64())).unwrap();
    memory.write_obj(1_u8, GuestAddress(HIGH + 2 * page64())).unwrap();
    let written: Vec<_> = tracker.take().collect::<Result<_, _>>().unwrap();
    let mut written: Vec<_> =
        written.into_iter().flat_map(|range| layout.guest_ranges(ClientAddress::range(range))).collect();
    written.sort_by_key(|range| range.start);
    let one = |address| GuestAddress(address)..GuestAddress(address + page64());
    assert_eq!(written, [one(page64()), one(HIGH + 2 * page64())]);
}

#[test]
fn memory_that_is_tracked_in_part_is_tracked_by_no_other() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let memory = anonymous();
    let second = memory.iter().nth(1).unwrap().as_ptr().addr();
    let mut first = DirtyTracker::new().unwrap();
    first.track(second..second + PAGES * page()).unwrap();
    let mut other = DirtyTracker::new().unwrap();
    other.track_guest_memory(&memory).unwrap_err();
    assert!(other.tracked().is_empty(), "{:?}", other.tracked());
    drop(first);
    other.track_guest_memory(&memory).unwrap();
    assert_eq!(other.statistics().tracked, 2 * PAGES * page());
}

/// What a snapshot holds.
#[derive(Clone, Default)]
struct Image(Arc<Mutex<Vec<u8>>>);

impl Sink for Image {
    fn begin(&mut self, geometry: &userfaultfd::snapshot::Geometry) -> std::io::Result<()> {
        self.0.lock().unwrap().resize(geometry.len() as usize, 0);
        Ok(())
    }

    fn write(&mut self, offset: u64, content: Content<'_>) -> std::io::Result<()> {
        if let Content::Data(bytes) = content {
            self.0.lock().unwrap()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        Ok(())
    }

    fn finish(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn snapshot_has_the_memory_in_the_order_of_guest_addresses() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let memory = anonymous();
    for at in 0..PAGES as u64 {
        memory.write_obj(number(at * page64()), GuestAddress(at * page64())).unwrap();
        memory.write_obj(100 + at as u8, GuestAddress(HIGH + at * page64())).unwrap();
    }
    let image = Image::default();
    let snapshot = Options::new().guest_memory(&memory).begin(image.clone()).unwrap();
    snapshot.wait().unwrap();
    let image = image.0.lock().unwrap();
    let found: Vec<u8> = image.iter().step_by(page()).copied().collect();
    let low = (0..PAGES as u64).map(|at| number(at * page64()));
    let expected: Vec<u8> = low.chain((0..PAGES as u8).map(|at| 100 + at)).collect();
    assert_eq!(found, expected);
    // It is what `Placement::Consecutive` restores.
    let source = userfaultfd::pager::BytesSource::new(image.clone());
    assert_eq!(source.len(), Some(2 * (PAGES * page()) as u64));
    let (restored, pager) = (anonymous(), Pager::new().unwrap());
    let uffd = uffd(FeatureFlags::empty());
    pager.add_guest_memory(uffd, &restored, Placement::Consecutive, source).unwrap();
    assert_eq!((byte(&restored, page64()), byte(&restored, HIGH)), (number(page64()), 100));
}

#[test]
fn memory_of_a_callers_own_mapping_is_served() {
    require!();
    let (file, len) = (memfd(0, PAGES), PAGES * page());
    let mapping = MmapRegion::from_file(FileOffset::new(File::from(file), 0), len).unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(HIGH)).unwrap();
    let memory = Memory::from_regions(vec![region]).unwrap();
    let pager = Pager::new().unwrap();
    let uffd = uffd(FeatureFlags::empty());
    pager.add_guest_memory(uffd, &memory, Placement::FileOffset, numbers).unwrap();
    assert_eq!(byte(&memory, HIGH + page64()), number(page64()));
}
