//! The file of a snapshot: what it holds comes back, and what is wrong with it is found.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::thread;

use userfaultfd::snapshot::{
    Chain, Content, Error, FormatError, Geometry, Options, Region, Series, Sink, Snapshot, SnapshotReader,
    SnapshotWriter,
};
use userfaultfd::source::{PageData, PageSource};
use userfaultfd::{FeatureFlags, RegisterMode};

use crate::image::{addresses, number};
use crate::support::mapping::memfd;
use crate::support::memory::{self, Memory};
use crate::support::{self, child, mounts, page, require, test_name};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

/// A path of its own, removed when dropped.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    pub(crate) fn new(test: &str) -> Self {
        let name = format!("userfaultfd-{}-{test}", std::process::id()).replace(':', "-");
        Self(std::env::temp_dir().join(name))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.0));
    }
}

/// A directory of its own, removed when dropped.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new(test: &str) -> Self {
        let folder = Self(Scratch::new(test).0.clone());
        fs::create_dir(&folder.0).unwrap();
        folder
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// Bytes as an open file.
pub(crate) fn file(bytes: &[u8]) -> File {
    let file = File::from(memfd(0, 0));
    file.write_all_at(bytes, 0).unwrap();
    file
}

/// A snapshot of memory, as the bytes of a file.
fn bytes_of(memory: &Memory) -> Vec<u8> {
    let writer = SnapshotWriter::new(Vec::new()).unwrap();
    let writer = Snapshot::begin(addresses(memory), writer).unwrap().wait().unwrap().sink;
    writer.into_inner()
}

/// All that a snapshot holds.
#[track_caller]
fn read_all(reader: &SnapshotReader, at_a_time: usize) -> Vec<u8> {
    let mut all = vec![0xee; reader.len().unwrap() as usize];
    for (at, page) in all.chunks_mut(at_a_time).enumerate() {
        if reader.read((at * at_a_time) as u64, page).unwrap() == PageData::Zero {
            page.fill(0);
        }
    }
    all
}

#[test]
fn reader_returns_what_the_writer_wrote() {
    require!(WRITE_PROTECT);
    for memory in memory::each(test_name!(), RegisterMode::WRITE_PROTECT, 7) {
        number(&memory, 0); // the first page is zero
        let all: Vec<u8> = (0..7).flat_map(|page| memory.content(page)).collect();
        let scratch = Scratch::new(test_name!());
        let writer = SnapshotWriter::create(&scratch.0).unwrap();
        let id = writer.id();
        let writer = Snapshot::begin(addresses(&memory), writer).unwrap().wait().unwrap().sink;
        assert_eq!(writer.written(), fs::metadata(&scratch.0).unwrap().len());
        let reader = SnapshotReader::open(&scratch.0).unwrap();
        reader.verify().unwrap();
        assert_eq!((reader.id(), reader.parent(), reader.gone_len()), (id, None, 0));
        assert_eq!(reader.regions()[0].addresses.start, memory.start().addr() as u64);
        // Of a page only the beginning is something, and of huge pages only some small ones.
        assert_eq!(reader.data_len(), 6 * page() as u64, "{memory:?}");
        let small = page();
        for at_a_time in [small, small / 2, 3 * small, 16 * small, all.len()] {
            assert!(read_all(&reader, at_a_time) == all, "{at_a_time} {memory:?}");
        }
    }
}

#[test]
fn reader_returns_zeros_beyond_end() {
    require!(WRITE_PROTECT);
    let memory = Memory::anonymous(2);
    number(&memory, 1);
    let reader = SnapshotReader::new(file(&bytes_of(&memory))).unwrap();
    let mut bytes = vec![0xee; 2 * page()];
    assert_eq!(reader.read(page() as u64, &mut bytes).unwrap(), PageData::Data);
    assert_eq!((bytes[0], &bytes[page()..]), (2, &vec![0; page()][..]));
    assert_eq!(reader.read(2 * page() as u64, &mut bytes).unwrap(), PageData::Zero);
    assert_eq!(reader.len(), Some(2 * page() as u64));
}

