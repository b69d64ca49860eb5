//! Images of other programs, copied into snapshot files and back.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt};

use userfaultfd::snapshot::{
    ImageCopy, ImageFormat, MemoryImage, Region, SnapshotReader, SnapshotWriter, changed_ranges,
};
use userfaultfd::source::{BytesSource, LayeredSource, PageData, PageSource, ZeroSource};

use crate::chunks::{compressions, options, random_memory};
use crate::file::Folder;
use crate::support::random::Random;
use crate::support::{page, require, test_name};

fn all_of(source: &dyn PageSource) -> Vec<u8> {
    let mut all = vec![0xee; source.len().unwrap() as usize];
    if source.read(0, &mut all).unwrap() == PageData::Zero {
        all.fill(0);
    }
    all
}

/// A migration file of QEMU with one block of RAM, from the description of the format.
fn mapped_ram(memory: &[u8]) -> Vec<u8> {
    let pages = memory.len() / page();
    let mut bytes = b"QEVM\0\0\0\x03\x01\0\0\0\x02\x03ram".to_vec();
    bytes.extend([0, 0, 0, 0, 0, 0, 0, 4]);
    bytes.extend((memory.len() as u64 | 4).to_be_bytes());
    bytes.push(6);
    bytes.extend(b"pc.ram");
    bytes.extend((memory.len() as u64).to_be_bytes());
    let bitmap = bytes.len() as u64 + 28;
    bytes.extend(1_u32.to_be_bytes());
    for number in [page() as u64, bitmap, 1 << 20] {
        bytes.extend(number.to_be_bytes());
    }
    let mut words = vec![0_usize; pages.div_ceil(usize::BITS as usize)];
    let is_there = |number: &usize| memory[number * page()..][..page()].iter().any(|byte| *byte != 0);
    for number in (0..pages).filter(is_there) {
        words[number / usize::BITS as usize] |= 1 << (number % usize::BITS as usize);
    }
    words.iter().for_each(|word| bytes.extend(word.to_ne_bytes()));
    bytes.resize(1 << 20, 0);
    bytes.extend(memory);
    bytes
}

#[test]
fn names_of_formats_are_parsed_as_they_are_printed() {
    require!();
    for name in ImageFormat::names() {
        let format: ImageFormat = name.parse().unwrap();
        match name {
            "firecracker" => assert_eq!(format, ImageFormat::Raw),
            _ => assert_eq!(format.to_string(), name),
        }
    }
    let error = "qcow2".parse::<ImageFormat>().unwrap_err();
    assert!(error.to_string().contains("qcow2") && error.to_string().contains("mapped-ram"), "{error}");
}

#[test]
fn images_of_each_format_are_copied_there_and_back() {
    require!();
    for seed in 0..2 {
        let mut random = Random::new(seed);
        let folder = Folder::new(&format!("{}{seed}", test_name!()));
        let memory = random_memory(&mut random, 60);
        fs::write(folder.path("raw"), &memory).unwrap();
        fs::create_dir(folder.path("vm")).unwrap();
        fs::write(folder.path("vm").join("memory-ranges"), &memory).unwrap();
        fs::write(folder.path("qemu"), mapped_ram(&memory)).unwrap();
        for (name, format) in [
            ("raw", ImageFormat::Raw),
            ("vm", ImageFormat::CloudHypervisor),
            ("qemu", ImageFormat::MappedRam),
        ] {
            let image = MemoryImage::open(folder.path(name)).unwrap();
            assert_eq!((image.format(), image.len()), (format, Some(memory.len() as u64)));
            assert!(all_of(&image) == memory, "{name}");
            for compression in compressions() {
                let mut told = Vec::new();
                let writer = SnapshotWriter::create(folder.path("image")).unwrap();
                let writer = writer.chunks(&options(compression));
                let copy = ImageCopy::new(&image).regions(image.regions().iter().cloned());
                let copy = copy.progress(|done, all| {
                    told.push((done, all));
                    Ok(())
                });
                copy.write(writer).unwrap();
                let len = memory.len() as u64;
                assert!(told.is_sorted() && told.last() == Some(&(len, len)), "{told:?}");
                let copied = MemoryImage::open(folder.path("image")).unwrap();
                assert_eq!(copied.format(), ImageFormat::Snapshot);
                assert_eq!(copied.regions(), image.regions());
                assert!(all_of(&copied) == memory);
                let data = ImageCopy::new(&copied).write_raw(folder.path("back")).unwrap();
                assert!(fs::read(folder.path("back")).unwrap() == memory);
                let zeros = memory.chunks(page()).filter(|page| page.iter().all(|byte| *byte == 0)).count();
                assert_eq!(data as usize, memory.len() - zeros * page());
            }
        }
        // Zeros are holes, where the file system has them.
        let back = fs::metadata(folder.path("back")).unwrap();
        assert!(back.blocks() * 512 <= memory.len() as u64);
        ImageCopy::new(&BytesSource::new(vec![0; 1 << 20])).write_raw(folder.path("back")).unwrap();
        assert_eq!(fs::metadata(folder.path("back")).unwrap().len(), 1 << 20);
    }
}

