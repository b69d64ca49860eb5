//! Handlers that die by SIGKILL, and those that go on.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fs, io, thread};

use userfaultfd::handoff::{
    AdoptError, Dialect, Handoff, Listener, MemoryRegion, Offer, adopt, left_behind, send,
};
use userfaultfd::pager::{PageData, PageSource, Pager};
use userfaultfd::{FeatureFlags, UffdBuilder};

use crate::monitor::{Image, Monitor, PAGES, Style, byte, path, shown};
use crate::support::child::{self, Forked};
use crate::support::memory::{Kind, Memory};
use crate::support::proc::wait_until;
use crate::support::random::Random;
use crate::support::{page, require, test_name};

/// A directory for states, which is removed when this is dropped.
#[derive(Debug)]
struct States(PathBuf);

impl States {
    fn new() -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = Path::new("/dev/shm").join(format!("userfaultfd-states-{}-{number}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    fn files(&self) -> usize {
        fs::read_dir(&self.0).unwrap().count()
    }
}

impl Drop for States {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// A handler in a process of its own, which serves one process until it is killed.
struct Handler {
    process: Forked,
    /// Gets a byte once it listens, if it does, and one once it serves.
    socket: UnixStream,
}

impl Handler {
    fn start<S: PageSource + 'static>(
        states: &States,
        handoff: impl FnOnce(&UnixStream) -> Handoff,
        source: impl Fn(&MemoryRegion) -> S,
    ) -> Self {
        let (socket, there) = UnixStream::pair().unwrap();
        let process = child::fork(|| {
            let pager = Pager::builder().state(&states.0).threads(2).build().unwrap();
            let mut handoff = handoff(&there);
            handoff.regions.iter_mut().for_each(|region| region.source = Some("image".into()));
            let _served = pager.serve(handoff, source).unwrap();
            (&there).write_all(&[1]).unwrap();
            loop {
                thread::park();
            }
        });
        Self { process, socket }
    }

    /// Starts one that listens.
    fn listen<S: PageSource + 'static>(
        states: &States,
        path: &Path,
        source: impl Fn(&MemoryRegion) -> S,
    ) -> Self {
        let accept = |mut socket: &UnixStream| {
            let mut listener = Listener::bind(path).unwrap();
            socket.write_all(&[1]).unwrap();
            listener.accept().unwrap()
        };
        let mut handler = Self::start(states, accept, source);
        handler.wait();
        handler
    }

    /// Starts one that goes on with a process.
    fn adopt<S: PageSource + 'static>(
        states: &States,
        pid: u32,
        source: impl Fn(&MemoryRegion) -> S,
    ) -> Self {
        Self::start(states, |_| adopt(&states.0, pid).unwrap(), source)
    }

    fn wait(&mut self) {
        self.socket.read_exact(&mut [0]).expect("the handler serves");
    }

    fn kill(self) {
        self.process.kill();
        assert_eq!(self.process.wait(), libc::SIGKILL, "the handler serves until it is killed");
    }
}

fn pid(process: &Forked) -> u32 {
    u32::try_from(process.pid()).unwrap()
}

/// Numbers in memory that this process shares with those that it forks.
struct Counts(Memory);

impl Counts {
    fn new(count: usize) -> Self {
        Self(Memory::new(Kind::SharedAnonymous, (count * 8).div_ceil(page())))
    }

    fn at(&self, number: usize) -> &AtomicU64 {
        let place = self.0.start().cast::<AtomicU64>().wrapping_add(number);
        assert!((number + 1) * 8 <= self.0.len());
        // SAFETY: the place is mapped as long as this is there, aligned, and led to by such references alone.
        unsafe { &*place }
    }
}

/// An image that counts how often each page is read.
struct Counted<'a>(&'a Counts);

impl PageSource for Counted<'static> {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<PageData> {
        let (first, pages) = (offset as usize / page(), buffer.len() / page());
        (first..first + pages).for_each(|number| _ = self.0.at(number).fetch_add(1, Ordering::Relaxed));
        Image(PAGES).read(offset, buffer)
    }
}