/// Whatever byte is wrong, nothing wrong is ever read.
#[test]
fn every_damage_is_found() {
    require!(WRITE_PROTECT);
    let memory = Memory::anonymous(3);
    number(&memory, 0);
    let good = bytes_of(&memory);
    let all = read_all(&SnapshotReader::new(file(&good)).unwrap(), page());
    let bad = file(&good);
    let header = 0..64;
    let unused = 64..page();
    for at in header
        .clone()
        .chain(unused.clone().step_by(97))
        .chain((page()..3 * page()).step_by(53))
        .chain(3 * page()..good.len())
    {
        bad.write_all_at(&[good[at] ^ 0x10], at as u64).unwrap();
        match SnapshotReader::new(bad.try_clone().unwrap()) {
            Ok(reader) if unused.contains(&at) => {
                reader.verify().unwrap();
                assert!(read_all(&reader, page()) == all);
            }
            Ok(reader) => {
                let error = reader.verify().unwrap_err();
                assert!(matches!(error, FormatError::Damaged(_)), "{at} {error:?}");
                // The other pages are good.
                let mut bytes = vec![0; page()];
                let bad = (0..3).filter(|number| match reader.read((number * page()) as u64, &mut bytes) {
                    Ok(fill) => {
                        assert!(fill == PageData::Zero || bytes == all[number * page()..][..page()], "{at}");
                        false
                    }
                    Err(error) => {
                        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
                        true
                    }
                });
                assert_eq!(bad.count(), 1, "{at}");
            }
            Err(error) => {
                assert!(!(page()..3 * page()).contains(&at), "{at} {error}");
                let named = match at {
                    0..8 => matches!(error, FormatError::NotASnapshot),
                    _ => matches!(error, FormatError::Damaged(_) | FormatError::CutShort),
                };
                assert!(named, "{at} {error:?}");
                assert!(!error.to_string().is_empty());
            }
        }
        bad.write_all_at(&good[at..=at], at as u64).unwrap();
    }
}

#[test]
fn every_truncation_is_found() {
    require!(WRITE_PROTECT);
    let memory = Memory::anonymous(2);
    number(&memory, 1);
    let good = bytes_of(&memory);
    let lens = (0..200).chain((200..good.len() - 200).step_by(101)).chain(good.len() - 200..good.len());
    for len in lens {
        let error = SnapshotReader::new(file(&good[..len])).unwrap_err();
        assert!(matches!(error, FormatError::CutShort) && error.is_unfinished(), "{len} {error:?}");
    }
    // Nor has the content come to the disk.
    let error = SnapshotReader::new(file(&vec![0; good.len()])).unwrap_err();
    assert!(error.is_unfinished(), "{error:?}");
    // More than was written is wrong, too.
    let longer = [&good[..], &[0]].concat();
    assert!(SnapshotReader::new(file(&longer)).is_err());
}

#[test]
fn foreign_files_and_versions_are_refused() {
    require!(WRITE_PROTECT);
    for other in [&b"something else that is long enough to have a header of sixty-four bytes"[..], b"short"] {
        let error = SnapshotReader::new(file(other)).unwrap_err();
        assert!(matches!(error, FormatError::NotASnapshot) && !error.is_unfinished());
    }
    assert!(matches!(SnapshotReader::open("/nowhere/at/all"), Err(FormatError::Io(_))));
    let memory = Memory::anonymous(1);
    let mut newer = bytes_of(&memory);
    newer[8] = 3;
    // With its checksum right again.
    let checksum = crc(&newer[..60]);
    newer[60..64].copy_from_slice(&checksum.to_le_bytes());
    let error = SnapshotReader::new(file(&newer)).unwrap_err();
    assert!(matches!(error, FormatError::UnknownVersion(3)), "{error:?}");
}

/// The checksum of the format, by another program than the library's: CRC-32 of IEEE 802.3, bit by bit.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

/// The documented format, read by another program than the library's.
#[test]
fn format_is_as_documented() {
    require!(WRITE_PROTECT);
    let memory = Memory::anonymous(4);
    memory.write(1, 5);
    memory.write(2, 6);
    let bytes = bytes_of(&memory);
    let u64_at = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap());
    let u32_at = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().unwrap());
    assert_eq!((&bytes[..8], u32_at(8), 1 << u32_at(12)), (&b"UFFDSNAP"[..], 1, page()));
    assert_eq!(u32_at(60), crc(&bytes[..60]));
    let footer = bytes.len() - 64;
    assert_eq!(&bytes[footer..footer + 8], b"UFFDSEND");
    assert_eq!(u32_at(footer + 60), crc(&bytes[footer..footer + 60]));
    let [index, regions, extents, checksums] = [16, 24, 32, 40].map(|at| u64_at(footer + at) as usize);
    assert_eq!([regions, extents, checksums], [1, 3, 2]);
    assert_eq!(u32_at(footer + 56), crc(&bytes[index..footer]));
    assert_eq!(u64_at(index), memory.start().addr() as u64);
    assert_eq!(u64_at(index + 8) - u64_at(index), memory.len() as u64);
    assert_eq!(u64_at(index + 16), page() as u64);
    let extent = |number: usize| [0, 8, 16].map(|at| u64_at(index + 24 + 24 * number + at));
    let page = page() as u64;
    assert_eq!([extent(0), extent(1), extent(2)], [[0, 1, 0], [1, 2, page], [3, 1, 0]]);
    for block in 0..2 {
        let data = &bytes[(1 + block) * page as usize..][..page as usize];
        assert_eq!(data[0], 5 + block as u8);
        assert_eq!(u32_at(index + 24 + 3 * 24 + 4 * block), crc(data));
    }
}

fn take(series: &mut Series, writer: SnapshotWriter<Vec<u8>>) -> SnapshotReader {
    let writer = series.begin(writer).unwrap().wait().unwrap().sink;
    SnapshotReader::new(file(&writer.into_inner())).unwrap()
}

