//! What is compared, each in a process of its own that a group limits.

use std::fs::{self, File};
use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, io, mem};

use memmap2::{Advice, MmapOptions, MmapRaw};
use userfaultfd::pager::{Budget, FaultAround, FileSource, FileStore, PageData, PageSource};
use userfaultfd::{LazyMemory, PagedMemory, page_size};

use super::group::Group;
use crate::random::Random;
use crate::traces::{self, Zipf};

/// Bytes of the group's limit that aren't in the budget: for the program, its accesses, page tables and staging.
pub(crate) const ROOM_BYTES: usize = 26 << 20;

/// Accesses between two looks at the clock.
const ACCESSES_PER_LOOK: u64 = 16;

/// Whose memory it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    Ours,
    Mmap,
}

/// What is done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Reads of pages, as often as they are popular, by so many threads.
    Zipf(usize),
    /// All pages in order, twice.
    Sequential,
    /// Half of the accesses write, and all is durable each second.
    Writes,
    /// Pages of half of the memory at random, beside a scan without an end.
    HotSet,
}

impl Work {
    const ALL: [(&str, Self); 5] = [
        ("zipf-1", Self::Zipf(1)),
        ("zipf-4", Self::Zipf(4)),
        ("sequential", Self::Sequential),
        ("writes", Self::Writes),
        ("hot-set", Self::HotSet),
    ];
}

/// The file, the limit, and how long it is measured.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    pub(crate) file: PathBuf,
    pub(crate) bytes: usize,
    pub(crate) limit: usize,
    pub(crate) seconds: f64,
    /// Past the page cache, where the file system can.
    pub(crate) direct: bool,
}

impl Setting {
    /// How many there are beside a hot set: enough that each of its pages is accessed several times while memory warms up.
    /// What is measured is what stays in memory, not the first accesses.
    pub(crate) fn hot_set_accesses(&self) -> usize {
        (self.seconds * 200e3) as usize
    }
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Figures {
    /// Accesses to pages, in a second.
    pub(crate) rate: f64,
    /// Of the hot set alone.
    pub(crate) miss_ratio: f64,
    /// Bytes that the disk was given for each access.
    pub(crate) written: f64,
}

/// Measures one in a process of its own. Its group is the limit of that process.
pub(crate) fn measure(
    contender: Contender,
    work: Work,
    setting: &Setting,
    group: Option<&Group>,
) -> Result<Figures, String> {
    let program = env::current_exe().map_err(|error| format!("this program: {error}"))?;
    drop_from_cache(&setting.file).map_err(|error| format!("{}: {error}", setting.file.display()))?;
    let name = Work::ALL.iter().find(|(_, other)| *other == work).expect("it is one of them").0;
    let mut command = Command::new(program);
    command.arg("--contender").arg(format!("{contender:?}")).arg(name).arg(&setting.file);
    command.args([setting.bytes, setting.limit].map(|number| number.to_string()));
    command.args([setting.seconds.to_string(), setting.direct.to_string()]);
    command.args(group.map(|group| &group.0));
    let output = command.output().map_err(|error| format!("{contender:?}: {error}"))?;
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{contender:?}, {work:?}: {}: {}", output.status, told.trim()));
    }
    let told = String::from_utf8_lossy(&output.stdout);
    let numbers: Vec<f64> = told.split_whitespace().filter_map(|number| number.parse().ok()).collect();
    let &[rate, miss_ratio, written] = numbers.as_slice() else {
        return Err(format!("{contender:?} answered {told:?}"));
    };
    Ok(Figures { rate, miss_ratio, written })
}

