//! Files of version 2: chunks that are compressed and checked, read from files and from other sources.

use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};

use userfaultfd::FeatureFlags;
use userfaultfd::snapshot::{
    Chain, ChunkOptions, Compression, Content, FormatError, Geometry, Options, Region, Sink, Snapshot,
    SnapshotReader, SnapshotWriter,
};
use userfaultfd::source::{BytesSource, PageData, PageSource};

use crate::file::{Folder, file, limit_memory};
use crate::image::{addresses, number};
use crate::support::memory::Memory;
use crate::support::random::Random;
use crate::support::{child, page, require, test_name};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

/// Each way to compress that is built.
pub(crate) fn compressions() -> Vec<Compression> {
    vec![
        Compression::None,
        #[cfg(feature = "lz4")]
        Compression::Lz4,
        #[cfg(feature = "zstd")]
        Compression::Zstd(1),
    ]
}

pub(crate) fn options(compression: Compression) -> ChunkOptions {
    ChunkOptions::new().size(64 << 10).compression(compression)
}

/// Memory of some pages: zeros, and bytes that compress well, a little, or not at all.
pub(crate) fn random_memory(random: &mut Random, pages: usize) -> Vec<u8> {
    let mut all = vec![0; pages * page()];
    let (mut kind, mut left) = (0, 0);
    for page in all.chunks_mut(page()) {
        if left == 0 {
            (kind, left) = (random.below(4), 1 + random.below(20));
        }
        left -= 1;
        match kind {
            0 => {}
            1 => page.fill(1 + random.next() as u8 % 255),
            2 => page.iter_mut().step_by(7).for_each(|byte| *byte = random.next() as u8 | 1),
            _ => page.iter_mut().for_each(|byte| *byte = random.next() as u8),
        }
    }
    all
}

/// A file of memory, its pages written in the order of a live snapshot: mostly one after the other.
fn write(random: &mut Random, memory: &[u8], options: &ChunkOptions) -> Vec<u8> {
    let mut writer = SnapshotWriter::new(Vec::new()).unwrap().chunks(options);
    writer.begin(&Geometry::new([Region::new(0..memory.len() as u64, page() as u64)])).unwrap();
    let mut pages: Vec<usize> = (0..memory.len() / page()).collect();
    for _ in 0..pages.len() / 8 {
        let (one, other) = (random.below(pages.len()), random.below(pages.len()));
        pages.swap(one, other);
    }
    for number in pages {
        let bytes = &memory[number * page()..][..page()];
        writer.write((number * page()) as u64, Content::Data(bytes)).unwrap();
    }
    writer.finish().unwrap();
    writer.into_inner()
}

/// A source that notes its reads.
#[derive(Clone, Default)]
pub(crate) struct Noting {
    bytes: Arc<Vec<u8>>,
    pub(crate) reads: Arc<Mutex<Vec<(u64, usize)>>>,
}

impl Noting {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: Arc::new(bytes), reads: Arc::default() }
    }

    /// The reads since the last call.
    pub(crate) fn take(&self) -> Vec<(u64, usize)> {
        std::mem::take(&mut *self.reads.lock().unwrap())
    }
}

impl PageSource for Noting {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.reads.lock().unwrap().push((offset, page.len()));
        page.copy_from_slice(&self.bytes[offset as usize..][..page.len()]);
        Ok(PageData::Data)
    }

    fn len(&self) -> Option<u64> {
        Some(self.bytes.len() as u64)
    }
}

/// Reads a part, or says why not.
fn read(reader: &SnapshotReader, offset: usize, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0xee; len];
    if reader.read(offset as u64, &mut bytes)? == PageData::Zero {
        bytes.fill(0);
    }
    Ok(bytes)
}

/// The file as a file, and as any source.
fn readers(bytes: &[u8]) -> [Result<SnapshotReader, FormatError>; 2] {
    [SnapshotReader::new(file(bytes)), SnapshotReader::from_source(BytesSource::new(bytes.to_vec()))]
}