#[test]
fn increments_are_layered() {
    require!(WRITE_PROTECT);
    for memory in memory::each(test_name!(), RegisterMode::WRITE_PROTECT, 5) {
        number(&memory, 1);
        let mut series = Options::new().range(addresses(&memory)).series().unwrap();
        let writer = || SnapshotWriter::new(Vec::new()).unwrap();
        let first = take(&mut series, writer());
        memory.write(1, 50);
        memory.write(3, 0); // to zero
        let second = take(&mut series, writer().follows(first.id()));
        memory.write(4, 60);
        let third = take(&mut series, writer().follows(second.id()));
        let ids = [first.id(), second.id(), third.id()];
        assert_eq!([first.parent(), second.parent(), third.parent()], [None, Some(ids[0]), Some(ids[1])]);
        assert_eq!(second.data_len(), page() as u64, "{memory:?}");
        // Alone it tells what it needs.
        let error = second.verify().unwrap_err();
        assert!(matches!(error, FormatError::NeedsParent { parent } if parent == ids[0]), "{error:?}");
        let mut bytes = vec![0; page()];
        let unchanged = second.read(2 * memory.page() as u64, &mut bytes).unwrap_err();
        assert!(unchanged.to_string().contains(&ids[0].to_string()), "{unchanged}");

        let second = second.on(first).unwrap();
        let third = third.on(second).unwrap();
        third.verify().unwrap();
        let all: Vec<u8> = (0..5).flat_map(|page| memory.content(page)).collect();
        assert!(read_all(&third, page()) == all, "{memory:?}");
        assert!(read_all(&third, 2 * page()) == all, "{memory:?}");
    }
}

#[test]
fn wrong_base_is_refused() {
    require!(WRITE_PROTECT);
    let memory = Memory::anonymous(2);
    let mut series = Options::new().range(addresses(&memory)).series().unwrap();
    let writer = || SnapshotWriter::new(Vec::new()).unwrap();
    let first = take(&mut series, writer());
    let id = first.id();
    let second = take(&mut series, writer().follows(id));
    let other = SnapshotReader::new(file(&bytes_of(&Memory::anonymous(2)))).unwrap();
    let found = other.id();
    match second.on(other) {
        Err(FormatError::WrongParent { expected, found: told }) => {
            assert_eq!((expected, told), (Some(id), found));
        }
        result => panic!("{result:?}"),
    }
    // One that is whole stands on nothing.
    let again = SnapshotReader::new(file(&bytes_of(&Memory::anonymous(2)))).unwrap();
    assert!(matches!(first.on(again), Err(FormatError::WrongParent { expected: None, .. })));
}

#[test]
fn writer_rejects_misuse() {
    require!(WRITE_PROTECT);
    let memory = Memory::anonymous(2);
    let mut series = Options::new().range(addresses(&memory)).series().unwrap();
    let writer = || SnapshotWriter::new(Vec::new()).unwrap();
    let id = writer().id();
    assert!(series.begin(writer().follows(id)).is_err(), "a whole one follows none");
    let used = series.begin(writer()).unwrap().wait().unwrap().sink;
    assert!(series.begin(writer()).is_err(), "an incremental one follows one");
    assert!(series.begin(used.follows(id)).is_err(), "it is written already");
    let progress = series.begin(writer().follows(id)).unwrap().wait().unwrap().progress;
    assert_eq!(progress.total, 0);
}

