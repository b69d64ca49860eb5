//! How a fault reaches the thread that answers it.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::binding::Bindings;
use crate::pager::fill::work::Fault;
use crate::sys;

/// How faults reach the threads that answer them: most of what a fault takes.
///
/// A thread that sleeps has to be waked, on a virtual machine at tens of microseconds where that is another CPU; what
/// is to be done then takes about one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Delivery {
    /// Threads sleep until there is a fault, and one is waked for each. Takes no time while there is none.
    ///
    /// A thread that has answered a fault gives way first, once, if that brings the next fault: where the faulting
    /// thread shares its CPU, neither has to be waked then.
    Sleep,
    /// A thread that has answered a fault looks for the next one for a moment before it sleeps, at most 100 µs, if
    /// faults are answered faster that way: it measures what they take, and tries the other way now and then. Never on
    /// a single CPU.
    #[default]
    Adaptive,
    /// A thread that has answered a fault looks for the next one so long before it sleeps. One thread at a time does
    /// that. Never on a single CPU, where it would keep the faulting thread from running.
    Spin(Duration),
    /// The thread runs on the CPU of the thread that faults, so that no other CPU has to be waked. Best where one
    /// thread faults, or several that take turns, and each stays on its CPU, as that of a virtual CPU often does: a
    /// thread that may run elsewhere the kernel moves to an idle CPU when its page is there, as its own is busy with
    /// this one, and then it is as `Sleep`.
    ///
    /// Where another thread keeps the CPU for itself, as one under `SCHED_FIFO` may, the thread runs elsewhere after some
    /// ten milliseconds, until it has answered 128 more faults.
    ///
    /// Takes a descriptor with the feature [`THREAD_ID`](crate::FeatureFlags::THREAD_ID), of a process that `/proc`
    /// shows; otherwise it is as `Sleep`.
    SameCpu,
}

/// The longest that is worth spinning for.
const LONGEST_SPIN: Duration = Duration::from_micros(100);

/// What takes longer than this is filling for the most part.
const FILLING: Duration = Duration::from_micros(32);

/// So many faults later it is looked again where the faulting thread runs.
const FAULTS_PER_CPU_CHECK: u32 = 128;

/// How long a thread looks for the next fault before it sleeps, and where it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WaitPolicy {
    delivery: Delivery,
    choice: SpinPolicy,
    way: YieldPolicy,
    /// Beside which thread it runs, and how many faults of it have come since that was looked at.
    beside: (i32, u32),
    /// Who faulted last, or 0, and when that was read.
    thread: i32,
    since: Option<Instant>,
}

impl WaitPolicy {
    pub(crate) fn new(delivery: Delivery) -> Self {
        let single = std::thread::available_parallelism().map_or(1, usize::from) == 1;
        let delivery = match delivery {
            Delivery::Adaptive | Delivery::Spin(_) if single => Delivery::Sleep,
            delivery => delivery,
        };
        Self {
            delivery,
            choice: SpinPolicy::new(),
            way: YieldPolicy::new(),
            beside: (0, 0),
            thread: 0,
            since: None,
        }
    }

    /// How long to look for the next fault.
    fn budget(&mut self) -> Duration {
        match self.delivery {
            Delivery::Sleep | Delivery::SameCpu => Duration::ZERO,
            Delivery::Spin(budget) => budget,
            Delivery::Adaptive if self.choice.next(Instant::now, || is_here(self.thread)) => LONGEST_SPIN,
            Delivery::Adaptive => Duration::ZERO,
        }
    }

    /// Looks for the next fault for a moment, unless another worker does. `look` tells whether there was one.
    pub(crate) fn spin(
        &mut self,
        spinner: &Spinner,
        is_stopping: impl Fn() -> bool,
        mut look: impl FnMut() -> bool,
    ) -> bool {
        let budget = self.budget();
        if budget.is_zero() {
            return false;
        }
        // Until it is dropped, also if answering what is found panics.
        let Some(spinning) = spinner.try_begin() else { return false };
        let start = Instant::now();
        let found = loop {
            if look() {
                break true;
            }
            if start.elapsed() >= budget || is_stopping() {
                break false;
            }
            std::hint::spin_loop();
        };
        drop(spinning);
        if !found {
            self.choice.missed();
        }
        found
    }

