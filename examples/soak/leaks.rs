//! What a process has, as `/proc` counts it.

use std::time::{Duration, Instant};
use std::{env, fmt, fs, io, thread};

/// What a pager must give back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) descriptors: usize,
    pub(crate) userfaultfds: usize,
    pub(crate) threads: usize,
    pub(crate) children: usize,
    pub(crate) mappings: usize,
    /// Anonymous memory, in KiB.
    pub(crate) memory: usize,
}

/// The allocator and the threads' stacks need not give everything back at once.
const MAPPINGS: usize = 40;
const MEMORY: usize = 32 << 10;

impl Held {
    pub(crate) fn now() -> io::Result<Self> {
        let targets =
            fs::read_dir("/proc/self/fd")?.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
        let targets: Vec<_> = targets.collect();
        let is_userfaultfd = |target: &&std::path::PathBuf| target.as_os_str() == "anon_inode:[userfaultfd]";
        let threads: Vec<_> = fs::read_dir("/proc/self/task")?.flatten().collect();
        let children = threads.iter().map(|thread| {
            // Not on every kernel.
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            children.split_ascii_whitespace().count()
        });
        trim();
        let maps = fs::read_to_string("/proc/self/maps")?;
        let rollup = fs::read_to_string("/proc/self/smaps_rollup")?;
        let anonymous = rollup.lines().find_map(|line| line.strip_prefix("Anonymous:"));
        let anonymous = anonymous.and_then(|size| size.trim().strip_suffix(" kB")?.trim().parse().ok());
        Ok(Self {
            // Without the one that reads the directory.
            descriptors: targets.iter().filter(|target| !target.ends_with("fd")).count(),
            userfaultfds: targets.iter().filter(is_userfaultfd).count(),
            threads: threads.len(),
            children: children.sum(),
            mappings: maps.lines().count(),
            memory: anonymous.unwrap_or(0),
        })
    }

    /// Likewise, once what has just ended has gone: a thread is there for a moment after it was joined.
    pub(crate) fn settled(before: &Self) -> io::Result<Self> {
        let start = Instant::now();
        loop {
            let now = Self::now()?;
            if now.more_than(before).is_none() || start.elapsed() > Duration::from_secs(2) {
                return Ok(now);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// What there is more than before.
    pub(crate) fn more_than(&self, before: &Self) -> Option<String> {
        // A sanitizer keeps memory of its own.
        let sanitized = ["ASAN_OPTIONS", "TSAN_OPTIONS"].iter().any(|name| env::var_os(name).is_some());
        let is_more = self.descriptors > before.descriptors
            || self.userfaultfds > before.userfaultfds
            || self.threads > before.threads
            || self.children > before.children
            || !sanitized && self.mappings > before.mappings + MAPPINGS
            || !sanitized && self.memory > before.memory + MEMORY;
        is_more.then(|| format!("something was not given back\n  before: {before}\n  after:  {self}"))
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { descriptors, userfaultfds, threads, children, mappings, memory } = self;
        write!(
            f,
            "{descriptors} descriptors, {userfaultfds} of them userfaultfds; {threads} threads, {children} children; \
             {mappings} mappings, {memory} KiB of anonymous memory"
        )
    }
}

/// Has the C library give back what it keeps for later, as far as it can.
fn trim() {
    // It keeps stacks of threads that have ended, up to 40 MiB of them: one that is larger drives all others out.
    let large = thread::Builder::new().stack_size(64 << 20).spawn(|| {});
    let _ended = large.map(thread::JoinHandle::join);
    #[cfg(target_env = "gnu")]
    // SAFETY: only gives back what nobody has.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Has the C library give large blocks back as soon as they are freed, whatever lies behind them: it would take them from
/// its heaps once it has seen some. To be called before there are threads.
pub(crate) fn map_large_blocks() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number of the allocator's.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
    }
}

/// Huge pages of the default size that nobody has.
pub(crate) fn free_huge_pages() -> usize {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = meminfo.lines().find_map(|line| line.strip_prefix("HugePages_Free:"));
    free.and_then(|free| free.trim().parse().ok()).unwrap_or(0)
}