#[test]
fn chunks_show_what_was_written() {
    require!();
    for (seed, compression) in (0..3).flat_map(|seed| compressions().into_iter().map(move |way| (seed, way)))
    {
        let mut random = Random::new(seed);
        let pages = 1 + random.below(60);
        let memory = random_memory(&mut random, pages);
        let size = (64 << 10) << random.below(4);
        let options = ChunkOptions::new().size(size).compression(compression);
        let bytes = write(&mut random, &memory, &options);
        let data = memory.chunks(page()).filter(|page| page.iter().any(|byte| *byte != 0)).count() * page();
        for reader in readers(&bytes).map(Result::unwrap) {
            let len = Some(memory.len() as u64);
            assert_eq!((reader.version(), reader.chunk_size(), reader.len()), (2, Some(size as u64), len));
            assert_eq!((reader.data_len(), reader.gone_len()), (data as u64, 0));
            assert!(reader.stored_len() <= reader.data_len() && reader.stored_len() < bytes.len() as u64);
            reader.verify().unwrap();
            assert!(read(&reader, 0, memory.len()).unwrap() == memory, "{seed} {compression:?}");
            for _ in 0..10 {
                let (first, count) = (random.below(pages), 1 + random.below(pages));
                let part = first * page()..(first + count).min(pages) * page();
                let found = read(&reader, part.start, part.len()).unwrap();
                assert!(found == memory[part.clone()], "{seed} {compression:?} {part:?}");
                // Part of a block, where pages are smaller.
                let half = part.start + page() / 2;
                assert!(read(&reader, half, page() / 2).unwrap() == memory[half..][..page() / 2]);
                let zeros = (reader.zeros(part.start as u64) as usize).min(memory.len() - part.start);
                assert!(memory[part.start..][..zeros].iter().all(|byte| *byte == 0));
                let is_zero = memory[part.start..][..page()].iter().all(|byte| *byte == 0);
                assert_eq!(zeros > 0, is_zero, "zeros are extents");
            }
        }
    }
}

#[test]
fn compression_makes_files_smaller() {
    require!();
    let memory: Vec<u8> = (0..32 * page()).map(|at| (at / 512) as u8 | 1).collect();
    for compression in compressions() {
        let bytes = write(&mut Random::new(1), &memory, &options(compression));
        let is_small = bytes.len() < memory.len() / 10;
        assert_eq!(is_small, compression != Compression::None, "{compression:?}: {}", bytes.len());
    }
}

/// Whatever byte is wrong, nothing wrong is ever read.
#[test]
fn every_damaged_byte_is_an_error_or_harmless() {
    require!();
    for compression in compressions() {
        let mut random = Random::new(7);
        // Two chunks with something, so that a damaged one leaves a good one.
        let memory = random_memory(&mut random, 24);
        let good = write(&mut random, &memory, &options(compression));
        let index = {
            let footer = &good[good.len() - 64..];
            u64::from_le_bytes(*footer[16..].first_chunk().unwrap()) as usize
        };
        let places = (0..64).chain((64..index).step_by(index / 30)).chain((index..good.len()).step_by(3));
        for at in places {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            for (is_file, reader) in [true, false].into_iter().zip(readers(&bad)) {
                let reader = match reader {
                    Ok(reader) => reader,
                    Err(error) => {
                        assert!(!(64..index).contains(&at), "{at} {error}");
                        assert!(is_file || at >= 64, "only the end is read of a source: {error}");
                        continue;
                    }
                };
                assert!(at < index, "{at}: the index is damaged");
                let is_header = at < 64;
                assert_eq!(reader.verify().is_ok(), is_header, "{at}");
                let wrong = memory.chunks(page()).enumerate().filter(|(number, page)| {
                    match read(&reader, number * page.len(), page.len()) {
                        Ok(found) => {
                            assert!(found == *page, "{at}: wrong bytes");
                            false
                        }
                        Err(error) => {
                            assert_eq!(error.kind(), ErrorKind::InvalidData);
                            true
                        }
                    }
                });
                assert_eq!(wrong.count() > 0, !is_header, "{at}");
            }
        }
    }
}

