//! What the tests share: what the kernel offers, memory of every kind, time limits, processes of their own.

pub(crate) mod child;
pub(crate) mod dead;
pub(crate) mod fault;
pub(crate) mod fill;
pub(crate) mod foreign;
pub(crate) mod fuse;
#[allow(dead_code, reason = "those of the kernel hold no thread up")]
pub(crate) mod gate;
pub(crate) mod handler;
pub(crate) mod hugetlb;
pub(crate) mod lock;
pub(crate) mod mapping;
#[allow(dead_code, reason = "those of the kernel ask for none of it")]
pub(crate) mod maps;
pub(crate) mod memory;
pub(crate) mod mounts;
pub(crate) mod proc;
#[allow(dead_code, reason = "those of the kernel leave nothing to chance")]
pub(crate) mod random;
pub(crate) mod raw;
pub(crate) mod seccomp;
pub(crate) mod signal;
pub(crate) mod sysctl;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::c_void;
use std::io::Write;
use std::sync::{Arc, Condvar, LazyLock, Mutex};
use std::time::Duration;

use userfaultfd::{Errno, Error, FeatureFlags, Support, Uffd, UffdBuilder};

/// Names a mask of features, in hexadecimal, that the running kernel must offer: exactly those. A test that
/// is skipped for one of them fails then. Set where it is known which kernel runs.
pub(crate) const EXPECTED_FEATURES: &str = "USERFAULTFD_EXPECT_FEATURES";

/// Names needs beside features that must be met, by commas: `root`, `hugetlb`, … A test that is skipped for
/// one of them fails then.
pub(crate) const EXPECTED_NEEDS: &str = "USERFAULTFD_EXPECT";

/// Names the seconds that a test may take, where a minute isn't enough: on emulated machines.
pub(crate) const SECONDS: &str = "USERFAULTFD_TEST_SECONDS";

/// Seconds that a process which hangs has to give back what is the whole machine's: far more than two writes take.
const GIVING_BACK_SECONDS: libc::c_uint = 10;

static KERNEL: LazyLock<Support> =
    LazyLock::new(|| Support::probe().expect("a userfaultfd for faults from user mode"));

/// The features that the kernel offers.
pub(crate) fn features() -> FeatureFlags {
    KERNEL.features()
}

/// The mask of [`EXPECTED_FEATURES`].
pub(crate) fn expected_features() -> Option<FeatureFlags> {
    let mask = std::env::var(EXPECTED_FEATURES).ok()?;
    let bits = u64::from_str_radix(mask.trim_start_matches("0x"), 16).expect("a mask in hexadecimal");
    Some(FeatureFlags::from_bits_retain(bits))
}

/// Whether `features` are there, and may be used. If not, says so, and fails where they are expected.
pub(crate) fn has_features(test: &str, features: FeatureFlags) -> bool {
    let missing = features.difference(self::features());
    if missing.is_empty() {
        let forks = features.contains(FeatureFlags::EVENT_FORK);
        return !forks || has(test, "CAP_SYS_PTRACE", may_watch_forks());
    }
    let expected = expected_features().unwrap_or_default();
    assert!(!expected.intersects(missing), "{test} needs {missing}, which this kernel is expected to have");
    skip(test, &missing);
    false
}

/// Says what a test lacks, once: many try one kind of memory after the other.
fn skip(test: &str, need: &dyn std::fmt::Display) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let said = format!("{test}: needs {need}");
    if SAID.lock().unwrap().insert(said.clone()) {
        show(&format!("SKIP {said}"));
    }
}

/// Shows a line, past the test harness unless that was told to show what a passing test prints.
pub(crate) fn show(line: &str) {
    if std::env::args().any(|argument| argument == "--show-output") {
        println!("{line}");
    } else {
        writeln!(std::io::stderr(), "{line}").expect("standard error is open");
    }
}

/// Whether this process may use `EVENT_FORK`, which takes more than that the kernel offers it.
pub(crate) fn may_watch_forks() -> bool {
    raw::api(raw::unshaken(0), FeatureFlags::EVENT_FORK) != Err(userfaultfd::Errno::EPERM)
}

