//! How a fault reaches the worker that resolves it.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::binding::Bindings;
use crate::pager::fill::work::Fault;
use crate::sys;

/// How faults reach the workers that resolve them, which takes most of a fault's latency.
///
/// A sleeping worker must be woken, which takes tens of microseconds across CPUs of a virtual machine; the fill itself
/// takes about one. The [tuning page](crate::pager::tuning) has figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Delivery {
    /// Workers sleep until a fault comes, and the kernel wakes one for each. Takes no CPU time without faults.
    ///
    /// After a fault the worker yields its CPU once, if that brings the next fault: where the faulting thread shares the
    /// CPU, neither thread must be woken then.
    Sleep,
    /// After a fault the worker spins for at most 100 µs before it sleeps, if faults are resolved faster that way: it
    /// measures them, and tries the other way from time to time. On a single CPU it never spins.
    #[default]
    Adaptive,
    /// After a fault the worker spins for this duration before it sleeps. One worker at a time spins. On a single CPU none
    /// does, since it would keep the faulting thread from running.
    Spin(Duration),
    /// The worker runs on the CPU of the faulting thread, so that no other CPU must be woken. Best where one thread faults,
    /// or several in turn, and each is bound to its CPU, as the threads of virtual CPUs often are. An unbound thread is
    /// moved to an idle CPU by the kernel when its page is filled, since the worker keeps its own CPU busy; then this is as
    /// `Sleep`.
    ///
    /// Where another thread keeps the CPU for itself, as one under `SCHED_FIFO` may, the worker moves away after some 10 ms,
    /// until it has resolved 128 more faults.
    ///
    /// Needs a descriptor with the feature [`THREAD_ID`](crate::FeatureFlags::THREAD_ID), of a process that `/proc`
    /// shows; otherwise it is as `Sleep`.
    SameCpu,
}

/// The longest spin that pays: then sleeping costs hardly more.
const LONGEST_SPIN: Duration = Duration::from_micros(100);

/// Duration of a fault beyond which the fill takes most of it, and delivery matters little.
const MOSTLY_FILL_TIME: Duration = Duration::from_micros(32);

/// Faults between two looks at the CPU of the faulting thread: the look is a read of `/proc`.
const FAULTS_PER_CPU_CHECK: u32 = 128;

/// Whether and how long a worker spins before it sleeps, and on which CPU it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WaitPolicy {
    delivery: Delivery,
    choice: SpinPolicy,
    way: YieldPolicy,
    /// The thread beside which the worker runs, and the number of its faults since the last look at its CPU.
    beside: (i32, u32),
    /// The thread that faulted last, or 0, and when its fault was read.
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

    /// How long to spin for the next fault.
    fn budget(&mut self) -> Duration {
        match self.delivery {
            Delivery::Sleep | Delivery::SameCpu => Duration::ZERO,
            Delivery::Spin(budget) => budget,
            Delivery::Adaptive if self.choice.next(Instant::now, || is_here(self.thread)) => LONGEST_SPIN,
            Delivery::Adaptive => Duration::ZERO,
        }
    }

    /// Spins for the next fault, unless another worker does. `look` returns whether one came.
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
        // Until it is dropped, also if resolving the fault panics.
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

    /// Whether to yield the CPU before the next look for a fault.
    pub(crate) fn gives_way(&mut self) -> bool {
        let spins = match self.delivery {
            Delivery::Sleep | Delivery::SameCpu => false,
            Delivery::Adaptive => self.choice.spins,
            Delivery::Spin(_) => true,
        };
        !spins && self.since.is_some() && self.way.next()
    }

    /// Notes whether a yield has brought the next fault.
    pub(crate) fn gave_way(&mut self, next: Option<&Fault>) {
        let waited = next.is_some_and(|fault| {
            let took =
                self.since.map_or(Duration::ZERO, |since| fault.since.saturating_duration_since(since));
            took > LONGEST_SPIN && (fault.thread == 0 || fault.thread != self.thread)
        });
        self.way.ended(next.is_some(), waited);
    }

    /// Notes a resolved fault. With [`Delivery::SameCpu`], moves to the CPU of the faulting thread.
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

/// Whether a worker spins for the next fault. The others sleep.
///
/// Relaxed: two spinning workers cost time, nothing else, and no other data depends on it.
#[derive(Debug, Default)]
pub(crate) struct Spinner(AtomicBool);

impl Spinner {
    /// Begins to spin, unless another worker does.
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

/// Decides whether to spin or to sleep until the next fault: the one that took less time for each fault. Both times
/// include the time between faults; that of sleeping includes wake-ups across CPUs.
#[derive(Clone, Copy, Debug)]
struct SpinPolicy {
    spins: bool,
    /// The policy that was faster at the last comparison.
    prefers_spinning: bool,
    /// The faults of this run, and how many of them are left.
    run: u32,
    left: u32,
    began: Option<Instant>,
    /// Spins of this run without a fault.
    misses: u32,
    /// The time of a fault, sleeping and spinning.
    took: [Duration; 2],
    /// The length of the next run with the preferred policy.
    next: u32,
}

impl SpinPolicy {
    /// Faults for which the other policy is tried: enough for a stable mean.
    const TRIAL_FAULTS: u32 = 32;

