//! How a fault reaches the thread that answers it.

use std::time::{Duration, Instant};

use super::fault::Fault;
use super::shared::Shared;
use crate::sys;

/// How faults reach the threads that answer them: most of what a fault takes.
///
/// A thread that sleeps has to be waked, on a virtual machine at tens of microseconds where that is another CPU; what
/// is to be done then takes about one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Delivery {
    /// Threads sleep until there is a fault, and one is waked for each. Takes no time while there is none.
    Threads,
    /// A thread that has answered a fault looks for the next one for a moment before it sleeps, if faults have been
    /// coming that fast lately. It learns how long is worth it, 100 µs at most. Never on a single CPU.
    #[default]
    Adaptive,
    /// A thread that has answered a fault looks for the next one so long before it sleeps. One thread at a time does
    /// that. Never on a single CPU, where it would keep the faulting thread from running.
    Spin(Duration),
    /// The thread runs on the CPU of the thread that faults, so that no other CPU has to be waked. Best where one
    /// thread faults, or several that take turns.
    ///
    /// Takes a descriptor with the feature [`THREAD_ID`](crate::FeatureFlags::THREAD_ID), of a process that `/proc`
    /// shows; otherwise it is as `Threads`.
    Beside,
}

/// The longest that is worth spinning for.
const LONGEST: Duration = Duration::from_micros(100);

/// So seldom an adaptive thread spins though it doesn't seem to be worth it, to learn whether it is now.
const TRIAL: u32 = 16;

/// So many faults later it is looked again where the faulting thread runs.
const LOOK: u32 = 128;

/// How long a thread looks for the next fault before it sleeps, and where it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    delivery: Delivery,
    /// How soon faults have come after the one before, when that was looked at.
    gap: Duration,
    sleeps: u32,
    /// Beside which thread it runs, and how many faults of it have come since that was looked at.
    beside: (i32, u32),
}

impl Waiting {
    pub(crate) fn new(delivery: Delivery) -> Self {
        let single = std::thread::available_parallelism().map_or(1, usize::from) == 1;
        let delivery = match delivery {
            Delivery::Adaptive | Delivery::Spin(_) if single => Delivery::Threads,
            delivery => delivery,
        };
        Self { delivery, gap: LONGEST * 2, sleeps: 0, beside: (0, 0) }
    }

    /// How long to look for the next fault.
    fn budget(&mut self) -> Duration {
        match self.delivery {
            Delivery::Threads | Delivery::Beside => Duration::ZERO,
            Delivery::Spin(budget) => budget,
            Delivery::Adaptive if self.gap < LONGEST / 2 => self.gap * 2,
            Delivery::Adaptive => {
                self.sleeps = self.sleeps.wrapping_add(1);
                if self.sleeps % TRIAL == 0 { LONGEST } else { Duration::ZERO }
            }
        }
    }

    /// Looks for the next fault for a moment. `look` tells whether there was one.
    pub(crate) fn spin(&mut self, shared: &Shared, mut look: impl FnMut() -> bool) -> bool {
        let budget = self.budget();
        if budget.is_zero() || shared.start_spinning().is_err() {
            return false;
        }
        let start = Instant::now();
        let mut waited;
        let found = loop {
            waited = start.elapsed();
            if look() {
                break true;
            }
            if waited >= budget || shared.is_stopping() {
                break false;
            }
            std::hint::spin_loop();
        };
        shared.end_spinning();
        // A miss counts as much as four hits, so that it ends soon where it doesn't pay.
        let waited = waited.min(LONGEST);
        self.gap = if found { (self.gap * 7 + waited) / 8 } else { (self.gap + LONGEST) / 2 };
        found
    }