#[test]
fn diffs_become_part_of_a_copy_or_an_increment() {
    require!();
    let mut random = Random::new(1);
    let folder = Folder::new(test_name!());
    let (mut memory, newer) = (random_memory(&mut random, 64), random_memory(&mut random, 64));
    fs::write(folder.path("raw"), &memory).unwrap();
    let base = SnapshotWriter::create(folder.path("base")).unwrap().chunks(&options(compressions()[0]));
    let id = base.id();
    ImageCopy::new(&MemoryImage::open(folder.path("raw")).unwrap()).write(base).unwrap();
    // A diff: some pages, also of zeros, which are data.
    let diff = File::create(folder.path("diff")).unwrap();
    diff.set_len(memory.len() as u64).unwrap();
    for number in [0, 3, 4, 5, 40, 63] {
        let part = number * page()..(number + 1) * page();
        let bytes = if number == 4 { vec![0; page()] } else { newer[part.clone()].to_vec() };
        diff.write_all_at(&bytes, part.start as u64).unwrap();
        memory[part].copy_from_slice(&bytes);
    }
    let mut image = MemoryImage::open(folder.path("raw")).unwrap();
    image.push_diff(File::open(folder.path("diff")).unwrap()).unwrap();
    assert!(all_of(&image) == memory);

    let diff = File::open(folder.path("diff")).unwrap();
    let extents = LayeredSource::extents_of(&diff).unwrap();
    let saved: u64 = extents.iter().map(|extent| extent.end - extent.start).sum();
    let diff = userfaultfd::source::FileSource::new(diff).unwrap().sparse(false);
    let writer = SnapshotWriter::create(folder.path("increment")).unwrap().follows(id);
    ImageCopy::new(&diff).extents(extents).write(writer).unwrap();
    let increment = SnapshotReader::open(folder.path("increment")).unwrap();
    assert_eq!(increment.extents().map(|extent| extent.end - extent.start).sum::<u64>(), saved);
    let error = MemoryImage::open(folder.path("increment")).unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidData && error.to_string().contains("changed since"), "{error}");
    let base = SnapshotReader::open(folder.path("base")).unwrap();
    let both = MemoryImage::of_snapshot(increment.on(base).unwrap()).unwrap();
    assert!(all_of(&both) == memory);
}