    /// Faults between two trials at first, so that trials are a ninth of all; doubled after each trial without a change.
    const FIRST_RUN_FAULTS: u32 = 8 * Self::TRIAL_FAULTS;
    /// Faults between two trials at most, so that a change is noticed within some seconds of faults.
    const MAX_RUN_FAULTS: u32 = 64 * Self::FIRST_RUN_FAULTS;

    fn new() -> Self {
        Self {
            spins: false,
            prefers_spinning: false,
            run: Self::TRIAL_FAULTS,
            left: Self::TRIAL_FAULTS,
            began: None,
            misses: 0,
            took: [LONGEST_SPIN; 2],
            next: Self::FIRST_RUN_FAULTS,
        }
    }

    /// Whether to spin until the next fault. `is_here`: whether the faulting thread runs on this CPU.
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

    /// Decides, after a run, about the next one.
    fn turn(&mut self, is_here: impl FnOnce() -> bool) {
        let [slept, spun] = self.took;
        if self.spins != self.prefers_spinning {
            // It must be an eighth faster to be worth a CPU; less where the fill takes most of the time.
            let better = slept.saturating_sub(spun) * 8 > spun.min(MOSTLY_FILL_TIME);
            self.next = if better == self.prefers_spinning {
                (self.next * 2).min(Self::MAX_RUN_FAULTS)
            } else {
                Self::FIRST_RUN_FAULTS
            };
            self.prefers_spinning = better;
            (self.spins, self.run) = (better, self.next);
        } else if self.spins || !is_here() {
            // Not where both share a CPU: spinning would drive the other thread away, and sleeping would take longer then.
            (self.spins, self.run) = (!self.spins, Self::TRIAL_FAULTS);
        }
    }

    /// Notes a spin without a fault. After a few of them the worker sleeps.
    fn missed(&mut self) {
        self.misses += 1;
        if self.spins && self.misses > Self::TRIAL_FAULTS / 8 {
            self.took[1] = LONGEST_SPIN;
            (self.spins, self.prefers_spinning) = (false, false);
            (self.run, self.next) = (self.next, (self.next * 2).min(Self::MAX_RUN_FAULTS));
            (self.left, self.began) = (0, None);
        }
    }
}

/// Decides whether a worker yields its CPU once after a fault, before it looks for the next one. Where the faulting thread
/// shares the CPU, the yield brings the next fault, and neither thread must sleep and be woken, which takes two
/// microseconds.
///
/// But the other thread may keep the CPU for milliseconds, and a fault of a third thread on another CPU waits for that,
/// where it would wake a sleeping worker at once.
#[derive(Clone, Copy, Debug)]
struct YieldPolicy {
    /// Faults without a yield that are left.
    left: u32,
    /// Faults without a yield after one in vain.
    futile: u32,
    /// Faults without a yield after one for which a fault may have waited.
    costly: u32,
}

impl YieldPolicy {
    /// Faults without a yield, at most, after yields in vain: their cost is a thousandth then.
    const MAX_PAUSE_FAULTS: u32 = 1 << 10;

    /// Faults that must be resolved faster to make up for the wait of one.
    const COSTLY_PAUSE_FAULTS: RangeInclusive<u32> = 1 << 12..=1 << 20;

    fn new() -> Self {
        Self { left: 0, futile: 1, costly: *Self::COSTLY_PAUSE_FAULTS.start() }
    }

    fn next(&mut self) -> bool {
        let now = self.left == 0;
        self.left = self.left.saturating_sub(1);
        now
    }

    /// Notes whether a yield has brought the next fault, and whether that one may have waited for long.
    fn ended(&mut self, found: bool, waited: bool) {
        if waited {
            self.left = self.costly;
            self.costly = (self.costly * 2).min(*Self::COSTLY_PAUSE_FAULTS.end());
        } else if found {
            self.futile = 1;
        } else {
            self.left = self.futile;
            self.futile = (self.futile * 2).min(Self::MAX_PAUSE_FAULTS);
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

    /// Whether it spun at all.
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
        // Longer than a thread is kept from running.
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

    /// The number of `faults` faults for which it spins, if they take these times, sleeping and spinning.
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
        // A wake-up of another CPU takes long.
        let spun = spins(&mut choice, &mut now, 10_000, [45, 15]);
        assert!(spun > 9_500, "{spun}");
        // Both threads are on one now.
        let spun = spins(&mut choice, &mut now, 100_000, [8, 15]);
        assert!(spun < 18_000, "{spun}");
        let spun = spins(&mut choice, &mut now, 100_000, [8, 15]);
        assert!(spun < 500, "{spun}");
        // Too little is gained to be worth a CPU.
        assert!(spins(&mut choice, &mut now, 100_000, [16, 15]) < 500);
        // Faults come so seldom that spinning doesn't pay.
        assert!(spins(&mut choice, &mut now, 100_000, [1000, 990]) < 500);
        // Each fault takes its time, and the wake-up comes on top.
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

    /// The number of yields in `faults` faults, if each brings the next fault or not, and that one has waited.
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
        // Other threads have the CPU meanwhile.
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
