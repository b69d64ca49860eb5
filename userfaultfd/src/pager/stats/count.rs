//! A counter that one thread increments and any thread reads.

/// Whether anything is counted: always, except where the benchmark `report` measures the cost of counting.
pub(super) const COUNTED: bool = cfg!(not(userfaultfd_uncounted));

#[cfg(not(target_has_atomic = "64"))]
pub(super) use halves::Count;
#[cfg(target_has_atomic = "64")]
pub(super) use whole::Count;

/// The counter on targets that write 64 bits at once.
#[cfg(target_has_atomic = "64")]
mod whole {
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Only one thread writes, so it needs no locked instruction: it loads the value that it stored last.
    #[derive(Debug, Default)]
    pub(crate) struct Count(AtomicU64);

    impl Count {
        pub(crate) const fn new() -> Self {
            Self(AtomicU64::new(0))
        }

        #[inline]
        pub(crate) fn get(&self) -> u64 {
            self.0.load(Ordering::Relaxed)
        }

        /// For the writing thread only, as the other setters.
        #[inline]
        pub(crate) fn set(&self, value: u64) {
            self.0.store(value, Ordering::Relaxed);
        }
    }
}

/// The counter on other targets: 32-bit mips, powerpc, riscv, old arm and others. Tested on all.
#[cfg(any(test, not(target_has_atomic = "64")))]
mod halves {
    use std::sync::atomic::Ordering;

    use crate::sync::atomic::{AtomicU32, spin_loop};

    /// The upper half is stored twice, before and after the lower one, and read in the opposite order. A reader that finds
    /// both equal has the lower half that belongs to them.
    #[derive(Debug, Default)]
    pub(crate) struct Count {
        before: AtomicU32,
        lower: AtomicU32,
        after: AtomicU32,
    }

    impl Count {
        #[cfg(not(all(test, userfaultfd_loom)))]
        pub(crate) const fn new() -> Self {
            Self { before: AtomicU32::new(0), lower: AtomicU32::new(0), after: AtomicU32::new(0) }
        }

        #[inline]
        pub(crate) fn get(&self) -> u64 {
            loop {
                // Each load sees at least what was stored before the store that the load before it saw.
                let upper = self.after.load(Ordering::Acquire);
                let lower = self.lower.load(Ordering::Acquire);
                if self.before.load(Ordering::Acquire) == upper {
                    return u64::from(upper) << 32 | u64::from(lower);
                }
                spin_loop();
            }
        }

        #[inline]
        pub(crate) fn set(&self, value: u64) {
            let (upper, lower) = ((value >> 32) as u32, value as u32);
            self.before.store(upper, Ordering::Release);
            self.lower.store(lower, Ordering::Release);
            self.after.store(upper, Ordering::Release);
        }
    }
}

impl Count {
    #[inline]
    pub(crate) fn add(&self, more: u64) {
        if COUNTED {
            self.set(self.get().saturating_add(more));
        }
    }
}

/// Models every interleaving of a writer and a reader, for counters in halves.
#[cfg(all(test, userfaultfd_loom))]
mod loom_models {
    use std::sync::Arc;

    use loom::thread;

    use super::halves::Count;

    #[test]
    fn reader_of_halves_sees_whole_values_in_order() {
        const VALUES: [u64; 3] = [0, u32::MAX as u64, 1 << 32];
        loom::model(|| {
            let count = Arc::new(Count::default());
            let writer = Arc::clone(&count);
            let writer = thread::spawn(move || VALUES[1..].iter().for_each(|value| writer.set(*value)));
            let place =
                |value| VALUES.iter().position(|known| *known == value).expect("a value that was stored");
            let first = place(count.get());
            assert!(first <= place(count.get()));
            writer.join().unwrap();
            assert_eq!(count.get(), VALUES[2]);
        });
    }
}

#[cfg(all(test, not(userfaultfd_loom)))]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::{Count, halves};

    /// The increment: wraps the lower half every third time.
    const STEP: u64 = (1 << 32) / 3;
    const STEPS: u64 = 300_000;

    macro_rules! reader_sees_multiples_that_grow {
        ($count:expr) => {
            let count = $count;
            let running = AtomicBool::new(true);
            let (seen, last) = thread::scope(|scope| {
                let reader = scope.spawn(|| {
                    let (mut seen, mut last) = (0_u64, 0);
                    while running.load(Ordering::Relaxed) {
                        let now = count.get();
                        assert!(now >= last, "{now:#x} after {last:#x}");
                        assert_eq!(now % STEP, 0, "{now:#x} was never stored");
                        seen += u64::from(now != last);
                        last = now;
                    }
                    (seen, count.get())
                });
                // Lets the reader read between two steps on a machine with one CPU, too.
                for step in 1..=STEPS {
                    count.set(step * STEP);
                    if step % 4096 == 0 {
                        thread::yield_now();
                    }
                }
                running.store(false, Ordering::Relaxed);
                reader.join().unwrap()
            });
            assert_eq!(last, STEPS * STEP);
            eprintln!("{seen} different values seen");
        };
    }

    #[test]
    fn a_reader_sees_whole_values_that_grow() {
        crate::support::require!();
        reader_sees_multiples_that_grow!(Count::new());
    }

    #[test]
    fn a_reader_of_halves_sees_whole_values_that_grow() {
        crate::support::require!();
        reader_sees_multiples_that_grow!(halves::Count::new());
    }

    #[test]
    fn adding_saturates() {
        crate::support::require!();
        let count = Count::new();
        count.add(u64::MAX - 1);
        count.add(1);
        count.add(1);
        assert_eq!(count.get(), u64::MAX);
    }
}
