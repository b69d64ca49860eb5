//! Huge pages, reserved while a test needs them and given back after it.

use std::fs::{self, File};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::lock::Lock;

/// What was in the pool before this process reserved pages, or [`NOTHING`]. Not under a lock, which a process that is
/// forked meanwhile would find locked for ever.
static BEFORE: AtomicUsize = AtomicUsize::new(NOTHING);

/// None were reserved.
const NOTHING: usize = usize::MAX;

/// The size of a huge page, in bytes. 0 where the kernel has none.
pub(crate) fn page() -> usize {
    static SIZE: LazyLock<usize> = LazyLock::new(|| 1024 * from_meminfo("Hugepagesize:").unwrap_or(0));
    *SIZE
}

/// A number of /proc/meminfo.
fn from_meminfo(name: &str) -> Option<usize> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Tries to have the pool made larger.
const TRIES: usize = 20;

/// Where the size of the pool stands, for pages of the default size.
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Pages in the pool that are this test's alone: one process and one test at a time has any.
#[derive(Debug)]
pub(crate) struct HugePages {
    _lock: Lock,
}

/// Makes sure that `pages` huge pages are free. `None`, visibly, if they can't be had.
pub(crate) fn reserve(test: &str, pages: usize) -> Option<HugePages> {
    let lock = lock();
    // If it was forked while another test had some, that is none of this process's.
    BEFORE.store(NOTHING, Ordering::SeqCst);
    let free = || from_meminfo("HugePages_Free:").unwrap_or(0);
    let size =
        || fs::read_to_string(POOL).ok().and_then(|text| text.trim().parse::<usize>().ok()).unwrap_or(0);
    let before = size();
    // Where memory is in small pieces the kernel may find some of the pages only at another try. And it may give this test
    // the pages that a process has still which is ending: so each try is for what lacks then.
    for _ in 0..TRIES {
        let free = free();
        if page() == 0 || free >= pages || fs::write(POOL, (size() + pages - free).to_string()).is_err() {
            break;
        }
        BEFORE.store(before, Ordering::SeqCst);
        std::thread::yield_now();
    }
    let met = page() != 0 && free() >= pages;
    if !met {
        give_back_all();
    }
    super::has(test, "hugetlb", met).then_some(HugePages { _lock: lock })
}

impl HugePages {
    /// Makes the pool as large as it is used, so that no page is free, until dropped. Tells whether that worked: it
    /// takes the superuser, and pages that are promised to mappings stay.
    pub(crate) fn exhaust(&self) -> bool {
        let total = from_meminfo("HugePages_Total:").unwrap();
        let free = from_meminfo("HugePages_Free:").unwrap();
        // Unless they were reserved, and that is known already.
        let _known = BEFORE.compare_exchange(NOTHING, total, Ordering::SeqCst, Ordering::SeqCst);
        fs::write(POOL, (total - free).to_string()).is_ok() && from_meminfo("HugePages_Free:") == Some(0)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        give_back_all();
    }
}

/// Makes the pool as large as it was.
pub(crate) fn give_back_all() {
    let before = BEFORE.swap(NOTHING, Ordering::SeqCst);
    if before == NOTHING {
        return;
    }
    if let Err(error) = fs::write(POOL, before.to_string()) {
        eprintln!("huge pages are not given back: {POOL} should be {before}: {error}");
    }
}

/// Waits until no other test has huge pages, in this process or another.
fn lock() -> Lock {
    let path = std::env::temp_dir().join("userfaultfd-hugetlb.lock");
    // Another user may have made it, and `fs.protected_regular` forbids even root to open that one for creation.
    let file = File::open(&path)
        .or_else(|_| File::options().create(true).truncate(false).write(true).open(path))
        .unwrap();
    Lock::wait(file)
}