#[test]
fn successor_reads_nothing_twice_and_brings_nothing_back() {
    require!(FeatureFlags::EVENT_REMOVE);
    child::run_well(test_name!(), || {
        let states = States::new();
        let reads: &'static Counts = Box::leak(Box::new(Counts::new(PAGES)));
        let path = path();
        let mut monitor = Monitor::fork(Style::new(Dialect::Firecracker), path.clone());
        let mut handler = Handler::listen(&states, &path, |_| Counted(reads));
        monitor.go();
        handler.wait();
        assert!(matches!(adopt(&states.0, pid(&monitor.process)), Err(AdoptError::Served { .. })));
        assert!(left_behind(&states.0).unwrap().is_empty());
        for page in 0..PAGES {
            assert_eq!(monitor.read(page), shown(page));
        }
        monitor.remove(1);
        monitor.remove(2);
        assert_eq!(monitor.read(2), 0);
        handler.kill();
        // Its event waits in the kernel.
        monitor.ask(0x80 | 3);
        let pid = pid(&monitor.process);
        assert_eq!(left_behind(&states.0).unwrap(), [pid]);

        let source = |region: &MemoryRegion| {
            assert_eq!(region.source.as_deref(), Some("image"));
            Counted(reads)
        };
        let mut handler = Handler::adopt(&states, pid, source);
        handler.wait();
        monitor.answer();
        for page in 0..PAGES {
            let expected = if (1..4).contains(&page) { 0 } else { shown(page) };
            assert_eq!(monitor.read(page), expected, "page {page}");
        }
        for number in 0..PAGES {
            assert_eq!(reads.at(number).load(Ordering::Relaxed), 1, "reads of page {number} of the image");
        }
        handler.kill();
        assert_eq!(states.files(), 1);
        // One that ends it as it should be.
        let pager = Pager::builder().state(&states.0).build().unwrap();
        let served = pager.serve(adopt(&states.0, pid).unwrap(), |_| Counted(reads)).unwrap();
        assert_eq!(served.missing().unwrap().iter().map(|range| range.offset).collect::<Vec<_>>(), []);
        let handoff = served.detach().unwrap();
        assert_eq!(states.files(), 0, "what is handed over isn't left");
        let served = pager.serve(handoff, |_| Counted(reads)).unwrap();
        assert_eq!(states.files(), 1);
        monitor.exit();
        served.wait();
        drop(served);
        wait_until(|| states.files() == 0);
    });
}

/// Each region would have the states of another one.
#[test]
fn adopted_regions_that_were_changed_are_refused() {
    require!();
    child::run_well(test_name!(), || {
        let (states, path) = (States::new(), path());
        let mut monitor = Monitor::fork(Style::new(Dialect::Firecracker), path.clone());
        let mut handler = Handler::listen(&states, &path, |_| Image(PAGES));
        monitor.go();
        handler.wait();
        assert_eq!(monitor.read(0), shown(0));
        handler.kill();
        let pid = pid(&monitor.process);
        let pager = Pager::builder().state(&states.0).build().unwrap();
        let mut handoff = adopt(&states.0, pid).unwrap();
        handoff.regions.reverse();
        let refused = pager.serve(handoff, |_| Image(PAGES)).unwrap_err();
        assert!(refused.to_string().contains("changed since they were adopted"), "{refused}");
        // Nothing has happened to it.
        let mut handoff = *refused.handoff;
        handoff.regions.reverse();
        let served = pager.serve(handoff, |_| Image(PAGES)).unwrap();
        for page in 0..PAGES {
            assert_eq!(monitor.read(page), shown(page));
        }
        drop(served);
        monitor.exit();
    });
}

/// However a pager gives memory away or completes it, nothing is left that another handler could take for its own.
#[test]
fn memory_that_is_given_away_is_not_left_behind() {
    require!();
    child::run_well(test_name!(), || {
        for how in 0..3 {
            let (states, path) = (States::new(), path());
            let mut monitor = Monitor::fork(Style::new(Dialect::Firecracker), path.clone());
            let mut listener = Listener::bind(&path).unwrap();
            monitor.go();
            let pager = Pager::builder().state(&states.0).build().unwrap();
            let served = pager.serve(listener.accept().unwrap(), |_| Image(PAGES)).unwrap();
            assert_eq!(states.files(), 1);
            let given = match how {
                0 => vec![pager.remove(served.descriptor()).unwrap()],
                1 => pager.detach(),
                _ => {
                    pager.finish(|_| {}).unwrap();
                    Vec::new()
                }
            };
            // Also while the handle is kept.
            assert_eq!((states.files(), left_behind(&states.0).unwrap()), (0, Vec::new()), "{how}");
            drop((served, given));
            monitor.exit();
        }
    });
}

/// A process that reads, writes and drops pages of its memory in several threads, and checks each byte. Pages of each
/// thread are its own.
struct Busy {
    process: Forked,
    socket: UnixStream,
}

const BUSY_THREADS: usize = 4;
const BUSY_PAGES: usize = 8192;

/// The byte of a page of an image that is read as often as it takes.
struct Endless;

impl PageSource for Endless {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<PageData> {
        Image(usize::MAX).read(offset, buffer)
    }
}

