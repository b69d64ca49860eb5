//! A gibibyte that is read from start to end, every byte of it.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use memmap2::{Mmap, MmapOptions};
use userfaultfd::LazyMemory;
use userfaultfd::pager::{BytesSource, FaultAround};

use crate::build;
use crate::contenders::cpus::{self, ALLOWED};
use crate::contenders::{bare, content, memory, raw, timed, warm};
use crate::measure::{Round, Samples};
use crate::options::Options;
use crate::picture::block;
use crate::table::{Line, Section, Target, Unit};

/// The sum of all words, so that each byte is looked at.
fn sum(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes")));
    words.fold(0, u64::wrapping_add)
}

pub(crate) fn run(options: &Options, mut section: Section) -> Section {
    let len = options.bytes(1 << 30);
    let content: Arc<[u8]> = content(len / userfaultfd::page_size()).into();
    let expected = sum(&content);
    let file = CachedFile::new(&content);
    let read = move |bytes: &[u8]| assert_eq!(sum(bytes), expected);
    let rate = move |time: Duration| len as f64 / time.as_secs_f64();
    cpus::stay_on(&ALLOWED);

    let lazy = |sigbus: bool, block: Option<usize>| -> Round {
        let content = Arc::clone(&content);
        Box::new(move || {
            warm(len);
            let source = BytesSource::new(Arc::clone(&content));
            let around = block.map_or(FaultAround::Adaptive { most: 2 << 20 }, FaultAround::Block);
            let memory = if sigbus {
                LazyMemory::sigbus(source).fault_around(around).build()
            } else {
                LazyMemory::builder(source).fault_around(around).build()
            };
            let memory = memory.expect("lazy memory");
            rate(timed(|| read(&memory)))
        })
    };
    let copied = |reading: bool| -> Round {
        let content = Arc::clone(&content);
        Box::new(move || {
            warm(len);
            let fd = raw::open(libc::O_NONBLOCK, 0);
            let mut memory = memory(len);
            raw::register(&fd, &mut memory);
            rate(timed(|| {
                // SAFETY: the content lives on, and nobody refers to the memory.
                let copied =
                    unsafe { bare::copy(fd.as_raw_fd(), content.as_ptr(), memory.as_mut_ptr(), len) };
                assert_eq!(copied, Ok(len));
                if reading {
                    read(&memory);
                }
            }))
        })
    };
    let anonymous = || -> Round {
        let content = Arc::clone(&content);
        Box::new(move || {
            warm(len);
            let mut memory = memory(len);
            rate(timed(|| {
                memory.copy_from_slice(&content);
                read(&memory);
            }))
        })
    };
    let mapped = || -> Round {
        let file = file.open();
        Box::new(move || {
            let memory = map(&file);
            rate(timed(|| read(&memory)))
        })
    };
    let small = 64 << 10;
    let setup = || {
        let all = [
            lazy(false, None),
            copied(true),
            mapped(),
            lazy(false, Some(small)),
            lazy(true, None),
            anonymous(),
            copied(false),
        ];
        all.into_iter().map(Some).collect()
    };
    let samples = Samples::take(options.time, 1, setup);
    let small = format!("pager, blocks of {}", block(small));
    let lines = [
        ("pager, default", 0, "one bulk UFFDIO_COPY, then read", 1, Target::AtLeast(0.85)),
        ("pager, default", 0, "a page-cached file, mapped", 2, Target::Shown),
        (small.as_str(), 3, "one bulk UFFDIO_COPY, then read", 1, Target::Shown),
        ("pager, Sigbus", 4, "one bulk UFFDIO_COPY, then read", 1, Target::Shown),
        ("pager, default", 0, "memcpy to anonymous memory, then read", 5, Target::Shown),
        ("pager, default", 0, "the bulk UFFDIO_COPY alone, nothing read", 6, Target::Shown),
    ];
    for (ours, first, theirs, second, target) in lines {
        section.lines.push(Line {
            work: format!("{} {ours}", block(len)),
            against: theirs.to_owned(),
            unit: Unit::Bytes,
            ours: samples.of(first),
            theirs: samples.of(second),
            ratio: samples.ratio(first, second),
            target,
        });
    }
    section
}

/// A file that is in the page cache, and removed in the end.
struct CachedFile(std::path::PathBuf);

impl CachedFile {
    fn new(content: &[u8]) -> Self {
        let folder = build::folder();
        fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join(format!("content.{}", std::process::id()));
        let mut file = File::create(&path).expect("a file");
        file.write_all(content).expect("space on the disk");
        file.sync_all().expect("a file that is written"); // not while others are measured
        Self(path)
    }

    fn open(&self) -> File {
        File::open(&self.0).expect("a file")
    }
}

impl Drop for CachedFile {
    fn drop(&mut self) {
        fs::remove_file(&self.0).expect("a file");
    }
}

fn map(file: &File) -> Mmap {
    // SAFETY: nobody but this process knows the file, and it is written no more.
    unsafe { MmapOptions::new().map(file) }.expect("a mapping")
}
