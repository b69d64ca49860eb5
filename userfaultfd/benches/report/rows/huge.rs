//! Huge pages, and what comes near them with small ones.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use userfaultfd::LazyMemory;
use userfaultfd::pager::BytesSource;

use crate::contenders::cpus::{self, ALLOWED};
use crate::contenders::{Walk, content, first_byte, shuffled, timed};
use crate::measure::{Round, Samples};
use crate::options::Options;
use crate::picture::block;
use crate::table::{Line, Section, Target, Unit};

/// Where the size of the pool stands, for pages of the default size.
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Reserved huge pages, given back when this is dropped.
struct Reserved {
    size: usize,
    before: usize,
    /// The tests of the library take turns by it.
    _lock: File,
}

impl Reserved {
    fn new(bytes: usize) -> Result<Self, String> {
        let size = meminfo("Hugepagesize:").map_or(0, |kib| kib << 10);
        if size == 0 {
            return Err("the kernel has no huge pages".to_owned());
        }
        let lock = lock().map_err(|error| format!("the lock on huge pages: {error}"))?;
        let before = meminfo("HugePages_Total:").unwrap_or(0);
        let reserved = Self { size, before, _lock: lock };
        let pages = bytes / size;
        fs::write(POOL, (before + pages).to_string()).map_err(|error| format!("{POOL}: {error}"))?;
        let free = meminfo("HugePages_Free:").unwrap_or(0);
        if free < pages {
            return Err(format!("{pages} huge pages are needed, and {free} are free"));
        }
        Ok(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Err(error) = fs::write(POOL, self.before.to_string()) {
            eprintln!("huge pages are not given back: {POOL} should be {}: {error}", self.before);
        }
    }
}

fn meminfo(name: &str) -> Option<usize> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

fn lock() -> io::Result<File> {
    let path = std::env::temp_dir().join("userfaultfd-hugetlb.lock");
    let create = || File::options().create(true).truncate(false).write(true).open(&path);
    let file = File::open(&path).or_else(|_| create())?;
    // SAFETY: touches no memory.
    let locked = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) };
    if locked == 0 { Ok(file) } else { Err(io::Error::last_os_error()) }
}

pub(crate) fn run(options: &Options, mut section: Section) -> Section {
    let len = options.bytes(512 << 20);
    let reserved = match Reserved::new(len) {
        Ok(reserved) => reserved,
        Err(reason) => {
            section.notes.push(format!("Not measured: {reason}."));
            return section;
        }
    };
    let page = userfaultfd::page_size();
    let content: Arc<[u8]> = content(len / page).into();
    let order: Arc<[u32]> = shuffled(len / page).into();
    // Few of all pages, so that most huge pages are touched once or never.
    let few: Arc<[u32]> = order[..len / reserved.size].into();
    let build = |huge: bool| {
        cpus::stay_on(&ALLOWED);
        let builder = LazyMemory::builder(BytesSource::new(Arc::clone(&content)));
        let builder = if huge { builder.huge_pages(reserved.size) } else { builder };
        builder.build().expect("lazy memory")
    };
    let sequential = |huge: bool| -> Round {
        let build = &build;
        let memory = build(huge);
        let mut done = false;
        // A memory is read once.
        Box::new(move || {
            assert!(!std::mem::replace(&mut done, true), "one round");
            let time = timed(|| {
                for (index, bytes) in memory.chunks(userfaultfd::page_size()).enumerate() {
                    assert_eq!(bytes[0], first_byte(index));
                }
            });
            len as f64 / time.as_secs_f64()
        })
    };
    let sparse = |huge: bool| -> Round {
        let (memory, mut walk, count) = (build(huge), Walk::over(&few), few.len());
        Box::new(move || walk.read(memory.as_ptr(), count).as_secs_f64() / count as f64)
    };
    let huge = format!("pager, pages of {}", block(reserved.size));
    let small = format!("pager, pages of {}, default block", block(page));
    for (work, unit, make) in [
        ("from start to end", Unit::Bytes, &sequential as &dyn Fn(bool) -> Round),
        ("a page here and there", Unit::Time, &sparse),
    ] {
        // The pool has room for one memory at a time, so that it goes before the next comes.
        let samples = Samples::take(options.time / 2, 1, || vec![Some(make(true)), Some(make(false))]);
        section.lines.push(Line {
            work: format!("{} {work}, {huge}", block(len)),
            against: small.clone(),
            unit,
            ours: samples.of(0),
            theirs: samples.of(1),
            ratio: samples.ratio(0, 1),
            target: Target::Shown,
        });
    }
    section
}