/// Parts overwritten, moved, cut out, and exchanged with those of another file.
#[test]
fn random_damage_never_shows_wrong_bytes() {
    require!();
    for seed in 0..80 {
        let mut random = Random::new(seed);
        let compressions = compressions();
        let compression = compressions[random.below(compressions.len())];
        let pages = 1 + random.below(40);
        let memory = random_memory(&mut random, pages);
        let good = write(&mut random, &memory, &options(compression));
        let memory_of_other = random_memory(&mut random, pages);
        let other = write(&mut random, &memory_of_other, &options(compression));
        let mut bad = good.clone();
        for _ in 0..=random.below(3) {
            let most = 1 << random.below(16);
            let len = 1 + random.below(most).min(bad.len() - 1);
            let (from, to) = (random.below(bad.len() - len + 1), random.below(bad.len() - len + 1));
            match random.below(4) {
                0 => bad[to..to + len].fill_with(|| random.next() as u8),
                1 => bad.copy_within(from..from + len, to),
                2 if bad.len() > len => drop(bad.drain(to..to + len)),
                _ => {
                    let len = len.min(other.len().saturating_sub(to));
                    bad[to..to + len].copy_from_slice(&other[to.min(other.len())..][..len]);
                }
            }
        }
        for reader in readers(&bad).into_iter().flatten() {
            let good = SnapshotReader::new(file(&good)).unwrap();
            // All of the other file is no damage.
            let expected = if reader.id() == good.id() { &memory } else { &memory_of_other };
            for number in 0..(reader.len().unwrap() as usize / page()) {
                if let Ok(found) = read(&reader, number * page(), page()) {
                    assert!(found == expected[number * page()..][..page()], "{seed}: wrong bytes");
                }
            }
        }
    }
}

#[test]
fn every_truncated_file_of_chunks_is_found() {
    require!();
    let mut random = Random::new(3);
    let memory = random_memory(&mut random, 20);
    let good = write(&mut random, &memory, &options(Compression::None));
    let step = good.len() / 50;
    for len in (0..130).chain((130..good.len() - 70).step_by(step)).chain(good.len() - 70..good.len()) {
        for error in readers(&good[..len]).map(Result::unwrap_err) {
            assert!(error.is_unfinished(), "{len} {error:?}");
        }
    }
    let longer = [&good[..], &[0]].concat();
    assert!(readers(&longer).iter().all(Result::is_err));
}

/// The parts of a file of version 2, by the documented format.
struct Parts {
    bytes: Vec<u8>,
    index: usize,
    regions: usize,
    extents: usize,
}

impl Parts {
    fn new(bytes: Vec<u8>) -> Self {
        let footer = bytes.len() - 64;
        let [index, regions, extents] =
            [16, 24, 32].map(|at| u64::from_le_bytes(*bytes[footer + at..].first_chunk().unwrap()) as usize);
        Self { bytes, index, regions, extents }
    }

    fn chunks(&self) -> usize {
        self.index + 120 + 24 * (self.regions + self.extents)
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_le_bytes(*self.bytes[at..].first_chunk().unwrap())
    }

    /// With a number in the index or the footer changed, and all checksums right again.
    fn with(&self, at: usize, number: u64) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        let footer = bytes.len() - 64;
        let copied = self.index + 32;
        let crc = crc32fast::hash(&bytes[copied..copied + 60]);
        bytes[copied + 60..copied + 64].copy_from_slice(&crc.to_le_bytes());
        let hash = blake3::hash(&bytes[self.index + 32..footer]);
        bytes[self.index..self.index + 32].copy_from_slice(hash.as_bytes());
        let crc = crc32fast::hash(&bytes[footer..footer + 60]);
        bytes[footer + 60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }
}