#[test]
fn changed_ranges_are_those_of_pages_that_differ() {
    require!();
    for seed in 0..8 {
        let mut random = Random::new(seed);
        let pages = 1 + random.below(400);
        let old = random_memory(&mut random, pages);
        let mut new = old.clone();
        let mut expected = vec![false; pages];
        for _ in 0..random.below(40) {
            let number = random.below(pages);
            let at = number * page() + random.below(page());
            if random.one_in(4) {
                new[number * page()..][..page()].fill(0);
            } else {
                new[at] ^= 1;
            }
        }
        for (number, differs) in expected.iter_mut().enumerate() {
            let part = number * page()..(number + 1) * page();
            *differs = old[part.clone()] != new[part];
        }
        let changed = changed_ranges(&BytesSource::new(old), &BytesSource::new(new), |_, _| Ok(())).unwrap();
        let mut found = vec![false; pages];
        for range in &changed {
            found[range.start as usize / page()..range.end as usize / page()].fill(true);
        }
        assert!(found == expected, "{seed}");
        assert!(changed.windows(2).all(|two| two[0].end < two[1].start), "{changed:?}");
    }
    let (one, two) = (BytesSource::new(vec![0; page()]), BytesSource::new(vec![0; 2 * page()]));
    assert_eq!(changed_ranges(&one, &two, |_, _| Ok(())).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn copies_that_cannot_be_are_refused() {
    require!();
    let folder = Folder::new(test_name!());
    let image = BytesSource::new(vec![1; 4 * page()]);
    let size = page() as u64;
    let writer = || SnapshotWriter::new(Vec::new()).unwrap();
    let id = writer().id();
    let refused = |copy: ImageCopy<'_>, writer| {
        assert_eq!(copy.write(writer).unwrap_err().kind(), ErrorKind::InvalidInput);
    };
    refused(ImageCopy::new(&BytesSource::new(vec![1; page() + 1])), writer());
    refused(ImageCopy::new(&ZeroSource), writer());
    refused(ImageCopy::new(&image).regions([Region::new(0..3 * size, size)]), writer());
    // Extents without a snapshot before, and the other way round.
    refused(ImageCopy::new(&image).extents(std::iter::once(0..size)), writer());
    refused(ImageCopy::new(&image), writer().follows(id));
    for extents in [
        vec![0..size, size..size * 3 / 2],
        vec![size..2 * size, 0..size],
        vec![0..size, size..5 * size],
        vec![0..2 * size, size..2 * size],
    ] {
        refused(ImageCopy::new(&image).extents(extents), writer().follows(id));
    }
    let raw = ImageCopy::new(&image).extents(std::iter::once(0..size)).write_raw(folder.path("raw"));
    assert_eq!(raw.unwrap_err().kind(), ErrorKind::InvalidInput);

    // An error of the source or of the program leaves nothing.
    let failing = |offset: u64, page: &mut [u8]| match offset {
        0 => {
            page.fill(1);
            Ok(PageData::Data)
        }
        _ => Err(io::Error::from(ErrorKind::TimedOut)),
    };
    let mut source = userfaultfd::source::ConcatSource::new();
    source.push_part(failing, 0..4 << 20).unwrap();
    let stop = |_, _| Err(io::Error::from(ErrorKind::Interrupted));
    for (copy, kind) in [
        (ImageCopy::new(&source), ErrorKind::TimedOut),
        (ImageCopy::new(&image).progress(stop), ErrorKind::Interrupted),
    ] {
        let writer = SnapshotWriter::create(folder.path("image")).unwrap();
        assert_eq!(copy.write(writer).unwrap_err().kind(), kind);
    }
    let error = ImageCopy::new(&source).write_raw(folder.path("raw")).unwrap_err();
    assert_eq!((error.kind(), folder.names()), (ErrorKind::TimedOut, Vec::<String>::new()));
    // Folders and files of no format.
    assert_eq!(MemoryImage::open(&folder.0).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(MemoryImage::open(folder.path("none")).unwrap_err().kind(), ErrorKind::NotFound);
    fs::write(folder.path("bad"), [b"UFFDSNAP".as_slice(), &[1; 200]].concat()).unwrap();
    assert_eq!(MemoryImage::open(folder.path("bad")).unwrap_err().kind(), ErrorKind::InvalidData);
}

#[cfg(feature = "pager")]
mod working_sets {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use userfaultfd::LazyMemory;
    use userfaultfd::pager::WorkingSet;

    use super::*;
    use crate::chunks::Noting;
    use crate::file::file;

    /// An image whose pages have their numbers, with a set.
    fn image(pages: usize, set: &WorkingSet, compression: userfaultfd::snapshot::Compression) -> Vec<u8> {
        let memory: Vec<u8> = (0..pages * page()).map(|at| (at / page()) as u8 | 1).collect();
        let writer = SnapshotWriter::new(Vec::new()).unwrap().chunks(&options(compression));
        let source = BytesSource::new(memory);
        let copy = ImageCopy::new(&source).working_set(set.clone());
        copy.write(writer).unwrap().into_inner()
    }

    #[test]
    fn restore_begins_with_one_long_read() {
        require!();
        const PAGES: usize = 1000;
        for compression in compressions() {
            // Far from each other, so that a replay reads no other pages with them.
            let set = (0..PAGES).filter(|number| number % 40 < 4).rev();
            let set = WorkingSet::from_pages(page(), PAGES, set).unwrap();
            let source = Noting::new(image(PAGES, &set, compression));
            let len = source.len().unwrap();
            let image = SnapshotReader::from_source(source.clone()).unwrap();
            assert_eq!(image.working_set().unwrap().as_ref(), Some(&set));
            assert_eq!(source.take().len(), 1);
            let read = image.preload().unwrap();
            // From behind the header on, and not much more than the set.
            assert_eq!(source.take(), [(64, read as usize)]);
            assert!(read <= (set.len() * page()) as u64 + (64 << 10) && read < len / 2, "{read} of {len}");
            let memory = LazyMemory::new(PAGES * page(), image).unwrap();
            let mut replay = memory.replay(&set).unwrap();
            let report = replay.wait();
            assert_eq!(source.take(), [], "{report:?}");
            for number in 0..PAGES {
                assert_eq!(memory[number * page()], number as u8 | 1);
            }
            assert_ne!(source.take(), []);
        }
    }

    /// A source whose bytes are wrong for a while, as by a bad connection.
    struct Wrong(Vec<u8>, Arc<AtomicBool>);

    impl PageSource for Wrong {
        fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
            page.copy_from_slice(&self.0[offset as usize..][..page.len()]);
            if self.1.load(Ordering::Relaxed) {
                page.iter_mut().for_each(|byte| *byte ^= 1);
            }
            Ok(PageData::Data)
        }

        fn len(&self) -> Option<u64> {
            Some(self.0.len() as u64)
        }
    }

    #[test]
    fn what_was_wrong_in_the_long_read_is_read_again() {
        require!();
        let set = WorkingSet::from_pages(page(), 200, 0..100).unwrap();
        let is_wrong = Arc::new(AtomicBool::new(false));
        let bytes = image(200, &set, compressions()[0]);
        let image = SnapshotReader::from_source(Wrong(bytes, Arc::clone(&is_wrong))).unwrap();
        is_wrong.store(true, Ordering::Relaxed);
        assert!(image.preload().unwrap() > 128 << 10, "several chunks");
        is_wrong.store(false, Ordering::Relaxed);
        let mut page = vec![0; page()];
        assert_eq!(image.read(0, &mut page).unwrap_err().kind(), ErrorKind::InvalidData);
        // A pager tries again, too.
        assert_eq!((image.read(0, &mut page).unwrap(), page[0]), (PageData::Data, 1));
    }

    #[test]
    fn pages_of_the_set_come_first_in_its_order() {
        require!();
        let set = WorkingSet::from_pages(page(), 64, [50, 51, 9, 3]).unwrap();
        let bytes = image(64, &set, compressions()[0]);
        let first: Vec<u8> = bytes[64..].chunks(page()).take(6).map(|page| page[0]).collect();
        assert_eq!(first, [50 | 1, 51, 9, 3, 1, 1]);
        let image = SnapshotReader::new(file(&bytes)).unwrap();
        image.verify().unwrap();
        assert!(all_of(&image).chunks(page()).enumerate().all(|(number, page)| page[0] == number as u8 | 1));
        // A set of larger pages, and of smaller ones.
        for size in [page() * 2, page() / 2] {
            let set = set.with_page_size(size).unwrap();
            let bytes = super::working_sets::image(64, &set, compressions()[0]);
            let reader = SnapshotReader::new(file(&bytes)).unwrap();
            assert_eq!(reader.working_set().unwrap(), Some(set));
            assert!(all_of(&reader) == all_of(&image));
        }
    }

    #[test]
    fn working_set_of_another_image_is_refused() {
        require!();
        let image = BytesSource::new(vec![1; 4 * page()]);
        let chunked = || SnapshotWriter::new(Vec::new()).unwrap().chunks(&options(compressions()[0]));
        let set = |pages| WorkingSet::from_pages(page(), pages, [1]).unwrap();
        let refused = |set, writer| {
            let error = ImageCopy::new(&image).working_set(set).write(writer).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
        };
        refused(set(5), chunked());
        refused(set(4), SnapshotWriter::new(Vec::new()).unwrap());
        let without =
            SnapshotReader::new(file(&ImageCopy::new(&image).write(chunked()).unwrap().into_inner()));
        let without = without.unwrap();
        assert_eq!((without.working_set().unwrap(), without.preload().unwrap()), (None, 0));
    }
}