impl Busy {
    fn start(path: &Path, steps: &Counts, seed: u64) -> Self {
        let (socket, there) = UnixStream::pair().unwrap();
        let process = child::fork(|| {
            let memory = Memory::anonymous(BUSY_PAGES);
            let start = memory.start().expose_provenance();
            let mut uffd = UffdBuilder::new();
            uffd.close_on_exec(true).non_blocking(true).require_features(FeatureFlags::EVENT_REMOVE);
            let uffd = uffd.create().unwrap();
            uffd.register(memory.start(), memory.len()).unwrap();
            let half = memory.len() / 2;
            let regions =
                vec![MemoryRegion::new(start, half, 0), MemoryRegion::new(start + half, half, half as u64)];
            assert_eq!((&there).read(&mut [0]).unwrap(), 1);
            let stream = UnixStream::connect(path).unwrap();
            send(Dialect::Firecracker, &stream, &Offer::new(&uffd, regions)).unwrap();
            let stop = AtomicU64::new(0);
            thread::scope(|scope| {
                for thread in 0..BUSY_THREADS {
                    let (memory, stop) = (&memory, &stop);
                    scope.spawn(move || {
                        let mut random = Random::new(seed ^ thread as u64);
                        // The first byte of each page, and all others.
                        let mut model: Vec<_> = (0..BUSY_PAGES).map(|at| (byte(at), byte(at))).collect();
                        let check = |at, (first, rest): (u8, u8)| {
                            let content = memory.content(at);
                            assert_eq!(content[0], first, "the first byte of page {at}");
                            assert!(content[1..].iter().all(|byte| *byte == rest), "page {at} isn't {rest}");
                        };
                        while stop.load(Ordering::Relaxed) == 0 {
                            let at = random.below(BUSY_PAGES / BUSY_THREADS) * BUSY_THREADS + thread;
                            match random.below(4) {
                                0 => {
                                    model[at].0 = random.next() as u8;
                                    memory.write(at, model[at].0);
                                }
                                1 => {
                                    memory.advise(at, 1, libc::MADV_DONTNEED).unwrap();
                                    model[at] = (0, 0);
                                }
                                _ => {}
                            }
                            check(at, model[at]);
                            steps.at(0).fetch_add(1, Ordering::Relaxed);
                        }
                        (thread..BUSY_PAGES).step_by(BUSY_THREADS).for_each(|at| check(at, model[at]));
                    });
                }
                assert_eq!((&there).read(&mut [0]).unwrap(), 1);
                stop.store(1, Ordering::Relaxed);
            });
        });
        Self { process, socket }
    }
}

/// Kills of one process's handlers, and their number in all: 20, or what the environment says.
const KILLS_PER_PROCESS: usize = 20;
const KILLS: &str = "USERFAULTFD_KILLS";

#[test]
fn handlers_killed_at_any_moment_are_succeeded() {
    require!(FeatureFlags::EVENT_REMOVE);
    let _many = crate::support::pause_watchdog();
    child::run_well(test_name!(), || {
        let _many = crate::support::pause_watchdog();
        let kills = std::env::var(KILLS).map_or(KILLS_PER_PROCESS, |kills| kills.parse().expect("a number"));
        let states = States::new();
        for process in 0..kills.div_ceil(KILLS_PER_PROCESS) {
            let mut random = Random::new(process as u64);
            let (path, steps) = (path(), Counts::new(1));
            let mut busy = Busy::start(&path, &steps, random.next());
            let mut handler = Handler::listen(&states, &path, |_| Endless);
            busy.socket.write_all(&[0]).unwrap();
            handler.wait();
            let pid = pid(&busy.process);
            for _ in 0..KILLS_PER_PROCESS {
                // Some die while they take over, most after any number of faults.
                let until = steps.at(0).load(Ordering::Relaxed) + random.below(200) as u64;
                wait_until(|| steps.at(0).load(Ordering::Relaxed) >= until);
                handler.kill();
                handler = Handler::adopt(&states, pid, |_| Endless);
                if random.one_in(4) {
                    for _ in 0..random.below(2_000_000) {
                        std::hint::spin_loop();
                    }
                } else {
                    handler.wait();
                }
                if random.one_in(4) {
                    handler.kill();
                    handler = Handler::adopt(&states, pid, |_| Endless);
                    handler.wait();
                }
            }
            busy.socket.write_all(&[0]).unwrap();
            busy.process.succeed();
            handler.kill();
            assert!(left_behind(&states.0).unwrap().is_empty(), "it has ended");
            assert_eq!(states.files(), 0);
        }
    });
}