#[test]
fn format_of_chunks_is_as_documented() {
    require!();
    // A page, zeros, and two pages.
    let mut memory = vec![0; 4 * page()];
    memory[..page()].fill(5);
    memory[2 * page()..].fill(6);
    let parts = Parts::new(write(&mut Random::new(0), &memory, &options(Compression::None)));
    let (bytes, page) = (&parts.bytes, page() as u64);
    let u32_at = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().unwrap());
    assert_eq!((&bytes[..8], u32_at(8), 1 << u32_at(12)), (&b"UFFDSNAP"[..], 2, page));
    assert_eq!(u32_at(48), page.max(64 << 10).trailing_zeros());
    assert_eq!(&bytes[bytes.len() - 64..][..8], b"UFFDSEN2");
    let (index, footer) = (parts.index, bytes.len() - 64);
    assert_eq!(bytes[index..index + 32], *blake3::hash(&bytes[index + 32..footer]).as_bytes());
    assert_eq!(bytes[index + 32..index + 96], bytes[..64]);
    assert_eq!([96, 104, 112].map(|at| parts.u64_at(index + at)), [3 * page, 0, 0]);
    let region = index + 120;
    assert_eq!([0, 8, 16].map(|at| parts.u64_at(region + at)), [0, 4 * page, page]);
    let extent = |number: usize| [0, 8, 16].map(|at| parts.u64_at(region + 24 + 24 * number + at));
    assert_eq!([extent(0), extent(1), extent(2)], [[0, 1, page], [1, 1, 0], [2, 2, 2 * page]]);
    let mut content = memory.clone();
    drop(content.drain(page as usize..2 * page as usize));
    let chunk = parts.chunks();
    assert_eq!(footer - chunk, 20 * (3 * page).div_ceil(page.max(64 << 10)) as usize);
    if chunk + 20 == footer {
        assert_eq!((u32_at(chunk), &bytes[64..index]), (3 * page as u32, &content[..]));
        assert_eq!(bytes[chunk + 4..chunk + 20], blake3::hash(&content).as_bytes()[..16]);
    }
}

/// What a writer that is wrong, or wants harm, has written. Nothing takes memory for what it claims.
#[test]
fn index_of_chunks_that_makes_no_sense_is_refused() {
    require!();
    child::run_well(test_name!(), || {
        let mut random = Random::new(5);
        let memory = random_memory(&mut random, 60);
        limit_memory(8 << 20);
        for compression in compressions() {
            let parts = Parts::new(write(&mut random, &memory, &options(compression)));
            let (index, footer) = (parts.index, parts.bytes.len() - 64);
            assert!(readers(&parts.with(index + 96, parts.u64_at(index + 96))).iter().all(Result::is_ok));
            let huge = [1, 3, 1 << 20, 1 << 40, 1 << 62, u64::MAX - 4095, u64::MAX];
            // Lengths of the stream, its first part, the set; numbers of regions, extents, chunks; where the index begins.
            let numbers =
                [index + 96, index + 104, index + 112, footer + 24, footer + 32, footer + 40, footer + 16];
            for at in numbers {
                for number in huge.into_iter().filter(|number| *number != parts.u64_at(at)) {
                    let is_refused = readers(&parts.with(at, number)).iter().all(Result::is_err);
                    // A first part of other than whole blocks is only longer or shorter.
                    assert!(is_refused || at == index + 104 && number < 4, "{compression:?} {at} {number}");
                }
            }
            // The first chunk: its length and how it is compressed.
            let first = parts.u64_at(parts.chunks());
            for (from, to) in [(0, 0xff_ffff), (0, 0), (24, 3), (24, 0xff)] {
                let mask: u64 = if from == 0 { 0xff_ffff } else { 0xff << 24 };
                let number = first & !mask | to << from;
                let errors = readers(&parts.with(parts.chunks(), number));
                assert!(errors.iter().all(Result::is_err), "{compression:?} {from} {to:x}");
            }
        }
    });
}

/// A few bytes that say again and again to show the same would fill any disk.
#[test]
fn content_that_is_shown_twice_is_refused() {
    require!();
    let mut memory = vec![0; 3 * page()];
    memory[..page()].fill(5);
    memory[2 * page()..].fill(6);
    let parts = Parts::new(write(&mut Random::new(0), &memory, &options(Compression::None)));
    // The place of the zeros in the middle.
    let place = parts.index + 120 + 24 + 24 + 16;
    assert_eq!(parts.u64_at(place), 0);
    assert!(readers(&parts.with(place, 0)).iter().all(Result::is_ok));
    let errors = readers(&parts.with(place, page() as u64)).map(Result::unwrap_err);
    assert!(errors.iter().all(|error| matches!(error, FormatError::Damaged(_))), "{errors:?}");
}

/// A disk that is full for a moment.
struct FullOnce {
    bytes: Vec<u8>,
    room: usize,
}

