//! Everything at once, for a while: processes whose threads fault, write, remove, move and fork; sources that stall,
//! fail and panic; pagers that are handed over, finished and dropped; crowds that wait for a source that is down, signals,
//! mappings that grow, shrink and move, children that drop what they inherit, memories by the hundred, memory of ten times
//! its limit, stores as memory, limits that are reached, locked memory. Every page that is read is checked.
//!
//! ```sh
//! cargo run --release --example soak -- --seconds 60
//! ```
//!
//! Any kernel. Forks need the capability CAP_SYS_PTRACE, huge pages must be reserved; without, they are left out.

mod alone;
mod arena;
mod board;
mod bus;
mod content;
mod keeper;
mod leaks;
mod limited;
mod limits;
mod link;
mod options;
mod own;
mod random;
mod remaps;
mod storms;
mod target;

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::panic;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};
use std::{env, thread};

use indicatif::{ProgressBar, ProgressStyle};
use userfaultfd::{FeatureFlags, Support, UffdBuilder};
use userfaultfd_examples::{Result, receive, send};

use crate::board::{Act, Board, Doing};
use crate::keeper::{Common, Keeper, Pagers, TWICE};
use crate::leaks::Held;
use crate::options::Options;
use crate::random::Random;
use crate::target::Orders;

/// Threads of a process at most, with those of its forks' children.
const SLOTS: usize = 64;

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    match arguments.next().as_deref() {
        Some(TARGET) => {
            let orders = options::orders(arguments).expect("what this program passes to itself");
            return userfaultfd_examples::run(|| be_target(orders));
        }
        Some(alone::ALONE) => return userfaultfd_examples::run(|| alone::be(arguments)),
        _ => {}
    }
    leaks::map_large_blocks();
    match Options::parse(env::args().skip(1)) {
        Ok(options) => userfaultfd_examples::run(|| soak(&options)),
        Err(problem) => {
            eprintln!("{problem}\n{}", options::USAGE);
            ExitCode::FAILURE
        }
    }
}

/// The first argument of a process that is served.
const TARGET: &str = "--target";

fn be_target(orders: Orders) -> Result<()> {
    let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let (_, board) = receive::<1>(&socket)?.ok_or("nobody keeps this target")?;
    target::run(orders, socket, &File::from(board))
}

/// What the threads of this process share.
struct Soak {
    options: Options,
    orders: Orders,
    common: Arc<Common>,
    board: Board,
    board_file: File,
    pagers: Vec<Pagers>,
    children: Vec<Mutex<Option<Child>>>,
    stop: AtomicBool,
    start: Instant,
}

fn soak(options: &Options) -> Result<()> {
    let support = Support::probe()?.features();
    let may = |features| {
        let mut builder = UffdBuilder::new();
        builder.close_on_exec(true).user_mode_only(false).require_features(features).create().is_ok()
    };
    let orders = Orders {
        seed: options.seed,
        process: 0,
        life: 0,
        threads: options.threads,
        time: options.time,
        kernel: may(FeatureFlags::empty()),
        forks: may(FeatureFlags::EVENT_FORK),
        huge_pages: (leaks::free_huge_pages() / (8 * options.processes)).min(8),
    };
    println!("seed {}, {} processes with {} threads", options.seed, options.processes, options.threads);
    for (has, what) in [
        (orders.kernel, "faults from kernel mode: this process may not handle them"),
        (orders.forks, "forks: they need CAP_SYS_PTRACE"),
        (orders.huge_pages > 0, "huge pages: too few are reserved"),
        (support.contains(FeatureFlags::POISON), "pages that can't be had: this kernel can't poison"),
    ] {
        if !has {
            println!("without {what}");
        }
    }
    quiet_sources();
    let (board, board_file) = Board::new(options.processes * SLOTS + 2)?;
    let soak = Soak {
        options: *options,
        orders,
        common: Arc::default(),
        board,
        board_file,
        pagers: (0..options.processes).map(|_| Pagers::default()).collect(),
        children: (0..options.processes).map(|_| Mutex::default()).collect(),
        stop: AtomicBool::new(false),
        start: Instant::now(),
    };
    // Once for what stays: the allocator's, the threads'.
    soak.run(Duration::from_millis(100));
    let before = Held::now()?;
    soak.run(options.time);
    let after = Held::settled(&before)?;
    let findings = &soak.common.findings;
    if let Some(more) = after.more_than(&before) {
        findings.add(more);
    }
    match TWICE.load(Ordering::Relaxed) {
        0 => {}
        twice => findings.add(format!("{twice} pages that never change were read twice from their source")),
    }
    soak.report();
    println!("before: {before}\nafter:  {after}");
    match findings.all() {
        findings if findings.is_empty() => Ok(()),
        findings => {
            for finding in findings.iter().take(20) {
                eprintln!("{finding}");
            }
            Err(format!("{} things are wrong, with seed {}", findings.len(), options.seed).into())
        }
    }
}