/// Takes a file out of the page cache: what lies there is another group's.
fn drop_from_cache(file: &Path) -> io::Result<()> {
    let file = File::open(file)?;
    file.sync_all()?;
    // SAFETY: touches no memory.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// What the process does that [`measure`] starts.
pub(crate) fn run(args: &[String]) -> Result<(), String> {
    let [contender, work, file, bytes, limit, seconds, direct, group @ ..] = args else {
        return Err("too few arguments".to_owned());
    };
    if let Some(group) = group.first() {
        // Before there is any memory that counts.
        let joined = fs::write(Path::new(group).join("cgroup.procs"), "0");
        joined.map_err(|error| format!("{group}: {error}"))?;
    }
    let number = |text: &String| text.parse().map_err(|_| format!("{text} is no number"));
    let setting = Setting {
        file: file.into(),
        bytes: number(bytes)?,
        limit: number(limit)?,
        seconds: seconds.parse().map_err(|_| format!("{seconds} is no number"))?,
        direct: direct == "true",
    };
    let contender = if contender == "Ours" { Contender::Ours } else { Contender::Mmap };
    let Some((_, work)) = Work::ALL.iter().find(|(name, _)| name == work) else {
        return Err(format!("{work}: no such work"));
    };
    let figures = match work {
        Work::Zipf(threads) => reads(contender, &setting, *threads),
        Work::Sequential => sequential(contender, &setting),
        Work::Writes => writes(contender, &setting),
        Work::HotSet => hot_set(contender, &setting),
    };
    let Figures { rate, miss_ratio, written } = figures.map_err(|error| error.to_string())?;
    println!("{rate} {miss_ratio} {written}");
    Ok(())
}

/// A budget that leaves room in the group.
fn budget(setting: &Setting) -> Budget {
    Budget::new(setting.limit - ROOM_BYTES)
}

fn source(setting: &Setting) -> io::Result<FileSource> {
    FileSource::open(&setting.file)?.direct(setting.direct)
}

fn map(setting: &Setting, advice: Advice) -> io::Result<MmapRaw> {
    let file = File::options().read(true).write(true).open(&setting.file)?;
    let map = MmapOptions::new().map_raw(&file)?;
    map.advise(advice)?;
    Ok(map)
}

/// Reads a page.
fn read(memory: *mut u8, page: u32) {
    let byte = memory.wrapping_add(page as usize * page_size());
    // SAFETY: the page is one of a mapping that is there.
    black_box(unsafe { byte.read_volatile() });
}

/// Accesses for some time. Returns how many there were, and how long it took.
fn for_some_time(
    seconds: f64,
    accesses: impl Iterator<Item = u32>,
    mut access: impl FnMut(u32),
) -> (u64, Duration) {
    let (start, mut count) = (Instant::now(), 0);
    for page in accesses {
        access(page);
        count += 1;
        if count % ACCESSES_PER_LOOK == 0 && start.elapsed().as_secs_f64() >= seconds {
            break;
        }
    }
    (count, start.elapsed())
}

/// Accesses that fill memory with what is popular.
fn warm_up(setting: &Setting) -> usize {
    2 * setting.limit / page_size()
}

/// The same pages are popular for all.
fn popular(setting: &Setting) -> Zipf {
    Zipf::new(setting.bytes / page_size(), 1.0, &mut Random::new(1))
}

/// Accesses without an end, none of which is made for another: what repeats itself might fit into memory.
fn accesses(zipf: &Zipf, seed: u64) -> impl Iterator<Item = u32> {
    let mut random = Random::new(seed);
    std::iter::repeat_with(move || zipf.next(&mut random))
}

fn reads(contender: Contender, setting: &Setting, threads: usize) -> io::Result<Figures> {
    let zipf = &popular(setting);
    let run = |memory: *mut u8| {
        let address = memory.expose_provenance();
        accesses(zipf, 1).take(warm_up(setting)).for_each(|page| read(memory, page));
        let start = &Barrier::new(threads);
        let read_some = move |seed| {
            let memory = std::ptr::with_exposed_provenance_mut(address);
            start.wait();
            let (count, time) =
                for_some_time(setting.seconds, accesses(zipf, seed), |page| read(memory, page));
            count as f64 / time.as_secs_f64()
        };
        thread::scope(|scope| {
            let readers: Vec<_> =
                (0..threads).map(|at| scope.spawn(move || read_some(at as u64 + 2))).collect();
            readers.into_iter().map(|reader| reader.join().expect("a reader")).sum()
        })
    };
    let rate = match contender {
        Contender::Mmap => run(map(setting, Advice::Random)?.as_mut_ptr()),
        Contender::Ours => {
            let memory = LazyMemory::builder(source(setting)?).fault_around(FaultAround::Page);
            let memory = memory.budget(&budget(setting)).build().map_err(io::Error::other)?;
            run(memory.as_raw_slice().cast())
        }
    };
    Ok(Figures { rate, ..Figures::default() })
}

fn sequential(contender: Contender, setting: &Setting) -> io::Result<Figures> {
    let pages = (setting.bytes / page_size()) as u32;
    let run = |memory: *mut u8| {
        let start = Instant::now();
        (0..2).for_each(|_| (0..pages).for_each(|page| read(memory, page)));
        2.0 * f64::from(pages) / start.elapsed().as_secs_f64()
    };
    let rate = match contender {
        Contender::Mmap => run(map(setting, Advice::Normal)?.as_mut_ptr()),
        Contender::Ours => {
            let memory = LazyMemory::builder(source(setting)?).read_ahead(2, 8 << 20);
            let memory = memory.budget(&budget(setting)).build().map_err(io::Error::other)?;
            run(memory.as_raw_slice().cast())
        }
    };
    Ok(Figures { rate, ..Figures::default() })
}

/// Memory that is made durable while others write to it.
trait Durable: Sync {
    fn memory(&self) -> *mut u8;
    fn flush(&self) -> io::Result<()>;
}

impl Durable for MmapRaw {
    fn memory(&self) -> *mut u8 {
        self.as_mut_ptr()
    }

    fn flush(&self) -> io::Result<()> {
        MmapRaw::flush(self)
    }
}

impl Durable for PagedMemory {
    fn memory(&self) -> *mut u8 {
        self.as_raw_slice().cast()
    }

    fn flush(&self) -> io::Result<()> {
        PagedMemory::flush(self).map_err(io::Error::other)
    }
}

fn writes(contender: Contender, setting: &Setting) -> io::Result<Figures> {
    let memory: Box<dyn Durable> = match contender {
        Contender::Mmap => Box::new(map(setting, Advice::Random)?),
        Contender::Ours => {
            let store = FileStore::open(&setting.file)?.direct(setting.direct)?;
            let memory = PagedMemory::builder(store).fault_around(FaultAround::Page);
            Box::new(memory.budget(&budget(setting)).build().map_err(io::Error::other)?)
        }
    };
    let (start, mut writes) = (memory.memory(), false);
    let mut access = |page: u32| {
        read(start, page);
        writes = !writes;
        if writes {
            let byte = start.wrapping_add(page as usize * page_size() + 8);
            // SAFETY: the page is one of a mapping that is there, and another byte of it is read.
            unsafe { byte.write_volatile(byte.addr() as u8) };
        }
    };
    let zipf = popular(setting);
    accesses(&zipf, 1).take(warm_up(setting)).for_each(&mut access);
    memory.flush()?;
    let (is_over, before) = (AtomicBool::new(false), written_to_disk(&setting.file));
    let clock = Instant::now();
    let (count, _) = thread::scope(|scope| {
        let flushing = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let begun = Instant::now();
                memory.flush()?;
                thread::park_timeout(Duration::from_secs(1).saturating_sub(begun.elapsed()));
            }
            Ok::<(), io::Error>(())
        });
        let figures = for_some_time(setting.seconds, accesses(&zipf, 2), &mut access);
        is_over.store(true, Ordering::Relaxed);
        flushing.thread().unpark();
        flushing.join().expect("a thread that flushes").map(|()| figures)
    })?;
    // What was written is durable at the end of what is measured.
    memory.flush()?;
    let time = clock.elapsed().as_secs_f64();
    let written = match (before, written_to_disk(&setting.file)) {
        (Some(before), Some(after)) => (after - before) as f64 / count as f64,
        _ => f64::NAN,
    };
    Ok(Figures { rate: count as f64 / time, written, ..Figures::default() })
}