impl io::Write for FullOnce {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.room {
            self.room = usize::MAX;
            return Err(ErrorKind::StorageFull.into());
        }
        self.room -= bytes.len();
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn writer_that_failed_makes_no_file() {
    require!();
    let memory: Vec<u8> = (0..64 * page()).map(|at| (at / 7) as u8 | 1).collect();
    for has_chunks in [true, false] {
        let mut writer = SnapshotWriter::new(FullOnce { bytes: Vec::new(), room: 5 * page() + 100 }).unwrap();
        if has_chunks {
            writer = writer.chunks(&options(Compression::None));
        }
        writer.begin(&Geometry::new([Region::new(0..memory.len() as u64, page() as u64)])).unwrap();
        let failed = writer.write(0, Content::Data(&memory)).unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::StorageFull);
        writer.write(0, Content::Zero(page() as u64)).unwrap_err();
        writer.finish().unwrap_err();
        assert!(SnapshotReader::new(file(&writer.into_inner().bytes)).is_err());
    }
}

#[test]
fn regions_that_no_reader_takes_are_not_written() {
    require!();
    let page = page() as u64;
    let bad = [0..0, 5..5 + page / 2, page..0];
    for addresses in bad {
        let mut writer = SnapshotWriter::new(Vec::new()).unwrap().chunks(&ChunkOptions::new());
        let geometry = Geometry::new([Region::new(0..page, page), Region::new(addresses, page)]);
        assert_eq!(writer.begin(&geometry).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert!(writer.into_inner().is_empty());
    }
}

#[test]
fn compression_that_is_not_built_is_named() {
    require!();
    let memory: Vec<u8> = vec![7; 16 * page()];
    let parts = Parts::new(write(&mut Random::new(0), &memory, &options(Compression::None)));
    let chunk = parts.u64_at(parts.chunks());
    for (codec, name, is_built) in [(1, "lz4", cfg!(feature = "lz4")), (2, "zstd", cfg!(feature = "zstd"))] {
        let error = readers(&parts.with(parts.chunks(), chunk & !(0xff << 24) | codec << 24));
        for error in error.map(Result::unwrap_err) {
            match error {
                FormatError::NotBuiltIn(found) => assert!(found == name && !is_built),
                error => assert!(is_built && matches!(error, FormatError::Damaged(_)), "{error:?}"),
            }
        }
    }
}

#[test]
fn one_read_of_the_end_opens_a_file() {
    require!();
    let memory: Vec<u8> = (0..300 * page()).map(|at| (at / page()) as u8 | 1).collect();
    let mut writer = SnapshotWriter::new(Vec::new()).unwrap().chunks(&options(Compression::None));
    writer.begin(&Geometry::new([Region::new(0..memory.len() as u64, page() as u64)])).unwrap();
    writer.write(0, Content::Data(&memory)).unwrap();
    writer.finish().unwrap();
    let source = Noting::new(writer.into_inner());
    let len = source.len().unwrap();
    let reader = SnapshotReader::from_source(source.clone()).unwrap();
    let tail = len.min(512 << 10);
    assert_eq!(source.take(), [(len - tail, tail as usize)]);
    // Pages of one chunk are one read.
    for number in 0..3 {
        read(&reader, number * page(), page()).unwrap();
    }
    assert_eq!(source.take().len(), 1);
    // All that follows is one, too: its chunks lie side by side.
    assert!(read(&reader, 0, memory.len()).unwrap() == memory);
    assert_eq!(source.take().len(), 1);
}

#[test]
fn threads_that_need_one_chunk_read_it_once() {
    require!();
    let memory: Vec<u8> = (0..16 * page()).map(|at| (at / page()) as u8 + 1).collect();
    let source = Noting::new(write(&mut Random::new(0), &memory, &ChunkOptions::new().size(2 << 20)));
    let reader = SnapshotReader::from_source(source.clone()).unwrap();
    source.take();
    let barrier = Barrier::new(16);
    let done = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for number in 0..16 {
            let (reader, barrier, memory, done) = (&reader, &barrier, &memory, &done);
            scope.spawn(move || {
                barrier.wait();
                assert!(
                    read(reader, number * page(), page()).unwrap() == memory[number * page()..][..page()]
                );
                done.fetch_add(1, Ordering::Relaxed);
            });
        }
    });
    assert_eq!((done.into_inner(), source.take().len()), (16, 1));
}