    /// Whether to let others run on this CPU before it is looked for the next fault.
    pub(crate) fn gives_way(&mut self) -> bool {
        let spins = match self.delivery {
            Delivery::Sleep | Delivery::SameCpu => false,
            Delivery::Adaptive => self.choice.spins,
            Delivery::Spin(_) => true,
        };
        !spins && self.since.is_some() && self.way.next()
    }

    /// Others have run, and the next fault was read then, or there was none.
    pub(crate) fn gave_way(&mut self, next: Option<&Fault>) {
        let waited = next.is_some_and(|fault| {
            let took =
                self.since.map_or(Duration::ZERO, |since| fault.since.saturating_duration_since(since));
            took > LONGEST_SPIN && (fault.thread == 0 || fault.thread != self.thread)
        });
        self.way.ended(next.is_some(), waited);
    }

    /// A fault was answered. Goes to where the faulting thread runs, if it is to.
    pub(crate) fn answered(&mut self, fault: &Fault, bindings: &Bindings, place: usize) {
        (self.thread, self.since) = (fault.thread, Some(fault.since));
        if self.delivery != Delivery::SameCpu || fault.thread == 0 {
            return;
        }
        bindings.take_turn(place);
        let (thread, faults) = self.beside;
        if thread == fault.thread && faults < FAULTS_PER_CPU_CHECK && !bindings.is_free(place) {
            self.beside.1 += 1;
            return;
        }
        self.beside = (fault.thread, 0);
        match sys::last_cpu(fault.thread) {
            Some(cpu) => bindings.bind(place, cpu),
            None => bindings.give_up(place),
        }
    }
}

/// Whether a worker spins, waiting for the next fault. The others sleep.
///
/// Relaxed: two that spin cost time, nothing else, and nothing is read because of it.
#[derive(Debug, Default)]
pub(crate) struct Spinner(AtomicBool);

impl Spinner {
    /// Begins to spin, if no other worker does.
    fn try_begin(&self) -> Option<Spinning<'_>> {
        let begun = self.0.compare_exchange(false, true, Ordering::Relaxed, Ordering::Relaxed);
        begun.ok().map(|_| Spinning(&self.0))
    }
}

/// Lets other workers spin once it is dropped.
struct Spinning<'a>(&'a AtomicBool);

impl Drop for Spinning<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// Whether a thread ran on the CPU of this one the last time.
fn is_here(thread: i32) -> bool {
    thread != 0 && sys::own_cpu().is_some_and(|own| sys::last_cpu(thread) == Some(own))
}

/// Whether to spin or to sleep until the next fault: what has taken less time for each fault. The time between faults is
/// in both, and wakes that cross CPUs are in one of them.
#[derive(Clone, Copy, Debug)]
struct SpinPolicy {
    spins: bool,
    /// What was faster when both were tried the last time.
    prefers_spinning: bool,
    /// Faults of this run, and how many of them are still to come.
    run: u32,
    left: u32,
    began: Option<Instant>,
    /// Spins of this run in which no fault came.
    misses: u32,
    /// What a fault took, sleeping and spinning.
    took: [Duration; 2],
    /// How long the next run of what is preferred is.
    next: u32,
}

impl SpinPolicy {
    /// So many faults are answered in the other way, to learn whether it is better.
    const TRIAL: u32 = 32;

    /// So many between two trials, which are twice as many each time that the trial has brought nothing new.
    const RUN: u32 = 8 * Self::TRIAL;
    const LONGEST_RUN: u32 = 64 * Self::RUN;

    fn new() -> Self {
        Self {
            spins: false,
            prefers_spinning: false,
            run: Self::TRIAL,
            left: Self::TRIAL,
            began: None,
            misses: 0,
            took: [LONGEST_SPIN; 2],
            next: Self::RUN,
        }
    }