/// A file with something else at some places, and its checksums right again: what a writer that is wrong would write.
fn patched(good: &[u8], patches: &[(usize, u64)]) -> File {
    let mut bytes = good.to_vec();
    for (at, value) in patches {
        bytes[*at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    let footer = bytes.len() - 64;
    let index = u64::from_le_bytes(*bytes[footer + 16..].first_chunk().unwrap()) as usize;
    for (checked, at) in [(0..60, 60), (index..footer, footer + 56), (footer..footer + 60, footer + 60)] {
        let checksum = crc(&bytes[checked]);
        bytes[at..at + 4].copy_from_slice(&checksum.to_le_bytes());
    }
    file(&bytes)
}

#[test]
fn index_that_makes_no_sense_is_refused() {
    require!(WRITE_PROTECT);
    let memory = Memory::anonymous(6);
    memory.write(1, 5);
    memory.write(2, 6);
    let good = bytes_of(&memory);
    SnapshotReader::new(patched(&good, &[])).unwrap().verify().unwrap();
    let footer = good.len() - 64;
    let index = 3 * page();
    let block = page() as u64;
    // Where the first block, the number of blocks and the offset of the extents are: zeros, data, zeros.
    let [first, blocks, offset] = [0, 8, 16].map(|at| move |extent: usize| index + 24 + 24 * extent + at);
    for (what, patches) in [
        ("a gap", vec![(first(2), 4), (blocks(2), 2)]),
        ("twice", vec![(first(2), 2), (blocks(2), 4)]),
        ("out of order", vec![(first(0), 1)]),
        ("not all", vec![(blocks(2), 2)]),
        ("too many", vec![(blocks(2), 4)]),
        ("more than there are", vec![(blocks(2), u64::MAX)]),
        ("none", vec![(blocks(0), 0)]),
        ("data in the header", vec![(offset(1), 2)]),
        ("data between blocks", vec![(offset(1), block + 8)]),
        ("data in the index", vec![(offset(1), 2 * block)]),
        ("data at the end of all numbers", vec![(offset(1), u64::MAX / block * block)]),
        ("checksums of nothing", vec![(offset(1), 0)]),
        ("a region that ends before it begins", vec![(index + 8, 0)]),
        ("a region of no whole blocks", vec![(index + 8, memory.start().addr() as u64 + 6 * block + 8)]),
    ] {
        match SnapshotReader::new(patched(&good, &patches)) {
            Err(FormatError::Damaged(text)) => assert!(text.contains("makes no sense"), "{what}: {text}"),
            result => panic!("{what}: {result:?}"),
        }
    }
    for (patch, told) in [
        ((footer + 8, 7), "two snapshots"),
        // No room is made for more than the file can hold.
        ((footer + 24, 1 << 40), "its length"),
        ((footer + 40, u64::MAX), "its length"),
        ((footer + 40, 1), "its length"),
    ] {
        match SnapshotReader::new(patched(&good, &[patch])) {
            Err(FormatError::Damaged(text)) => assert!(text.contains(told), "{patch:?}: {text}"),
            result => panic!("{patch:?}: {result:?}"),
        }
    }
}

#[test]
fn base_of_another_size_is_refused() {
    require!(WRITE_PROTECT);
    let (memory, larger) = (Memory::anonymous(2), Memory::anonymous(3));
    number(&larger, 1);
    let mut series = Options::new().range(addresses(&memory)).series().unwrap();
    let first = take(&mut series, SnapshotWriter::new(Vec::new()).unwrap());
    let writer = SnapshotWriter::new(Vec::new()).unwrap().follows(first.id());
    let second = series.begin(writer).unwrap().wait().unwrap().sink.into_inner();
    let other = bytes_of(&larger);
    // It says that it follows the other one.
    let id = [16, 24].map(|at| u64::from_le_bytes(*other[at..].first_chunk().unwrap()));
    let second = SnapshotReader::new(patched(&second, &[(32, id[0]), (40, id[1])])).unwrap();
    let other = SnapshotReader::new(file(&other)).unwrap();
    assert_eq!(second.parent(), Some(other.id()));
    assert!(matches!(second.on(other), Err(FormatError::WrongParent { .. })));
}

/// A sink that hands on the pages one by one, from the last to the first.
struct Backwards<W: Write>(SnapshotWriter<W>, BTreeMap<u64, Vec<u8>>);

impl<W: Write + Send> Sink for Backwards<W> {
    fn begin(&mut self, geometry: &Geometry) -> io::Result<()> {
        self.0.begin(geometry)
    }

    fn write(&mut self, offset: u64, content: Content<'_>) -> io::Result<()> {
        let Content::Data(bytes) = content else { panic!("{content:?}") };
        let pages = bytes.chunks(page()).map(<[u8]>::to_vec);
        self.1.extend((offset..).step_by(page()).zip(pages));
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        for (offset, page) in self.1.iter().rev() {
            self.0.write(*offset, Content::Data(page))?;
        }
        self.0.finish()
    }
}

#[test]
fn pages_come_in_any_order() {
    require!(WRITE_PROTECT);
    let memory = Memory::anonymous(6);
    number(&memory, 0); // the first page is zero
    let sink = Backwards(SnapshotWriter::new(Vec::new()).unwrap(), BTreeMap::new());
    let sink = Snapshot::begin(addresses(&memory), sink).unwrap().wait().unwrap().sink;
    let reader = SnapshotReader::new(file(&sink.0.into_inner())).unwrap();
    reader.verify().unwrap();
    let all: Vec<u8> = (0..6).flat_map(|page| memory.content(page)).collect();
    assert!(read_all(&reader, page()) == all);
    assert!(read_all(&reader, all.len()) == all);
}

/// A sink that can't take more is the error of the snapshot, and what it wrote is refused.
#[test]
fn full_disk_leaves_a_file_that_is_refused() {
    require!(WRITE_PROTECT);
    struct Small(Vec<u8>);
    impl Write for Small {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.0.len() + bytes.len() > 4 * page() {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.0.extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let memory = Memory::anonymous(8);
    number(&memory, 1);
    let kept = std::sync::Arc::new(std::sync::Mutex::new(Small(Vec::new())));
    struct Shared(std::sync::Arc<std::sync::Mutex<Small>>);
    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let writer = SnapshotWriter::new(Shared(std::sync::Arc::clone(&kept))).unwrap();
    let error = Snapshot::begin(addresses(&memory), writer).unwrap().wait().map(drop).unwrap_err();
    let userfaultfd::snapshot::Error::Sink(error) = error else { panic!("{error:?}") };
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    let error = SnapshotReader::new(file(&kept.lock().unwrap().0)).unwrap_err();
    assert!(matches!(error, FormatError::CutShort), "{error:?}");
    number(&memory, 2);
}

/// The folder holds the snapshot of what memory held before, and nothing else.
#[track_caller]
fn assert_kept(folder: &Folder, before: &[u8]) {
    assert_eq!(folder.names(), ["file"]);
    assert_old(folder, before);
}

/// The file is the snapshot of what memory held before.
#[track_caller]
fn assert_old(folder: &Folder, before: &[u8]) {
    let reader = SnapshotReader::open(folder.path("file")).unwrap();
    reader.verify().unwrap();
    let all = read_all(&reader, page());
    assert!(all.iter().step_by(page()).eq(before));
}

fn save(memory: &Memory, folder: &Folder) -> Result<(), userfaultfd::snapshot::Error> {
    let writer = SnapshotWriter::create(folder.path("file")).unwrap();
    Snapshot::begin(addresses(memory), writer)?.wait().map(drop)
}

#[test]
fn saving_that_fails_leaves_the_old_file() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        let (folder, memory) = (Folder::new(test_name!()), Memory::anonymous(64));
        let before = number(&memory, 1);
        save(&memory, &folder).unwrap();
        number(&memory, 9);
        // All is written, and the last step fails.
        struct Failing<W: Write>(SnapshotWriter<W>);
        impl<W: Write + Send> Sink for Failing<W> {
            fn begin(&mut self, geometry: &Geometry) -> io::Result<()> {
                self.0.begin(geometry)
            }
            fn write(&mut self, offset: u64, content: Content<'_>) -> io::Result<()> {
                self.0.write(offset, content)
            }
            fn finish(&mut self) -> io::Result<()> {
                Err(io::Error::other("as it is told to"))
            }
        }
        let sink = Failing(SnapshotWriter::create(folder.path("file")).unwrap());
        Snapshot::begin(addresses(&memory), sink).unwrap().wait().map(drop).unwrap_err();
        assert_kept(&folder, &before);
        // Files can't grow any more.
        // SAFETY: touches no memory.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        let limit = libc::rlimit { rlim_cur: 20 * page() as libc::rlim_t, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: the structure is borrowed for the call.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) }, 0);
        let error = save(&memory, &folder).unwrap_err();
        let userfaultfd::snapshot::Error::Sink(error) = error else { panic!("{error:?}") };
        assert_eq!(error.raw_os_error(), Some(libc::EFBIG));
        assert_kept(&folder, &before);
    });
}

#[test]
fn full_disk_leaves_the_old_file() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        if !support::has(test_name!(), "mount namespaces", mounts::own()) {
            return;
        }
        let (folder, memory) = (Folder::new(test_name!()), Memory::anonymous(64));
        let before = number(&memory, 1);
        let path = std::ffi::CString::new(folder.0.as_os_str().as_encoded_bytes()).unwrap();
        // Room for one, and half of another.
        let options = std::ffi::CString::new(format!("size={}", 100 * page())).unwrap();
        let (tmpfs, options) = (c"tmpfs".as_ptr(), options.as_ptr().cast());
        // SAFETY: the strings are NUL-terminated.
        assert_eq!(unsafe { libc::mount(tmpfs, path.as_ptr(), tmpfs, 0, options) }, 0);
        save(&memory, &folder).unwrap();
        number(&memory, 9);
        let error = save(&memory, &folder).unwrap_err();
        let userfaultfd::snapshot::Error::Sink(error) = error else { panic!("{error:?}") };
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_kept(&folder, &before);
        // SAFETY: the path is NUL-terminated.
        assert_eq!(unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) }, 0);
    });
}

