use std::io::{ErrorKind, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::LazyMemory;
use crate::source::model::{Counted, Random, byte, check, check_all};
use crate::source::{BytesSource, FileSource};
use crate::support::proc::wait_until;
use crate::support::require;

fn content(len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|at| byte(1, at)).collect();
    // Bytes that can't be compressed, and zeros.
    let mut random = Random::new(7);
    bytes.iter_mut().skip(len / 3).take(len / 4).for_each(|byte| *byte = random.below(256) as u8);
    bytes.iter_mut().skip(len / 2).take(len / 3).for_each(|byte| *byte = 0);
    bytes
}

fn write(bytes: &[u8], frame_size: usize, checksums: bool, level: i32) -> Vec<u8> {
    let writer = SeekableZstdWriter::new(Vec::new()).frame_size(frame_size).checksums(checksums).level(level);
    let mut writer = writer;
    // In pieces that don't fit the frames.
    bytes.chunks(1000).for_each(|piece| writer.write_all(piece).unwrap());
    writer.finish().unwrap()
}

/// A file by hand: frames of zstd's, and what the table says of them.
fn assemble(frames: &[(&[u8], u32, Option<u32>)]) -> Vec<u8> {
    let mut file: Vec<u8> = frames.iter().flat_map(|(frame, ..)| frame.iter().copied()).collect();
    let has_checksums = frames.iter().any(|(.., checksum)| checksum.is_some());
    let mut table = Vec::new();
    for (frame, len, checksum) in frames {
        table.extend((frame.len() as u32).to_le_bytes());
        table.extend(len.to_le_bytes());
        table.extend(checksum.iter().flat_map(|checksum| checksum.to_le_bytes()));
    }
    table.extend((frames.len() as u32).to_le_bytes());
    table.push(if has_checksums { 0x80 } else { 0 });
    table.extend(0x8f92_eab1_u32.to_le_bytes());
    file.extend(0x184d_2a5e_u32.to_le_bytes());
    file.extend((table.len() as u32).to_le_bytes());
    file.extend(table);
    file
}

/// What the program `zstd` makes of its input. `None`: the machine has no such program.
fn zstd(arguments: &[&str], input: &[u8]) -> Option<Vec<u8>> {
    let command = Command::new("zstd").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut program = match command {
        Ok(program) => program,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
            crate::support::has(crate::support::test_name!(), "the program zstd", false);
            return None;
        }
    };
    let mut to = program.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || to.write_all(input).unwrap());
        program.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "zstd {arguments:?}");
    Some(output.stdout)
}

fn named(error: &io::Error) -> ZstdError {
    error.get_ref().and_then(|error| error.downcast_ref::<ZstdError>()).expect("a ZstdError").clone()
}

#[test]
fn every_border_of_frames_of_any_size() {
    require!();
    for (len, frame_size) in
        [(0, 100), (1, 100), (10_000, 1000), (10_001, 1000), (9999, 7), (70_000, 65_536), (5000, 1 << 20)]
    {
        let bytes = content(len);
        for checksums in [false, true] {
            let file = write(&bytes, frame_size, checksums, 1);
            let source = SeekableZstd::open(BytesSource::new(file)).unwrap();
            check_all(&source, &bytes, &mut Random::new(len as u64), 500);
        }
    }
}

#[test]
fn program_zstd_reads_what_we_write() {
    require!();
    let bytes = content(700_000);
    for (frame_size, checksums, level) in [(256 << 10, true, 3), (1000, false, 19), (1 << 20, true, -5)] {
        let file = write(&bytes, frame_size, checksums, level);
        let Some(found) = zstd(&["--decompress", "--stdout", "--quiet"], &file) else { return };
        assert!(found == bytes, "frames of {frame_size} bytes");
    }
}