    /// Whether to spin until the next fault. `is_here` tells whether who faults runs on this CPU.
    fn next(&mut self, now: impl FnOnce() -> Instant, is_here: impl FnOnce() -> bool) -> bool {
        if self.left > 0 && self.began.is_some() {
            self.left -= 1;
            return self.spins;
        }
        let now = now();
        if let Some(began) = self.began {
            self.took[usize::from(self.spins)] = (now - began) / self.run;
            self.turn(is_here);
        }
        self.began = Some(now);
        self.misses = 0;
        self.left = self.run - 1;
        self.spins
    }

    /// After a run: what to do in the next one.
    fn turn(&mut self, is_here: impl FnOnce() -> bool) {
        let [slept, spun] = self.took;
        if self.spins != self.prefers_spinning {
            // An eighth faster, or it isn't worth the time of a CPU; less of what mostly is filling.
            let better = slept.saturating_sub(spun) * 8 > spun.min(FILLING);
            self.next = if better == self.prefers_spinning {
                (self.next * 2).min(Self::LONGEST_RUN)
            } else {
                Self::RUN
            };
            self.prefers_spinning = better;
            (self.spins, self.run) = (better, self.next);
        } else if self.spins || !is_here() {
            // Not where both share a CPU: spinning would drive the other one away, and sleeping take longer after that.
            (self.spins, self.run) = (!self.spins, Self::TRIAL);
        }
    }

    /// A spin was for nothing. Soon no more is made.
    fn missed(&mut self) {
        self.misses += 1;
        if self.spins && self.misses > Self::TRIAL / 8 {
            self.took[1] = LONGEST_SPIN;
            (self.spins, self.prefers_spinning) = (false, false);
            (self.run, self.next) = (self.next, (self.next * 2).min(Self::LONGEST_RUN));
            (self.left, self.began) = (0, None);
        }
    }
}

/// Whether a thread that has answered a fault gives way to others, once, before it looks for the next one. Where the one
/// that faults shares its CPU the next fault is there then, and neither has to sleep and be waked, which takes two
/// microseconds.
///
/// But the other one may have the CPU for milliseconds, and a fault of a third on another CPU waits for that, where it
/// would wake a thread that sleeps.
#[derive(Clone, Copy, Debug)]
struct YieldPolicy {
    /// So many times it is not done.
    left: u32,
    /// So many, if it was for nothing.
    futile: u32,
    /// So many, if a fault may have waited.
    costly: u32,
}

impl YieldPolicy {
    const FUTILE: u32 = 1 << 10;

    /// So many faults have to be answered faster to make up for what one may have waited.
    const COSTLY: RangeInclusive<u32> = 1 << 12..=1 << 20;

    fn new() -> Self {
        Self { left: 0, futile: 1, costly: *Self::COSTLY.start() }
    }

    fn next(&mut self) -> bool {
        let now = self.left == 0;
        self.left = self.left.saturating_sub(1);
        now
    }

