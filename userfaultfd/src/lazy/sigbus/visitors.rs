//! How many threads are inside of something that another thread is about to take away.

use std::sync::atomic::Ordering;

use crate::sync::atomic::AtomicU32;

/// Threads inside. A visitor counts itself, and then looks whether the thing is still there; the thread that takes it away says
/// so first, and then waits until nobody is inside.
///
/// Both sides change this number and look at the other's word, so that one of them at least must see the other. Looking is
/// an addition of nothing: of two changes of one number one comes first. If it is the visitor's, it is counted, and waited
/// for; if it is the look, the visitor has read what the look wrote, and with it sees the thing gone.
#[derive(Debug, Default)]
#[repr(transparent)]
pub(super) struct Visitors(AtomicU32);

impl Visitors {
    /// Counts a visitor, which looks after that whether the thing is there.
    pub(super) fn enter(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    /// Counts one less. The thing may be gone right after.
    pub(super) fn leave(&self) {
        // Release: what the visitor has done comes before what is done once nobody is inside.
        self.0.fetch_sub(1, Ordering::Release);
    }

    /// Returns whether a visitor is inside that may have found what was there before.
    pub(super) fn are_inside(&self) -> bool {
        self.0.fetch_add(0, Ordering::SeqCst) > 0
    }
}

/// Every interleaving of a visitor and a thread that takes the thing away.
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