#[test]
fn frames_of_the_program_zstd_are_read() {
    require!();
    let bytes = content(300_000);
    // Of any sizes, one of them empty, with checksums of their own or without.
    let parts = [&bytes[..1], &bytes[1..1], &bytes[1..100_000], &bytes[100_000..100_777], &bytes[100_777..]];
    for in_table in [false, true] {
        for in_frames in ["--check", "--no-check"] {
            let frames: Vec<Vec<u8>> = parts
                .iter()
                .map_while(|part| zstd(&["-9", "--stdout", "--quiet", in_frames], part))
                .collect();
            if frames.is_empty() {
                return;
            }
            let entries: Vec<_> = frames
                .iter()
                .zip(parts)
                .map(|(frame, part)| {
                    (&frame[..], part.len() as u32, in_table.then(|| content_checksum(part)))
                })
                .collect();
            let source = SeekableZstd::open(BytesSource::new(assemble(&entries))).unwrap();
            check_all(&source, &bytes, &mut Random::new(3), 4096);
        }
    }
    // A file without a table is named so.
    let plain = zstd(&["--stdout", "--quiet"], &bytes).unwrap();
    let error = SeekableZstd::open(BytesSource::new(plain)).unwrap_err();
    assert_eq!(named(&error), ZstdError::NotSeekable);
}

#[test]
fn faults_in_a_frame_decompress_it_once() {
    require!();
    const FRAME: usize = 256 << 10;
    let bytes = content(8 * FRAME);
    let (file, reads) = Counted::new(write(&bytes, FRAME, true, 1));
    let source = SeekableZstd::builder(file).cache_size(3 * FRAME).open().unwrap();
    reads.store(0, Ordering::Relaxed);
    for at in (0..8 * FRAME).step_by(4096) {
        check(&source, &bytes, at..at + 4096);
        assert!(source.frames.bytes() <= 3 * FRAME);
    }
    assert_eq!(reads.swap(0, Ordering::Relaxed), 8);
    // The last three are there, and a whole frame isn't kept.
    check(&source, &bytes, 5 * FRAME..8 * FRAME);
    assert_eq!(reads.swap(0, Ordering::Relaxed), 0);
    check(&source, &bytes, 0..FRAME);
    check(&source, &bytes, 6 * FRAME + 1..6 * FRAME + 2);
    assert_eq!(reads.swap(0, Ordering::Relaxed), 1);
    // A frame that is longer than the cache is read each time.
    let small = SeekableZstd::builder(source.into_inner()).cache_size(1000).open().unwrap();
    reads.store(0, Ordering::Relaxed);
    (0..3).for_each(|_| check(&small, &bytes, 10..20));
    assert_eq!((reads.load(Ordering::Relaxed), small.frames.bytes()), (3, 0));
}

#[test]
fn threads_that_need_a_frame_wait_for_the_one_that_has_it() {
    require!();
    let bytes = content(100_000);
    let (reads, is_open) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let file = {
        let (file, reads, is_open) =
            (write(&bytes, 50_000, true, 1), Arc::clone(&reads), Arc::clone(&is_open));
        struct Held<F>(F, u64);
        impl<F: Fn(u64, &mut [u8]) -> io::Result<PageData> + Send + Sync> PageSource for Held<F> {
            fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
                (self.0)(offset, page)
            }
            fn len(&self) -> Option<u64> {
                Some(self.1)
            }
        }
        let len = file.len() as u64;
        Held(
            move |offset: u64, page: &mut [u8]| {
                reads.fetch_add(1, Ordering::Relaxed);
                if offset == 0 {
                    wait_until(|| is_open.load(Ordering::Relaxed) == 1);
                }
                BytesSource::new(&file).read(offset, page)
            },
            len,
        )
    };
    let source = SeekableZstd::open(file).unwrap();
    reads.store(0, Ordering::Relaxed);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| check(&source, &bytes, 100..200));
        }
        wait_until(|| reads.load(Ordering::Relaxed) == 1);
        // Another frame comes meanwhile.
        check(&source, &bytes, 60_000..60_100);
        is_open.store(1, Ordering::Relaxed);
    });
    assert_eq!(reads.load(Ordering::Relaxed), 2);
}