/// The panics of sources are meant to be, and not worth a line.
fn quiet_sources() {
    let loud = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if info.payload().downcast_ref::<&str>() != Some(&content::PANIC) {
            loud(info);
        }
    }));
}

impl Soak {
    /// Everything, for this time.
    fn run(&self, time: Duration) {
        let end = Instant::now() + time;
        let (done, is_done) = mpsc::channel::<()>();
        thread::scope(|scope| {
            for process in 0..self.options.processes {
                let done = done.clone();
                scope.spawn(move || {
                    self.keep(process, end);
                    drop(done);
                });
            }
            for thread in 0..2 {
                let done = done.clone();
                scope.spawn(move || {
                    let slot = &self.board.slots()[self.options.processes * SLOTS + thread];
                    let mut random = Random::new(&[self.options.seed, u64::MAX, thread as u64]);
                    let goes_on = || Instant::now() < end && !self.stop.load(Ordering::Relaxed);
                    let kernel = self.orders.kernel;
                    if let Err(problem) = own::work(slot, &self.common, &mut random, kernel, &goes_on) {
                        self.common.findings.add(problem);
                    }
                    drop(done);
                });
            }
            drop(done);
            self.watch(&is_done, time);
        });
    }

    /// Has one target after the other, and serves it.
    fn keep(&self, process: usize, end: Instant) {
        let mut life = 0;
        loop {
            let now = Instant::now();
            if now >= end || self.stop.load(Ordering::Relaxed) {
                return;
            }
            let mut random = Random::new(&[self.options.seed, process as u64, life as u64, u64::MAX / 2]);
            let kill = random.one_in(2).then(|| Duration::from_millis(200 + random.below(3000) as u64));
            let orders = Orders { process, life, time: end - now, ..self.orders };
            if let Err(error) = self.one_life(orders, kill, random) {
                self.common.findings.add(format!("process {process}: {error}"));
            }
            if !self.common.findings.is_empty() {
                self.stop.store(true, Ordering::Relaxed);
            }
            life += 1;
        }
    }

    fn one_life(&self, orders: Orders, kill: Option<Duration>, random: Random) -> Result<()> {
        let process = orders.process;
        let (socket, targets) = UnixStream::pair()?;
        let mut command = Command::new(env::current_exe()?);
        command.arg(TARGET).args(options::to_arguments(&orders)).stdin(Stdio::from(OwnedFd::from(targets)));
        let child = command.spawn()?;
        drop(command);
        *self.child(process) = Some(child);
        send(&socket, [0], self.board_file.as_fd())?;
        let is_killed = AtomicBool::new(false);
        thread::scope(|scope| {
            let (over, is_over) = mpsc::channel::<()>();
            let is_killed = &is_killed;
            if let Some(after) = kill {
                scope.spawn(move || {
                    if is_over.recv_timeout(after) == Err(mpsc::RecvTimeoutError::Timeout) {
                        is_killed.store(true, Ordering::SeqCst);
                        self.kill(process);
                    }
                });
            }
            let mut keeper = Keeper::new(process, &self.common, &self.pagers[process], random);
            keeper.serve(&socket, || is_killed.load(Ordering::SeqCst));
            drop(over);
        });
        drop(socket);
        let Some(mut child) = self.child(process).take() else { return Ok(()) };
        let status = child.wait()?;
        for slot in &self.board.slots()[process * SLOTS..][..SLOTS] {
            slot.leave();
        }
        let was_killed = is_killed.load(Ordering::SeqCst) && status.signal() == Some(libc::SIGKILL);
        if status.success() || was_killed {
            Ok(())
        } else {
            Err(format!("the target ended with {status}").into())
        }
    }

    fn child(&self, process: usize) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.children[process].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kill(&self, process: usize) {
        if let Some(child) = &mut *self.child(process) {
            // It may have ended.
            let _gone = child.kill();
        }
    }