/// Whether a need beside features is met. If not, says so, and fails where it is expected.
pub(crate) fn has(test: &str, need: &str, met: bool) -> bool {
    if !met {
        let expected = std::env::var(EXPECTED_NEEDS).unwrap_or_default();
        assert!(
            !expected.split(',').any(|expected| expected == need),
            "{test} needs {need}, which is expected here"
        );
        skip(test, &need);
    }
    met
}

/// Whether this process is the superuser, for whom the kernel's rights are not in the way.
pub(crate) fn is_root() -> bool {
    // SAFETY: touches no memory.
    unsafe { libc::geteuid() == 0 }
}

/// A userfaultfd as most tests want it: it doesn't wait for events, and children that execute don't get it,
/// whose copies would keep it open.
pub(crate) fn uffd(features: FeatureFlags) -> Uffd {
    UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        .require_features(features)
        .create()
        .expect("the kernel offers the features")
}

/// The errno of an operation that must fail.
#[track_caller]
pub(crate) fn errno<T: std::fmt::Debug>(result: userfaultfd::Result<T>) -> Errno {
    let error: Error = result.expect_err("must fail");
    error.errno().unwrap_or_else(|| panic!("no errno: {error:?}"))
}

/// Ranges that are malformed for operations on `memory`, and why.
pub(crate) fn bad_ranges(memory: &memory::Memory) -> Vec<(&'static str, *mut c_void, usize)> {
    let (start, page) = (memory.start(), memory.page());
    let last_page = std::ptr::without_provenance_mut(page.wrapping_neg());
    let mut ranges = vec![
        ("nothing", start, 0),
        ("unaligned start", start.wrapping_byte_add(1), page),
        ("unaligned length", start, page + 1),
        ("less than a page", start, 1),
        ("past the end of addresses", last_page, page),
        ("around the end of addresses", start, page.wrapping_neg()),
    ];
    if memory.kind().is_hugetlb() {
        ranges.push(("part of a huge page", start, self::page()));
        ranges.push(("start inside a huge page", start.wrapping_byte_add(self::page()), page));
    }
    ranges
}

/// An address at which nothing is mapped, nor will be by another test: below it the kernel maps nothing
/// without being told to. A page of the base size.
pub(crate) fn nowhere() -> *mut c_void {
    let lowest = std::fs::read_to_string("/proc/sys/vm/mmap_min_addr").unwrap();
    let lowest: usize = lowest.trim().parse().unwrap();
    std::ptr::without_provenance_mut(lowest.max(1).next_multiple_of(page()))
}

/// The page size, in bytes.
pub(crate) fn page() -> usize {
    userfaultfd::page_size()
}

/// Ends the process, and names the test, if it takes longer than a minute, or than `USERFAULTFD_TEST_SECONDS` says:
/// a test that hangs is a fault that nobody resolved.
#[derive(Debug)]
pub(crate) struct Watchdog(Watched);

/// What a test does, as its watchdog sees it.
type Watched = Arc<(Mutex<Watch>, Condvar)>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    Starting,
    Running,
    /// It waits for what others have, and for as long as they have it.
    Paused,
    Done,
}

/// It may wait for others this number of times longer than a test may run.
const PATIENCE: u32 = 10;

std::thread_local! {
    /// Of the test that runs in this thread.
    static WATCHED: RefCell<Option<Watched>> = const { RefCell::new(None) };
}

/// The watchdog of this thread's test doesn't count the time until this is dropped: a test that waits for another one,
/// perhaps of another process, doesn't hang.
#[derive(Debug)]
pub(crate) struct Pause(Option<Watched>);

/// Pauses the watchdog of this thread's test.
pub(crate) fn pause_watchdog() -> Pause {
    let watched = WATCHED.with_borrow(Clone::clone);
    Pause(watched.filter(|watched| change(watched, Watch::Running, Watch::Paused)))
}

