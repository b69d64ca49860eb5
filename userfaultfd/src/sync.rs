//! What threads share: atomics that models can take the place of, and `AtomicU64` on every target.
//!
//! Some 32-bit targets (mips, powerpc, old arm) have no 64-bit atomics: there `AtomicU64` is a lock.
//!
//! Lock-free pieces that a model explores (the states of pages, the users of the memory of the SIGBUS table, counters in
//! halves) take their atomics from [`atomic`]. `cargo xtask ci --step loom` compiles their tests with
//! `--cfg userfaultfd_loom`, where they are loom's, and runs every interleaving that their orderings allow.

#![cfg_attr(
    not(all(feature = "pager", feature = "tracking", feature = "snapshot")),
    allow(dead_code, reason = "each feature uses a part")
)]

/// The standard library's, or loom's.
#[cfg(feature = "pager")]
pub(crate) mod atomic {
    #[cfg(all(test, userfaultfd_loom))]
    pub(crate) use loom::sync::atomic::{AtomicU8, AtomicU32, AtomicUsize};
    #[cfg(not(all(test, userfaultfd_loom)))]
    pub(crate) use std::sync::atomic::{AtomicU8, AtomicU32, AtomicUsize};

    /// Lets another thread go on, of which this one waits for something.
    #[cfg(any(test, not(target_has_atomic = "64")))]
    pub(crate) fn spin_loop() {
        #[cfg(all(test, userfaultfd_loom))]
        loom::thread::yield_now();
        #[cfg(not(all(test, userfaultfd_loom)))]
        std::hint::spin_loop();
    }
}

#[cfg(target_has_atomic = "64")]
pub(crate) use std::sync::atomic::AtomicU64;

#[cfg(not(target_has_atomic = "64"))]
pub(crate) use locked::AtomicU64;

/// Tested everywhere.
#[cfg(any(test, not(target_has_atomic = "64")))]
mod locked {
    use std::sync::atomic::Ordering;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    /// What this crate uses of the standard library's. Orderings don't matter: a lock is as strict as can be.
    #[derive(Debug, Default)]
    pub(crate) struct AtomicU64(Mutex<u64>);

    impl AtomicU64 {
        pub(crate) const fn new(value: u64) -> Self {
            Self(Mutex::new(value))
        }

        fn lock(&self) -> MutexGuard<'_, u64> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }

        fn update(&self, new: impl FnOnce(u64) -> u64) -> u64 {
            let mut value = self.lock();
            let old = *value;
            *value = new(old);
            old
        }

        pub(crate) fn load(&self, _: Ordering) -> u64 {
            *self.lock()
        }

        pub(crate) fn store(&self, value: u64, _: Ordering) {
            self.update(|_| value);
        }

        pub(crate) fn fetch_add(&self, more: u64, _: Ordering) -> u64 {
            self.update(|value| value.wrapping_add(more))
        }

        pub(crate) fn fetch_or(&self, bits: u64, _: Ordering) -> u64 {
            self.update(|value| value | bits)
        }

        pub(crate) fn fetch_and(&self, bits: u64, _: Ordering) -> u64 {
            self.update(|value| value & bits)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;

    use super::locked::AtomicU64;

    #[test]
    fn locked_atomic_behaves_as_native_one() {
        crate::support::require!();
        let (ours, theirs) = (AtomicU64::new(5), std::sync::atomic::AtomicU64::new(5));
        assert_eq!(ours.fetch_add(u64::MAX, SeqCst), theirs.fetch_add(u64::MAX, SeqCst));
        assert_eq!(ours.fetch_or(1 << 63, SeqCst), theirs.fetch_or(1 << 63, SeqCst));
        assert_eq!(ours.fetch_and(1 << 63 | 4, SeqCst), theirs.fetch_and(1 << 63 | 4, SeqCst));
        assert_eq!(ours.load(SeqCst), theirs.load(SeqCst));
        ours.store(7, SeqCst);
        assert_eq!(ours.load(SeqCst), 7);
    }
}