    /// Looks for threads that hang, until all is done.
    fn watch(&self, is_done: &mpsc::Receiver<()>, time: Duration) {
        let bar = ProgressBar::new(time.as_secs());
        let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {msg}");
        bar.set_style(style.expect("a template of known words"));
        let mut seen: Vec<(Option<Doing>, Instant)> = vec![(None, Instant::now()); self.board.slots().len()];
        while is_done.recv_timeout(Duration::from_millis(100)) == Err(mpsc::RecvTimeoutError::Timeout) {
            let now = Instant::now();
            for (index, (slot, (before, since))) in self.board.slots().iter().zip(&mut seen).enumerate() {
                let doing = slot.doing();
                let is_same = doing.is_some() && doing.map(|d| d.sequence) == before.map(|d| d.sequence);
                if !is_same {
                    (*before, *since) = (doing, now);
                } else if let Some(doing) = doing.filter(|_| now - *since > self.options.limit) {
                    self.hangs(index, doing);
                }
            }
            bar.set_position(self.start.elapsed().as_secs());
            bar.set_message(format!("{} pages read", self.board.counts()[Act::Read as usize]));
        }
        bar.finish_and_clear();
    }

    /// Tells what hangs, and ends it all.
    fn hangs(&self, slot: usize, doing: Doing) -> ! {
        let (process, thread) = (slot / SLOTS, slot % SLOTS);
        let Doing { act, arena, page, address, state, .. } = doing;
        eprintln!(
            "process {process}, thread {thread} hangs: {act:?}, arena {arena}, page {page}, address {address:#x}"
        );
        eprintln!("  the page is {}", arena::describe(state as u32));
        for (index, slot) in
            self.board.slots().iter().enumerate().filter(|(index, _)| index / SLOTS == process)
        {
            if let Some(doing) = slot.doing() {
                eprintln!("  thread {}: {doing:x?}", index % SLOTS);
            }
        }
        if let Some(pagers) = self.pagers.get(process) {
            let pagers = pagers.lock().unwrap_or_else(PoisonError::into_inner);
            for pager in pagers.iter().flatten() {
                eprintln!("{pager:?}\n{}", pager.statistics());
            }
        }
        print_unread_faults();
        // Those of this process have no target.
        let target = self.children.get(process).and_then(|_| self.child(process).as_ref().map(Child::id));
        let here = std::process::id();
        let own = if target.is_some() { vec![here] } else { with_children(here) };
        for process in target.into_iter().flat_map(with_children).chain(own) {
            print_threads(process);
        }
        for finding in self.common.findings.all() {
            eprintln!("{finding}");
        }
        (0..self.options.processes).for_each(|process| self.kill(process));
        eprintln!("a fault was not answered, with seed {}", self.options.seed);
        std::process::exit(1);
    }

    fn report(&self) {
        println!("{:<40} {:>12}", "done", "times");
        for (act, count) in Act::ALL.iter().zip(self.board.counts()) {
            println!("{:<40} {count:>12}", act.what());
        }
        let expected = &self.common.expected;
        for (what, count) in [
            ("pages that no source delivered", &expected.sources),
            ("pages poisoned for that", &expected.poisoned),
            ("processes that went", &expected.gone),
            ("pages put off again and again", &expected.put_off),
            ("written pages that a store didn't take", &expected.unwritten),
        ] {
            println!("{what:<40} {:>12}", count.load(Ordering::Relaxed));
        }
        println!("{}", self.common.statistics.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Prints how many faults of each userfaultfd wait: those that weren't read, and all that weren't woken.
fn print_unread_faults() {
    let Ok(all) = fs::read_dir("/proc/self/fd") else { return };
    for entry in all.flatten() {
        let is_uffd =
            fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().contains("[userfaultfd]"));
        let name = entry.file_name();
        let info = fs::read_to_string(Path::new("/proc/self/fdinfo").join(&name));
        if let Some(info) = info.ok().filter(|_| is_uffd) {
            let lines = info.lines().filter(|line| line.starts_with("pending") || line.starts_with("total"));
            eprintln!("  descriptor {}: {}", name.to_string_lossy(), lines.collect::<Vec<_>>().join(", "));
        }
    }
}

/// A process and its children.
fn with_children(process: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let children = children.flat_map(|children| {
        children.split_whitespace().filter_map(|child| child.parse().ok()).collect::<Vec<_>>()
    });
    [process].into_iter().chain(children).collect()
}

/// Prints where in the kernel the threads of a process wait.
fn print_threads(process: u32) {
    let Ok(tasks) = fs::read_dir(format!("/proc/{process}/task")) else { return };
    for task in tasks.flatten() {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let (comm, call, stack) = (read("comm"), read("syscall"), read("stack"));
        let frames = stack.lines().map(|line| line.trim_start_matches("[<0>] "));
        let frames = frames.map(|frame| frame.split('+').next().unwrap_or(frame)).collect::<Vec<_>>();
        eprintln!(
            "  process {process}, thread {} {}: {} in {}",
            task.file_name().to_string_lossy(),
            comm.trim_end(),
            call.trim_end(),
            frames.join(" < ")
        );
    }
}
