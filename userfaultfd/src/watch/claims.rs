//! Which watch of this process has which memory.
//!
//! The kernel doesn't ask which descriptor has registered memory that is protected or scanned. So the tracker of memory that
//! was unmapped would reset the pages of what was mapped there since, and take the writes of another one that tracks that.
//! Memory is registered with one descriptor at a time: when a watch has registered a range, whatever another watch has there
//! is gone. The newer watch takes the range from the older one before it protects anything, and waits until the
//! older one, if it is at work, has noticed. From then on the older one leaves the range alone and reports
//! [`Error::NotTracked`](crate::Error::NotTracked).
//!
//! A watch registers under the lock of [`WATCHES`], so that of two watches the one that the kernel has served later is the
//! newer one. Threads that handle faults never take that lock.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use super::ranges::{self, Tracked};
use crate::holder::Held;
use crate::lock_order::{LockGuard, RankedMutex, lock, rank};
use crate::owner::PerProcess;
use crate::proc_maps::Process;
use crate::{Error, Result};

/// Those that have ever registered a range, in this process.
static WATCHES: PerProcess<RankedMutex<Vec<Weak<Claims>>, { rank::WATCHES }>> = PerProcess::new();

/// The ranges of a watch.
#[derive(Debug)]
pub(crate) struct Claims {
    process: Process,
    /// Replaced as a whole, so that the lock is never held for long, nor while memory is allocated: the thread that
    /// handles faults takes it.
    ranges: RankedMutex<Arc<[Tracked]>, { rank::RANGES }>,
    /// A part of the ranges is another watch's.
    has_lost: AtomicBool,
    /// Locked while pages are protected, reset, or given back. The thread that handles faults doesn't take it: a page of
    /// the memory that is needed for that may be protected.
    at_work: RankedMutex<(), { rank::WORK }>,
    /// Locked while a fault is resolved.
    resolves: RankedMutex<(), { rank::RESOLVING }>,
    /// For errors that others get.
    held: Held,
}

impl Claims {
    pub(super) fn new(process: Process, held: Held) -> Self {
        Self {
            process,
            ranges: RankedMutex::new(Arc::new([])),
            has_lost: AtomicBool::new(false),
            at_work: RankedMutex::default(),
            resolves: RankedMutex::default(),
            held,
        }
    }

    pub(super) fn ranges(&self) -> Arc<[Tracked]> {
        Arc::clone(&lock(&self.ranges))
    }

    /// Replaces the ranges by what `change` makes of them. It may be called several times.
    pub(super) fn update(&self, change: impl Fn(&[Tracked]) -> Vec<Tracked>) {
        loop {
            let old = self.ranges();
            let mut new: Arc<[Tracked]> = change(&old).into();
            let mut ranges = lock(&self.ranges);
            if Arc::ptr_eq(&ranges, &old) {
                std::mem::swap(&mut *ranges, &mut new);
                break;
            }
        }
        if self.process == Process::Own {
            let ranges = self.ranges();
            let own = ranges.iter().filter(|tracked| !tracked.lost);
            self.held.set(own.map(|tracked| tracked.range.clone()));
        }
    }

    /// Whether another tracker, snapshot or pager of this process says that it has a part of a range.
    pub(super) fn is_held_by_another(&self, range: &Range<usize>) -> bool {
        self.held.is_shared(range)
    }