impl Drop for Pause {
    fn drop(&mut self) {
        if let Some(watched) = &self.0 {
            change(watched, Watch::Paused, Watch::Running);
        }
    }
}

/// Whether it was as expected before the change.
fn change((watch, changed): &(Mutex<Watch>, Condvar), from: Watch, to: Watch) -> bool {
    let mut watch = watch.lock().unwrap();
    let is_so = *watch == from;
    if is_so {
        *watch = to;
        changed.notify_all();
    }
    is_so
}

impl Watchdog {
    pub(crate) fn arm(test: &'static str) -> Self {
        let watch = Arc::new((Mutex::new(Watch::Starting), Condvar::new()));
        let watched = Arc::clone(&watch);
        let seconds =
            std::env::var(SECONDS).map_or(60, |seconds| seconds.parse().expect("a number of seconds"));
        let limit = Duration::from_secs(seconds);
        // Built now: a thread that hangs may hold the locks of the allocator.
        let verdict = format!("{test} hangs\n");
        std::thread::spawn(move || {
            let (watch, changed) = &*watched;
            let mut watch = watch.lock().unwrap();
            *watch = Watch::Running;
            changed.notify_all();
            loop {
                let now = *watch;
                let limit = match now {
                    Watch::Done => return,
                    Watch::Paused => PATIENCE * limit,
                    Watch::Starting | Watch::Running => limit,
                };
                let (next, waited) = changed.wait_timeout_while(watch, limit, |watch| *watch == now).unwrap();
                if waited.timed_out() {
                    end_hanging_process(&verdict);
                }
                watch = next;
            }
        });
        // Starting a thread takes locks, which the test may make a fork hold for ever.
        let (starting, changed) = &*watch;
        drop(changed.wait_while(starting.lock().unwrap(), |watch| *watch == Watch::Starting).unwrap());
        WATCHED.set(Some(Arc::clone(&watch)));
        Self(watch)
    }
}

/// Writes the line, gives back what is the whole machine's, and aborts.
fn end_hanging_process(line: &str) -> ! {
    // The harness captures what eprintln! writes and loses it when the process aborts, and std's lock of the standard
    // error may be held by the thread that hangs.
    // SAFETY: the pointer and the length are those of a string that outlives the call.
    unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
    // Giving back allocates, which never ends if the hanging thread holds the allocator's locks.
    // SAFETY: touches no memory; no test handles SIGALRM, which ends the process.
    unsafe { libc::alarm(GIVING_BACK_SECONDS) };
    hugetlb::give_back_all();
    sysctl::restore();
    std::process::abort();
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let (watch, changed) = &*self.0;
        *watch.lock().unwrap() = Watch::Done;
        changed.notify_all();
        WATCHED.set(None);
    }
}

/// The path of the test that it is called in, as the test harness names it.
macro_rules! test_name {
    () => {{
        fn here() {}
        let path = std::any::type_name_of_val(&here);
        let path = path.strip_suffix("::here").unwrap().trim_end_matches("::{{closure}}");
        path.split_once("::").unwrap().1
    }};
}
pub(crate) use test_name;

/// The first line of every test: what it needs. Puts a time limit on the test, and skips it, visibly, where a
/// need isn't met: `require!()`, `require!(FeatureFlags::MOVE)`, `require!(FeatureFlags::MOVE, root)`,
/// `require!(root)`.
macro_rules! require {
    () => {
        let _watchdog = $crate::support::Watchdog::arm($crate::support::test_name!());
    };
    (root) => {
        $crate::support::require!();
        if !$crate::support::has($crate::support::test_name!(), "root", $crate::support::is_root()) {
            return;
        }
    };
    ($features:expr) => {
        $crate::support::require!();
        if !$crate::support::has_features($crate::support::test_name!(), $features) {
            return;
        }
    };
    ($features:expr, root) => {
        $crate::support::require!($features);
        if !$crate::support::has($crate::support::test_name!(), "root", $crate::support::is_root()) {
            return;
        }
    };
}
pub(crate) use require;