/// A process is killed while it saves, whatever it has written until then.
#[test]
fn killed_process_leaves_the_old_file() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        let (folder, memory) = (Folder::new(test_name!()), Memory::anonymous(64));
        let before = number(&memory, 1);
        save(&memory, &folder).unwrap();
        number(&memory, 9);
        // Where files can't be without a name, which is so of ramfs in Linux 5.10, a killed process leaves one.
        let unnamed = File::options().write(true).custom_flags(libc::O_TMPFILE).open(&folder.0).is_ok();
        for pieces in [0, 1, 5, 60] {
            let child = child::fork(|| {
                let mut writer = SnapshotWriter::create(folder.path("file")).unwrap();
                let mut left = pieces;
                writer.begin(&geometry_of(&memory)).unwrap();
                for number in 0..64 {
                    if left == 0 {
                        // SAFETY: ends this process.
                        unsafe { libc::raise(libc::SIGKILL) };
                    }
                    left -= 1;
                    let content = memory.content(number);
                    writer.write((number * page()) as u64, Content::Data(&content)).unwrap();
                }
            });
            assert_eq!(child.wait(), libc::SIGKILL);
            let names = folder.names();
            let (old, left): (Vec<_>, Vec<_>) = names.iter().partition(|name| *name == "file");
            assert_eq!((old.len(), left.len()), (1, usize::from(!unnamed)), "{names:?}");
            for name in left {
                assert!(name.starts_with(".file.") && name.ends_with(".new"), "{name}");
                fs::remove_file(folder.path(name)).unwrap();
            }
            assert_old(&folder, &before);
        }
    });
}