    /// It was done, and the next fault was there then or not; that one may have waited for long.
    fn ended(&mut self, found: bool, waited: bool) {
        if waited {
            self.left = self.costly;
            self.costly = (self.costly * 2).min(*Self::COSTLY.end());
        } else if found {
            self.futile = 1;
        } else {
            self.left = self.futile;
            self.futile = (self.futile * 2).min(Self::FUTILE);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::pager::bell::Bell;
    use crate::pager::{FaultAround, PageData};
    use crate::{FaultKind, LazyMemory};

    fn waiting(delivery: Delivery) -> WaitPolicy {
        WaitPolicy { delivery, ..WaitPolicy::new(Delivery::Sleep) }
    }

    /// Whether it looked at all.
    fn looks(waiting: &mut WaitPolicy, spinner: &Spinner, found: bool) -> bool {
        let mut looked = false;
        waiting.spin(
            spinner,
            || false,
            || {
                looked = true;
                found
            },
        );
        looked
    }

    #[test]
    fn threads_sleep_at_once() {
        crate::support::require!();
        let spinner = Spinner::default();
        for delivery in [Delivery::Sleep, Delivery::SameCpu] {
            let mut waiting = waiting(delivery);
            assert!((0..100).all(|_| !looks(&mut waiting, &spinner, true)), "{delivery:?}");
        }
    }

    #[test]
    fn spinning_ends_with_its_budget_or_a_fault() {
        crate::support::require!();
        let (spinner, budget) = (Spinner::default(), Duration::from_micros(200));
        let mut waiting = waiting(Delivery::Spin(budget));
        let start = Instant::now();
        assert!(!waiting.spin(&spinner, || false, || false));
        assert!(start.elapsed() >= budget);
        // Longer than anybody is kept from running.
        waiting.delivery = Delivery::Spin(Duration::from_secs(60));
        let mut left = 3;
        assert!(waiting.spin(
            &spinner,
            || false,
            || {
                left -= 1;
                left == 0
            }
        ));
        assert_eq!(left, 0);
    }

    #[test]
    fn one_thread_spins_at_a_time() {
        crate::support::require!();
        let spinner = Spinner::default();
        let (mut one, mut other) =
            (waiting(Delivery::Spin(LONGEST_SPIN)), waiting(Delivery::Spin(LONGEST_SPIN)));
        assert!(one.spin(&spinner, || false, || !looks(&mut other, &spinner, true)));
        assert!(looks(&mut other, &spinner, true), "the first has ended");
    }

    #[test]
    fn a_thread_that_panics_while_it_spins_lets_others_spin() {
        crate::support::require!();
        let spinner = Spinner::default();
        let mut panicking = waiting(Delivery::Spin(LONGEST_SPIN));
        let spin =
            std::panic::AssertUnwindSafe(|| panicking.spin(&spinner, || false, || panic!("a mistake")));
        assert!(std::panic::catch_unwind(spin).is_err());
        assert!(looks(&mut waiting(Delivery::Spin(LONGEST_SPIN)), &spinner, true));
    }

    /// How many of so many faults it spins for, if they take so long, sleeping and spinning.
    fn spins(choice: &mut SpinPolicy, now: &mut Instant, faults: u32, took: [u64; 2]) -> u32 {
        (0..faults).fold(0, |spins, _| {
            let spin = choice.next(|| *now, || false);
            *now += Duration::from_micros(took[usize::from(spin)]);
            if spin && took[1] > 500 {
                choice.missed();
            }
            spins + u32::from(spin)
        })
    }

    #[test]
    fn faster_policy_is_kept_and_the_other_retried_more_rarely() {
        crate::support::require!();
        let (mut choice, mut now) = (SpinPolicy::new(), Instant::now());
        // A wake of another CPU is dear.
        let spun = spins(&mut choice, &mut now, 10_000, [45, 15]);
        assert!(spun > 9_500, "{spun}");
        // Both threads are on one now.
        let spun = spins(&mut choice, &mut now, 100_000, [8, 15]);
        assert!(spun < 18_000, "{spun}");
        let spun = spins(&mut choice, &mut now, 100_000, [8, 15]);
        assert!(spun < 500, "{spun}");
        // Little is gained: not worth a CPU.
        assert!(spins(&mut choice, &mut now, 100_000, [16, 15]) < 500);
        // Faults come so seldom that nobody would wait for them.
        assert!(spins(&mut choice, &mut now, 100_000, [1000, 990]) < 500);
        // Each takes its time, and the wake is in addition.
        let mut choice = SpinPolicy::new();
        assert!(spins(&mut choice, &mut now, 10_000, [255, 225]) > 9_000);
    }

    #[test]
    fn worker_never_spins_on_the_cpu_of_the_faulting_thread() {
        crate::support::require!();
        let (mut choice, now) = (SpinPolicy::new(), Instant::now());
        assert!((0..100_000).all(|_| !choice.next(|| now, || true)));
    }

    #[test]
    fn spinning_ends_soon_where_no_fault_comes() {
        crate::support::require!();
        let (mut choice, mut now) = (SpinPolicy::new(), Instant::now());
        spins(&mut choice, &mut now, 10_000, [45, 15]);
        assert!(choice.spins);
        let misses = (0..100).filter(|_| choice.next(|| now, || false)).count();
        assert_eq!(misses, 100);
        let mut misses = 0;
        while choice.next(|| now, || false) {
            choice.missed();
            misses += 1;
        }
        assert!(misses <= 5, "{misses}");
        // And begins anew.
        assert!(spins(&mut choice, &mut now, 20_000, [45, 15]) > 10_000);
    }

    /// How often of so many faults it gives way, if the next one is there then as told, and has waited.
    fn ways(way: &mut YieldPolicy, faults: u32, found: bool, waited: bool) -> u32 {
        (0..faults).fold(0, |ways, _| {
            let gives = way.next();
            if gives {
                way.ended(found, waited);
            }
            ways + u32::from(gives)
        })
    }

    #[test]
    fn it_gives_way_where_that_brings_the_next_fault() {
        crate::support::require!();
        let mut way = YieldPolicy::new();
        assert_eq!(ways(&mut way, 100, true, false), 100);
        // The faulting thread is on another CPU.
        let futile = ways(&mut way, 10_000, false, false);
        assert!((10..25).contains(&futile), "{futile}");
        // It has come back.
        assert!(ways(&mut way, 2_000, true, false) > 900);
        // Faults come in bursts.
        let mut futile = 0;
        for _ in 0..100 {
            assert!(ways(&mut way, 60, true, false) > 57);
            futile += ways(&mut way, 1, false, false);
        }
        assert_eq!(futile, 100);
        // Others have the CPU meanwhile.
        let mut costly = 0;
        for _ in 0..100_000 {
            ways(&mut way, 10, true, false);
            costly += ways(&mut way, 1, true, true);
        }
        assert!(costly < 10, "{costly}");
    }

    /// A fault of another thread may have waited; one of the same thread has had the CPU itself.
    #[test]
    fn a_fault_that_may_have_waited_for_the_cpu_is_costly() {
        crate::support::require!();
        let (since, bindings) = (Instant::now(), Bindings::new(1, Arc::new(Bell::new().unwrap())));
        let fault = |thread, micros| Fault {
            address: 0,
            kind: FaultKind::Missing,
            is_write: false,
            thread,
            since: since + Duration::from_micros(micros),
            joined: false,
        };
        for (thread, micros, costly) in
            [(7, 9, false), (8, 9, false), (7, 3000, false), (8, 3000, true), (0, 3000, true)]
        {
            let mut waiting = waiting(Delivery::Sleep);
            assert!(!waiting.gives_way(), "there was no fault");
            waiting.answered(&fault(7, 0), &bindings, 0);
            assert!(waiting.gives_way());
            waiting.gave_way(Some(&fault(thread, micros)));
            assert_eq!(waiting.gives_way(), !costly, "{thread} {micros}");
        }
        let mut spinning = waiting(Delivery::Spin(LONGEST_SPIN));
        spinning.answered(&fault(7, 0), &bindings, 0);
        assert!(!spinning.gives_way());
    }

    #[test]
    fn a_fault_wakes_one_thread_of_many() {
        crate::support::require!();
        const FAULTS: usize = 200;
        let source = |_: u64, _: &mut [u8]| Ok(PageData::Zero);
        let memory = LazyMemory::builder(source).len(FAULTS * crate::page_size()).threads(8);
        let memory = memory.delivery(Delivery::Sleep).fault_around(FaultAround::Page).build().unwrap();
        assert!(memory.chunks(crate::page_size()).all(|page| page[0] == 0));
        let statistics = memory.statistics();
        assert_eq!(statistics.faults(), FAULTS as u64);
        assert!(statistics.wakeups <= FAULTS as u64 + 8, "{statistics}");
    }

    #[test]
    fn every_delivery_answers_every_fault() {
        crate::support::require!();
        let page = crate::page_size();
        let source = |offset: u64, buffer: &mut [u8]| {
            buffer.fill((offset / crate::page_size() as u64 % 251) as u8);
            Ok(PageData::Data)
        };
        for delivery in [
            Delivery::Sleep,
            Delivery::Adaptive,
            Delivery::Spin(Duration::from_micros(50)),
            Delivery::SameCpu,
        ] {
            for threads in [1, 3] {
                let memory = LazyMemory::builder(source).len(64 * page).threads(threads);
                let memory = memory.delivery(delivery).fault_around(FaultAround::Page).build().unwrap();
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
