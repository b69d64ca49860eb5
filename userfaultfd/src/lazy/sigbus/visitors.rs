//! A count of the threads that use something which another thread is about to take away.

use std::sync::atomic::Ordering;

use crate::sync::atomic::AtomicU32;

/// The number of threads inside. A visitor counts itself, and then checks whether the thing is still there; the thread
/// that takes it away marks it as gone, and then waits until the count is 0.
///
/// Each side writes one word and reads the other's, so at least one must see the other. The waiting thread reads the
/// count by adding 0: of two read-modify-writes of one number, one comes first. If that is the visitor's, the visitor is
/// counted, and waited for. If it is the waiting thread's, the visitor reads what that wrote, and so sees the mark.
#[derive(Debug, Default)]
#[repr(transparent)]
pub(super) struct Visitors(AtomicU32);

impl Visitors {
    /// Counts a visitor, which must check afterwards whether the thing is there.
    pub(super) fn enter(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    /// Counts one visitor less. The thing may be gone right after.
    pub(super) fn leave(&self) {
        // Release: what the visitor did happens before what the waiting thread does.
        self.0.fetch_sub(1, Ordering::Release);
    }

    /// Returns whether a visitor is inside that may have missed the mark.
    pub(super) fn are_inside(&self) -> bool {
        self.0.fetch_add(0, Ordering::SeqCst) > 0
    }
}

/// Models every interleaving of a visitor and a thread that takes the thing away.
#[cfg(all(test, userfaultfd_loom))]
#[expect(unsafe_code, reason = "loom's cells, which report what overlaps")]
mod loom_models {
    use std::sync::Arc;

    use loom::cell::UnsafeCell;
    use loom::sync::atomic::AtomicBool;
    use loom::thread;

    use super::*;

    /// As `table::remove` and `Owned::drop` do it: an entry is taken away, searches end, and then users.
    #[test]
    fn memory_stays_until_those_who_found_it_have_left() {
        loom::model(|| {
            let shared = Arc::new((
                AtomicBool::new(true),
                Visitors::default(),
                Visitors::default(),
                UnsafeCell::new(0),
            ));
            let handler = Arc::clone(&shared);
            let handler = thread::spawn(move || {
                let (entry, searching, users, memory) = &*handler;
                searching.enter();
                let found = entry.load(Ordering::SeqCst);
                if found {
                    users.enter();
                }
                searching.leave();
                if found {
                    // SAFETY: loom reports a write at the same time.
                    memory.with(|memory| unsafe { memory.read() });
                    users.leave();
                }
            });
            let (entry, searching, users, memory) = &*shared;
            entry.store(false, Ordering::SeqCst);
            for visitors in [searching, users] {
                while visitors.are_inside() {
                    thread::yield_now();
                }
            }
            // SAFETY: as above: this is where the memory is unmapped.
            memory.with_mut(|memory| unsafe { memory.write(1) });
            handler.join().unwrap();
        });
    }
}