/// What a sink is told of a snapshot of some memory.
fn geometry_of(memory: &Memory) -> Geometry {
    let image = crate::image::Image::new();
    Snapshot::begin(addresses(memory), image.clone()).unwrap().wait().unwrap();
    image.with(|delivered| delivered.geometry.clone().unwrap())
}

/// What a writer that is wrong, or wants harm, has written: it is refused, and no room is made for what isn't there.
#[test]
fn reader_rejects_an_index_that_is_too_large() {
    require!(WRITE_PROTECT);
    let memory = Memory::anonymous(2);
    number(&memory, 1);
    let good = bytes_of(&memory);
    // Blocks that no page is as large as.
    for shift in [21, 40, 63] {
        let mut bytes = good.clone();
        bytes[12] = shift;
        let checksum = crc(&bytes[..60]);
        bytes[60..64].copy_from_slice(&checksum.to_le_bytes());
        let large = file(&bytes);
        large.set_len(1 << 41).unwrap();
        assert!(SnapshotReader::new(large).is_err(), "{shift}");
    }
    // An index that is a hole of 24 MiB, with its checksum right: extents that are nothing.
    let (mut hasher, hole) = (crc32fast::Hasher::new(), 24_u64 << 20);
    let index = page() as u64;
    let len = index + hole + 64;
    (0..hole >> 20).for_each(|_| hasher.update(&[0; 1 << 20]));
    let mut footer = [0; 64];
    footer[..8].copy_from_slice(b"UFFDSEND");
    footer[8..16].copy_from_slice(&good[16..24]);
    footer[48..56].copy_from_slice(&good[24..32]);
    for (at, number) in [(16, index), (24, 0), (32, hole / 24), (40, 0)] {
        footer[at..at + 8].copy_from_slice(&number.to_le_bytes());
    }
    footer[56..60].copy_from_slice(&hasher.finalize().to_le_bytes());
    let checksum = crc(&footer[..60]);
    footer[60..].copy_from_slice(&checksum.to_le_bytes());
    let sparse = file(&good[..page()]);
    sparse.set_len(len).unwrap();
    sparse.write_all_at(&footer, len - 64).unwrap();
    let error = SnapshotReader::new(sparse).unwrap_err();
    assert!(matches!(error, FormatError::Damaged(text) if text.contains("makes no sense")), "{error:?}");
}

/// From now on this process may map that much more than it has.
pub(crate) fn limit_memory(more: usize) {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = statm.split(' ').next().unwrap().parse().unwrap();
    let limit = (pages * page() + more) as libc::rlim_t;
    let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
    // SAFETY: the structure is borrowed for the call.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) }, 0);
}

/// A file of a few KiB, of which most is holes, with all its checksums right. It takes no memory for what it claims.
#[test]
fn file_of_holes_takes_no_memory_for_its_checksums() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        /// Blocks of data, each with a checksum: 32 MiB of them.
        const BLOCKS: u64 = 8 << 20;
        let memory = Memory::anonymous(2);
        number(&memory, 1);
        let good = bytes_of(&memory);
        let page = page() as u64;
        let index = (1 + BLOCKS) * page;
        let claims: Vec<u8> = [1 << 40, (1 << 40) + BLOCKS * page, page, 0, BLOCKS, page]
            .into_iter()
            .flat_map(|number: u64| number.to_le_bytes())
            .collect();
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&claims);
        (0..(4 * BLOCKS) >> 20).for_each(|_| hasher.update(&[0; 1 << 20]));
        let mut footer = [0; 64];
        footer[..8].copy_from_slice(b"UFFDSEND");
        footer[8..16].copy_from_slice(&good[16..24]);
        footer[48..56].copy_from_slice(&good[24..32]);
        for (at, number) in [(16, index), (24, 1), (32, 1), (40, BLOCKS)] {
            footer[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        footer[56..60].copy_from_slice(&hasher.finalize().to_le_bytes());
        let checksum = crc(&footer[..60]);
        footer[60..].copy_from_slice(&checksum.to_le_bytes());
        let len = index + claims.len() as u64 + 4 * BLOCKS + 64;
        let sparse = file(&good[..page as usize]);
        sparse.set_len(len).unwrap();
        sparse.write_all_at(&claims, index).unwrap();
        sparse.write_all_at(&footer, len - 64).unwrap();
        limit_memory(8 << 20);
        let reader = SnapshotReader::new(sparse).unwrap();
        assert_eq!(reader.data_len(), BLOCKS * page);
        // A block of zeros has another checksum.
        let error = reader.read((BLOCKS - 1) * page, &mut vec![1; page as usize]).unwrap_err();
        assert!(error.to_string().contains("checksum"), "{error}");
    });
}