#[test]
fn memory_comes_from_a_compressed_file_in_a_cache() {
    require!();
    let bytes = content(3_000_000);
    let directory = std::env::temp_dir().join(format!("userfaultfd-zstd-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("image.zst"), write(&bytes, 100_000, true, 3)).unwrap();
    let cache = crate::source::ChunkCache::open(&directory, 1 << 30).unwrap();
    let file = FileSource::open(directory.join("image.zst")).unwrap();
    let source = SeekableZstd::open(cache.image("image").open(file).unwrap()).unwrap();
    let memory = LazyMemory::builder(source).build().unwrap();
    assert!(memory[..bytes.len()] == bytes[..]);
    assert!(memory[bytes.len()..].iter().all(|byte| *byte == 0));
    drop(memory);
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn hostile_tables_are_refused_by_name() {
    require!();
    let bytes = content(5000);
    let file = write(&bytes, 1000, true, 1);
    let open = |file: Vec<u8>| SeekableZstd::open(BytesSource::new(file)).map(drop).map_err(|e| named(&e));
    let changed = |from_end: usize, to: &[u8]| {
        let mut file = file.clone();
        let at = file.len() - from_end;
        file[at..at + to.len()].copy_from_slice(to);
        open(file)
    };
    let damaged = |result| assert!(matches!(result, Err(ZstdError::DamagedTable(_))), "{result:?}");
    assert_eq!(open(Vec::new()), Err(ZstdError::NotSeekable));
    assert_eq!(open(vec![0; 8]), Err(ZstdError::NotSeekable));
    assert_eq!(changed(4, &[0]), Err(ZstdError::NotSeekable));
    assert_eq!(changed(5, &[0x84]), Err(ZstdError::UnknownTable(0x84)));
    // The number of frames: too many for the file, for the format, and too few.
    for frames in [6, 100, 0x7ff_ffff, 0x800_0001, u32::MAX, 4, 0] {
        damaged(changed(9, &frames.to_le_bytes()));
    }
    // The last entry: of 12 bytes before the footer.
    damaged(changed(21, &0u32.to_le_bytes()));
    damaged(changed(21, &(1u32 << 20).to_le_bytes()));
    let long = changed(17, &u32::MAX.to_le_bytes());
    let limit = 64 << 20;
    assert_eq!(long, Err(ZstdError::LongFrame { frame: 4, len: u32::MAX.into(), limit }));
    // What is found when the frame is read.
    let read = |file: Vec<u8>| {
        let source = SeekableZstd::open(BytesSource::new(file)).unwrap();
        check(&source, &bytes, 0..4000);
        named(&source.read(4500, &mut [0; 10]).unwrap_err())
    };
    let mut wrong = file.clone();
    let at = wrong.len() - 13;
    wrong[at] ^= 1;
    assert_eq!(read(wrong), ZstdError::WrongChecksum { frame: 4 });
    for len in [999u32, 1001] {
        let mut wrong = file.clone();
        let at = wrong.len() - 17;
        wrong[at..at + 4].copy_from_slice(&len.to_le_bytes());
        assert!(matches!(read(wrong), ZstdError::DamagedFrame { frame: 4, .. }));
    }
    // A frame of 64 MiB that isn't there takes no time and no memory before it is read.
    let bomb = assemble(&[(&[0; 8], 64 << 20, None)]);
    let error = SeekableZstd::open(BytesSource::new(bomb)).unwrap().read(0, &mut [0; 8]).unwrap_err();
    assert!(matches!(named(&error), ZstdError::DamagedFrame { frame: 0, .. }));
    let endless = |_: u64, _: &mut [u8]| Ok(PageData::Zero);
    let error = SeekableZstd::open(endless).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

#[test]
fn bytes_changed_at_random_show_an_error_or_the_content() {
    require!();
    let bytes = content(20_000);
    let file = write(&bytes, 3000, true, 1);
    let (mut random, mut failed) = (Random::new(11), 0);
    for _ in 0..2000 {
        let mut file = file.clone();
        for _ in 0..1 + random.below(3) {
            let at = random.below(file.len());
            file[at] = random.below(256) as u8;
        }
        if random.below(4) == 0 {
            file.truncate(random.below(file.len()));
        }
        let Ok(source) = SeekableZstd::open(BytesSource::new(file)) else {
            failed += 1;
            continue;
        };
        for at in (0..source.len().unwrap().min(20_000) as usize).step_by(500) {
            let mut page = [0xee; 500];
            match source.read(at as u64, &mut page) {
                // A length in the table may be another: then all behind it is, and is named.
                Ok(PageData::Data) => assert!(page == bytes[at..at + 500], "{at}"),
                Ok(PageData::Zero) => assert!(bytes[at..at + 500].iter().all(|byte| *byte == 0), "{at}"),
                Err(error) => {
                    named(&error);
                    failed += 1;
                    break;
                }
            }
        }
    }
    assert!(failed > 1000, "{failed} failed");
}