/// Bytes that were written to the disk of a file so far, by whatever program.
fn written_to_disk(file: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    /// Of the kernel's documents: admin-guide/iostats.rst. Counted in these.
    const SECTOR_BYTES: u64 = 512;
    let device = fs::metadata(file).ok()?.dev();
    let (major, minor) = (libc::major(device), libc::minor(device));
    let told = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    Some(told.split_whitespace().nth(6)?.parse::<u64>().ok()? * SECTOR_BYTES)
}

/// A source that counts the pages of the hot set that it reads.
struct Counting {
    source: FileSource,
    hot_end: u64,
    hot_reads: Arc<AtomicU64>,
}

impl PageSource for Counting {
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<PageData> {
        let hot = self.hot_end.saturating_sub(offset).min(bytes.len() as u64) / page_size() as u64;
        self.hot_reads.fetch_add(hot, Ordering::Relaxed);
        self.source.read(offset, bytes)
    }

    fn len(&self) -> Option<u64> {
        self.source.len()
    }
}

fn hot_set(contender: Contender, setting: &Setting) -> io::Result<Figures> {
    let (pages, frames) = (setting.bytes / page_size(), setting.limit / page_size());
    let trace = traces::hot_set(pages, frames, setting.hot_set_accesses());
    let (warm, measured) = trace.accesses.split_at(trace.accesses.len() / 4);
    let hot = measured.iter().filter(|page| **page < trace.hot).count() as f64;
    let rate = |start: Instant| measured.len() as f64 / start.elapsed().as_secs_f64();
    match contender {
        Contender::Mmap => {
            let map = map(setting, Advice::Random)?;
            warm.iter().for_each(|page| read(map.as_mut_ptr(), *page));
            let (start, mut misses) = (Instant::now(), 0);
            for page in measured {
                let before = if *page < trace.hot { major_faults() } else { 0 };
                read(map.as_mut_ptr(), *page);
                if *page < trace.hot {
                    misses += major_faults() - before;
                }
            }
            Ok(Figures { rate: rate(start), miss_ratio: misses as f64 / hot, ..Figures::default() })
        }
        Contender::Ours => {
            let (hot_reads, hot_end) = (Arc::default(), u64::from(trace.hot) * page_size() as u64);
            let source = Counting { source: source(setting)?, hot_end, hot_reads: Arc::clone(&hot_reads) };
            let memory = LazyMemory::builder(source).fault_around(FaultAround::Page);
            let memory = memory.budget(&budget(setting)).build().map_err(io::Error::other)?;
            let address = memory.as_raw_slice().cast();
            warm.iter().for_each(|page| read(address, *page));
            let (start, before) = (Instant::now(), hot_reads.load(Ordering::Relaxed));
            measured.iter().for_each(|page| read(address, *page));
            let misses = hot_reads.load(Ordering::Relaxed) - before;
            Ok(Figures { rate: rate(start), miss_ratio: misses as f64 / hot, ..Figures::default() })
        }
    }
}

/// Faults of this thread that waited for a disk.
fn major_faults() -> i64 {
    // SAFETY: numbers, for which zeros are good.
    let mut usage: libc::rusage = unsafe { mem::zeroed() };
    // SAFETY: the structure is the call's.
    let done = unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    usage.ru_majflt
}