/// A chain that is longer than a process may have open files, and than its stack is deep.
#[test]
fn long_chain_is_read_flat_and_merged() {
    require!(WRITE_PROTECT);
    child::run_well(test_name!(), || {
        const FILES: usize = 170;
        let (folder, memory) = (Folder::new(test_name!()), Memory::anonymous(8));
        let mut series = Options::new().range(addresses(&memory)).series().unwrap();
        number(&memory, 1);
        let mut parent = None;
        let mut reader: Option<SnapshotReader> = None;
        let limit = libc::rlimit { rlim_cur: 150, rlim_max: 150 };
        // SAFETY: the structure is borrowed for the call.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
        for number in 0..FILES {
            // The first pages stay in the first file, the second page in the second, and so on.
            memory.write(4 + number % 4, number as u8);
            let writer = SnapshotWriter::new(Vec::new()).unwrap();
            let mut writer = match parent {
                Some(parent) => writer.follows(parent),
                None => writer,
            };
            parent = Some(writer.id());
            writer = series.begin(writer).unwrap().wait().unwrap().sink;
            let path = folder.path(&format!("{number:04}"));
            fs::write(&path, writer.into_inner()).unwrap();
            let one = SnapshotReader::open(&path).unwrap();
            reader = Some(match reader {
                Some(reader) => one.on(reader).unwrap(),
                None => one,
            });
        }
        let reader = reader.unwrap();
        reader.verify().unwrap();
        let all: Vec<u8> = (0..8).flat_map(|page| memory.content(page)).collect();
        assert!(read_all(&reader, page()) == all && read_all(&reader, all.len()) == all);
        // One file takes the place of all, and what followed the last stands on it.
        let merged = folder.path("merged");
        reader.merge(&merged).unwrap();
        memory.write(0, 77);
        let writer = SnapshotWriter::new(Vec::new()).unwrap().follows(reader.id());
        let next = series.begin(writer).unwrap().wait().unwrap().sink.into_inner();
        drop(reader);
        let merged = SnapshotReader::open(&merged).unwrap();
        merged.verify().unwrap();
        assert_eq!(
            (merged.id(), merged.parent(), merged.data_len()),
            (parent.unwrap(), None, 8 * page() as u64)
        );
        assert!(read_all(&merged, page()) == all);
        let next = SnapshotReader::new(file(&next)).unwrap().on(merged).unwrap();
        let all: Vec<u8> = (0..8).flat_map(|page| memory.content(page)).collect();
        assert!(read_all(&next, page()) == all);
    });
}

/// A call or a drop that does the layer below in a call of its own needs more than this stack for so long a chain: even with the
/// smallest of frames.
#[test]
fn long_chain_needs_no_deep_stack() {
    require!();
    child::run_well(test_name!(), || {
        const FILES: usize = 2500;
        const STACK_BYTES: usize = 64 << 10;
        let (folder, len) = (Folder::new(test_name!()), 8 * page());
        let mut all: Vec<u8> = (0..len).map(|at| (at / page()) as u8 + 1).collect();
        let mut parent = None;
        for number in 0..FILES {
            let mut writer = SnapshotWriter::new(Vec::new()).unwrap();
            // The first pages stay in the first file, the others in the last ones.
            let pages = match parent.replace(writer.id()) {
                Some(parent) => {
                    writer = writer.follows(parent);
                    let at = (4 + number % 4) * page();
                    all[at..at + page()].fill(number as u8);
                    at..at + page()
                }
                None => 0..len,
            };
            let mut geometry = Geometry::new([Region::new(0..len as u64, page() as u64)]);
            geometry.incremental = number > 0;
            writer.begin(&geometry).unwrap();
            writer.write(pages.start as u64, Content::Data(&all[pages])).unwrap();
            writer.finish().unwrap();
            fs::write(folder.path(&format!("{number:04}")), writer.into_inner()).unwrap();
        }
        let merged = folder.path("merged");
        let on_small_stack = || {
            let chain = Chain::open(&folder.0).unwrap();
            assert_eq!(chain.files().len(), FILES);
            let reader = chain.into_reader().unwrap();
            reader.verify().unwrap();
            assert!(read_all(&reader, page()) == all && read_all(&reader, len) == all);
            reader.merge(&merged).unwrap();
            drop(reader);
            assert!(read_all(&SnapshotReader::open(&merged).unwrap(), page()) == all);
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new().stack_size(STACK_BYTES);
            thread.spawn_scoped(scope, on_small_stack).unwrap().join().unwrap();
        });
    });
}