    /// Keeps other watches from taking ranges. To be followed by [`check`](Self::check).
    pub(super) fn begin_work(&self) -> LockGuard<'_, ()> {
        lock(&self.at_work)
    }

    /// The same, for the thread that handles faults.
    pub(super) fn begin_resolving(&self) -> LockGuard<'_, ()> {
        lock(&self.resolves)
    }

    /// Fails if a part of a range is another watch's.
    pub(super) fn check(&self, range: &Range<usize>) -> Result<()> {
        if !self.has_lost.load(Ordering::Relaxed) {
            return Ok(());
        }
        match ranges::within(&self.ranges(), range).into_iter().find(|tracked| tracked.lost) {
            Some(Tracked { range: Range { start, end }, .. }) => Err(Error::NotTracked { start, end }),
            None => Ok(()),
        }
    }

    /// Registers a range by `register`, and takes it from all other watches.
    pub(super) fn take_over<T>(
        self: &Arc<Self>,
        range: &Range<usize>,
        register: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let mut watches = lock(WATCHES.get()?);
        let registered = register()?;
        watches.retain(|watch| watch.strong_count() > 0);
        let others = watches.iter().filter_map(Weak::upgrade);
        others.filter(|other| !Arc::ptr_eq(other, self)).for_each(|other| other.lose(self.process, range));
        let own = Arc::downgrade(self);
        if !watches.iter().any(|watch| watch.ptr_eq(&own)) {
            watches.push(own);
        }
        Ok(registered)
    }

    /// Another watch has registered a range of a process.
    fn lose(&self, process: Process, range: &Range<usize>) {
        if self.process != process || !ranges::overlaps(&self.ranges(), range) {
            return;
        }
        // Before the ranges: a check that doesn't see it would see no lost range, either. The locks below order both
        // for all that begins afterwards.
        self.has_lost.store(true, Ordering::Relaxed);
        self.update(|all| ranges::lose(all, range));
        drop(self.begin_work());
        drop(self.begin_resolving());
    }
}

#[cfg(all(test, feature = "tracking"))]
mod tests {
    use std::ops::Range;
    use std::sync::{Arc, Mutex, mpsc};
    use std::thread;

    use crate::dirty::{Mode, Options};
    use crate::support::memory::Memory;
    use crate::support::proc::{is_in, thread_id, wait_until};
    use crate::support::{child, features, require, test_name};
    use crate::sync_point::tests::at;
    use crate::sync_point::{Moment, Point};
    use crate::{DirtyTracker, Error, FeatureFlags, Result};

    /// The older one has looked whether the memory is still its own, and is about to reset what was written.
    #[test]
    fn reset_of_older_tracker_loses_no_write_of_newer() {
        require!(FeatureFlags::PAGEFAULT_FLAG_WP);
        child::run_well(test_name!(), || {
            for mode in [Mode::Sync, Mode::Async] {
                if mode == Mode::Async && !features().contains(FeatureFlags::WP_ASYNC) {
                    continue;
                }
                let memory = Arc::new(Memory::anonymous(4));
                let all = memory.range(0, 4);
                let [mut older, later] =
                    [(); 2].map(|()| DirtyTracker::with(Options::new().mode(mode)).unwrap());
                older.track(all.clone()).unwrap();
                let (later, tracked) = (Mutex::new(Some(later)), Arc::new(Mutex::new(None)));
                let (of_action, thread) = (Arc::clone(&memory), Arc::clone(&tracked));
                let armed = at(Point::Watch(Moment::TrackerStep), all.clone(), move |_| {
                    let Some(mut later) = later.lock().unwrap().take() else { return };
                    let (memory, (tell, told)) = (Arc::clone(&of_action), mpsc::channel());
                    *thread.lock().unwrap() = Some(thread::spawn(move || {
                        tell.send(thread_id()).unwrap();
                        Memory::anonymous(4).try_move(0, 4, memory.at(0), 0).unwrap();
                        later.track(memory.range(0, 4)).unwrap();
                        memory.write(1, 1);
                        later
                    }));
                    // Until it waits for this thread, or hasn't waited.
                    let id = told.recv().unwrap();
                    let thread = &thread;
                    wait_until(|| {
                        let finished = thread.lock().unwrap().as_ref().unwrap().is_finished();
                        finished || is_in(id, libc::SYS_futex) == Some(true)
                    });
                });
                let first: Vec<Result<Range<usize>>> = older.take().collect();
                drop(armed);
                let mut later: DirtyTracker = tracked.lock().unwrap().take().unwrap().join().unwrap();
                let second = older.take().next();
                assert!(
                    matches!(second, Some(Err(Error::NotTracked { .. }))),
                    "{mode}: {first:?} {second:?}"
                );
                let told: Vec<_> = later.take().collect::<Result<_>>().unwrap();
                assert_eq!(told, std::slice::from_ref(&memory.range(1, 1)), "{mode}");
            }
        });
    }
}