    /// Goes to where the faulting thread runs.
    pub(crate) fn go_beside(&mut self, fault: &Fault) {
        if self.delivery != Delivery::Beside || fault.thread == 0 {
            return;
        }
        let (thread, faults) = self.beside;
        if thread == fault.thread && faults < LOOK {
            self.beside.1 += 1;
            return;
        }
        self.beside = (fault.thread, 0);
        if let Some(cpu) = sys::last_cpu(fault.thread) {
            // Without the permission it stays where it is.
            let _moved = sys::run_on(cpu);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LazyMemory;
    use crate::pager::{Around, Fill, Retry};

    fn waiting(delivery: Delivery) -> Waiting {
        Waiting { delivery, ..Waiting::new(Delivery::Threads) }
    }

    fn shared() -> Shared {
        Shared::new(1, 0, Retry::default()).unwrap()
    }

    /// Whether it looked at all.
    fn looks(waiting: &mut Waiting, shared: &Shared, found: bool) -> bool {
        let mut looked = false;
        waiting.spin(shared, || {
            looked = true;
            found
        });
        looked
    }

    #[test]
    fn threads_sleep_at_once() {
        let shared = shared();
        for delivery in [Delivery::Threads, Delivery::Beside] {
            let mut waiting = waiting(delivery);
            assert!((0..100).all(|_| !looks(&mut waiting, &shared, true)), "{delivery:?}");
        }
    }

    #[test]
    fn spinning_ends_with_its_budget_or_a_fault() {
        let (shared, budget) = (shared(), Duration::from_micros(200));
        let mut waiting = waiting(Delivery::Spin(budget));
        let start = Instant::now();
        assert!(!waiting.spin(&shared, || false));
        assert!(start.elapsed() >= budget);
        let mut left = 3;
        assert!(waiting.spin(&shared, || {
            left -= 1;
            left == 0
        }));
        assert_eq!(left, 0);
    }

    #[test]
    fn one_thread_spins_at_a_time() {
        let shared = shared();
        let (mut one, mut other) = (waiting(Delivery::Spin(LONGEST)), waiting(Delivery::Spin(LONGEST)));
        assert!(one.spin(&shared, || !looks(&mut other, &shared, true)));
        assert!(looks(&mut other, &shared, true), "the first has ended");
    }

    #[test]
    fn it_is_learned_whether_spinning_is_worth_it() {
        let shared = shared();
        let mut waiting = waiting(Delivery::Adaptive);
        let trials =
            |waiting: &mut Waiting, found| (0..10 * TRIAL).filter(|_| looks(waiting, &shared, found)).count();
        assert_eq!(trials(&mut waiting, false), 10, "a trial now and then, as long as nothing comes");
        // A fault that comes at once each time.
        assert!(trials(&mut waiting, true) > 3 * TRIAL as usize, "it found out soon");
        assert!(waiting.gap < LONGEST / 2);
        assert!(trials(&mut waiting, false) < 30, "and that it is over, too");
    }

    #[test]
    fn a_fault_wakes_one_thread_of_many() {
        const FAULTS: usize = 200;
        let source = |_: u64, _: &mut [u8]| Ok(Fill::Zero);
        let memory = LazyMemory::builder(source).len(FAULTS * crate::page_size()).threads(8);
        let memory = memory.delivery(Delivery::Threads).around(Around::Page).build().unwrap();
        assert!(memory.chunks(crate::page_size()).all(|page| page[0] == 0));
        let statistics = memory.statistics();
        assert_eq!(statistics.faults(), FAULTS as u64);
        assert!(statistics.wakeups <= FAULTS as u64 + 8, "{statistics}");
    }

    #[test]
    fn every_delivery_answers_every_fault() {
        let page = crate::page_size();
        let source = |offset: u64, buffer: &mut [u8]| {
            buffer.fill((offset / crate::page_size() as u64 % 251) as u8);
            Ok(Fill::Data)
        };
        for delivery in [
            Delivery::Threads,
            Delivery::Adaptive,
            Delivery::Spin(Duration::from_micros(50)),
            Delivery::Beside,
        ] {
            for threads in [1, 3] {
                let memory = LazyMemory::builder(source).len(64 * page).threads(threads);
                let memory = memory.delivery(delivery).around(Around::Page).build().unwrap();
                std::thread::scope(|scope| {
                    for first in 0..3 {
                        let memory = &memory;
                        scope.spawn(move || {
                            for at in (first..64).step_by(3) {
                                assert_eq!(memory[at * page], at as u8, "{delivery:?}, {threads} threads");
                            }
                        });
                    }
                });
            }
        }
    }
}