/// Some increments are merged into one that follows what the lowest one followed.
#[test]
fn increments_are_merged_without_their_base() {
    require!(WRITE_PROTECT);
    let (folder, memory) = (Folder::new(test_name!()), Memory::anonymous(5));
    number(&memory, 1);
    let mut series = Options::new().range(addresses(&memory)).series().unwrap();
    let writer = || SnapshotWriter::new(Vec::new()).unwrap();
    let first = take(&mut series, writer());
    memory.write(1, 50);
    memory.write(3, 60);
    let second = take(&mut series, writer().follows(first.id()));
    memory.write(3, 61);
    memory.write(4, 0);
    let third = take(&mut series, writer().follows(second.id()));
    let both = third.on(second).unwrap();
    both.merge(folder.path("both")).unwrap();
    let both = SnapshotReader::open(folder.path("both")).unwrap();
    assert_eq!((both.parent(), both.data_len()), (Some(first.id()), 2 * page() as u64));
    let all: Vec<u8> = (0..5).flat_map(|page| memory.content(page)).collect();
    assert!(read_all(&both.on(first).unwrap(), page()) == all);
}

/// A series names and links its files, and a chain finds them, whatever else lies there.
#[test]
fn series_of_files_in_a_folder_is_a_chain() {
    require!(WRITE_PROTECT);
    let (folder, memory) = (Folder::new(test_name!()), Memory::anonymous(5));
    let error = Chain::open(&folder.0).unwrap_err();
    assert!(matches!(error, FormatError::NotAChain(_)), "{error:?}");
    number(&memory, 1);
    let mut series = Options::new().range(addresses(&memory)).series().unwrap();
    let assert_now = |files: usize| {
        let chain = Chain::open(&folder.0).unwrap();
        assert_eq!(chain.files().len(), files, "{chain:?}");
        let reader = chain.into_reader().unwrap();
        reader.verify().unwrap();
        let all: Vec<u8> = (0..5).flat_map(|page| memory.content(page)).collect();
        assert!(read_all(&reader, page()) == all);
        reader
    };
    // A base, two that follow, and a base again.
    for files in [1, 2, 3, 1, 2] {
        memory.write(files, 50 + files as u8);
        series.begin_in(&folder.0, 2).unwrap().wait().unwrap();
        assert_now(files);
    }
    assert_eq!(folder.names()[0], "0000000001.snapshot");
    // One that went elsewhere is followed by a base.
    memory.write(2, 71);
    series.begin(crate::image::Image::new()).unwrap().wait().unwrap();
    series.begin_in(&folder.0, 2).unwrap().wait().unwrap();
    assert_now(1);
    memory.write(3, 72);
    series.begin_in(&folder.0, 2).unwrap().wait().unwrap();
    // What wasn't finished is passed over, a merged file takes the place of two.
    fs::write(folder.path("9999999999.snapshot"), b"").unwrap();
    fs::write(folder.path("8888888888.snapshot"), b"UFFDSNAP").unwrap();
    fs::write(folder.path(".hidden"), b"something else").unwrap();
    let last = folder.path(&folder.names().into_iter().rfind(|name| name.starts_with("00")).unwrap());
    assert_now(2).merge(&last).unwrap();
    assert_now(1);
    // What is foreign is refused, and named.
    let foreign = folder.path("foreign");
    fs::write(&foreign, b"something else").unwrap();
    let error = Chain::open(&folder.0).unwrap_err();
    assert!(error.to_string().contains("foreign: the file is no snapshot"), "{error}");
    fs::remove_file(foreign).unwrap();
    // So is a chain without its base.
    fs::remove_file(folder.path("9999999999.snapshot")).unwrap();
    memory.write(3, 73);
    series.begin_in(&folder.0, 2).unwrap().wait().unwrap();
    fs::remove_file(&last).unwrap();
    let error = Chain::open(&folder.0).unwrap_err();
    assert!(matches!(error, FormatError::NeedsParent { .. }), "{error:?}");
}

/// Each names its files when they are complete.
#[test]
fn series_that_save_to_one_directory_replace_no_file() {
    require!(WRITE_PROTECT);
    let (folder, memories) = (Folder::new(test_name!()), [1, 2].map(|_| Memory::anonymous(3)));
    let mut series = memories.each_ref().map(|memory| {
        number(memory, 1);
        Options::new().range(addresses(memory)).series().unwrap()
    });
    for files in [2, 4] {
        let [one, other] = series.each_mut().map(|series| series.begin_in(&folder.0, 9).unwrap());
        one.wait().unwrap();
        other.wait().unwrap();
        assert_eq!(folder.names().len(), files);
    }
    for name in folder.names() {
        SnapshotReader::open(folder.path(&name)).unwrap();
    }
    // No number is left: an error, after which the series goes on.
    let last = folder.path(&format!("{}.snapshot", u64::MAX));
    fs::write(&last, b"").unwrap();
    assert!(matches!(series[0].begin_in(&folder.0, 9), Err(Error::Sink(_))));
    fs::remove_file(last).unwrap();
    series[0].begin_in(&folder.0, 9).unwrap().wait().unwrap();
    assert_eq!(folder.names().len(), 5);
}