#[test]
fn live_snapshot_is_written_in_chunks() {
    require!(WRITE_PROTECT);
    let memory = Memory::anonymous(50);
    let before = number(&memory, 1);
    for compression in compressions() {
        let writer = SnapshotWriter::new(Vec::new()).unwrap().chunks(&options(compression));
        let snapshot = Snapshot::begin(addresses(&memory), writer).unwrap();
        number(&memory, 9);
        let writer = snapshot.wait().unwrap().sink;
        let written = writer.written();
        let bytes = writer.into_inner();
        assert_eq!(written, bytes.len() as u64);
        for reader in readers(&bytes).map(Result::unwrap) {
            assert_eq!(reader.regions()[0].addresses.start, memory.start().addr() as u64);
            for (number, byte) in before.iter().enumerate() {
                assert_eq!(read(&reader, number * page(), page()).unwrap()[0], *byte, "{number}");
            }
        }
        number(&memory, 1);
    }
}

/// A base of one version, increments of the other, and all merged into either.
#[test]
fn versions_are_layered_and_merged() {
    require!(WRITE_PROTECT);
    let folder = Folder::new(test_name!());
    let memory = Memory::anonymous(30);
    let mut series = Options::new().range(addresses(&memory)).series().unwrap();
    let mut parent = None;
    let compressions = compressions();
    for round in 0..4_u8 {
        (0..30).step_by(1 + round as usize).for_each(|page| memory.write(page, round + 1));
        let path = folder.path(&format!("{round}"));
        let mut writer = SnapshotWriter::create(path).unwrap();
        if round % 2 == 1 {
            writer = writer.chunks(&options(compressions[round as usize % compressions.len()]));
        }
        if let Some(parent) = parent {
            writer = writer.follows(parent);
        }
        parent = Some(writer.id());
        series.begin(writer).unwrap().wait().unwrap();
    }
    let expected: Vec<u8> = (0..30).flat_map(|page| memory.content(page)).collect();
    let reader = Chain::open(&folder.0).unwrap().into_reader().unwrap();
    reader.verify().unwrap();
    assert!(read(&reader, 0, expected.len()).unwrap() == expected);
    for compression in compressions {
        let writer = SnapshotWriter::new(Vec::new()).unwrap().chunks(&options(compression));
        let merged = SnapshotReader::new(file(&reader.merge_with(writer).unwrap().into_inner())).unwrap();
        assert_eq!((merged.version(), merged.id(), merged.parent()), (2, reader.id(), None));
        assert!(read(&merged, 0, expected.len()).unwrap() == expected);
    }
    reader.merge(folder.path("merged")).unwrap();
    let merged = SnapshotReader::open(folder.path("merged")).unwrap();
    assert_eq!(merged.version(), 1);
    assert!(read(&merged, 0, expected.len()).unwrap() == expected);
}

/// Version 1 through a source, too.
#[test]
fn files_of_pages_are_read_from_any_source() {
    require!();
    let mut random = Random::new(2);
    let memory = random_memory(&mut random, 30);
    let mut writer = SnapshotWriter::new(Vec::new()).unwrap();
    writer.begin(&Geometry::new([Region::new(0..memory.len() as u64, page() as u64)])).unwrap();
    writer.write(0, Content::Data(&memory)).unwrap();
    writer.finish().unwrap();
    let bytes = writer.into_inner();
    for reader in readers(&bytes).map(Result::unwrap) {
        assert_eq!((reader.version(), reader.chunk_size()), (1, None));
        reader.verify().unwrap();
        assert!(read(&reader, 0, memory.len()).unwrap() == memory);
    }
    let endless = |_: u64, _: &mut [u8]| Ok(PageData::Zero);
    let error = SnapshotReader::from_source(endless).unwrap_err();
    assert!(matches!(&error, FormatError::Io(error) if error.kind() == ErrorKind::InvalidInput), "{error:?}");
}
