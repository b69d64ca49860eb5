//! Workers that run on the CPU of the thread that faults, and what gets them away from there.
//!
//! Such a worker may run on that CPU alone, which a thread under SCHED_FIFO can have for itself: the kernel leaves others
//! a twentieth of each second. The worker can't notice, since it doesn't run. So the control thread looks, every few
//! milliseconds as long as any worker is so bound and gets faults, and has it run anywhere again if it doesn't get on.

use std::time::{Duration, Instant};

use super::binding::{FREE, STARVED};
use super::shared::Shared;

/// How often the control thread looks whether bound workers get on. Two looks tell.
const POLL_INTERVAL: Duration = Duration::from_millis(4);

/// Looks without a fault after which a worker isn't bound any longer, and not looked after.
const IDLE_LOOKS: u32 = 25;

/// What the control thread has seen of a worker.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    turns: u32,
    looks: u32,
}

/// The control thread's look after bound workers.
#[derive(Debug)]
pub(crate) struct Watch {
    seen: Box<[Seen]>,
    next: Instant,
}

impl Watch {
    pub(crate) fn new(shared: &Shared) -> Self {
        let seen = vec![Seen::default(); shared.bindings.len()].into_boxed_slice();
        Self { seen, next: Instant::now() }
    }

    /// Looks whether the bound workers get on, and frees those that don't. Returns when to look again.
    pub(crate) fn look(&mut self, shared: &Shared) -> Option<Duration> {
        let bindings = &shared.bindings;
        let anywhere = bindings.anywhere()?;
        let now = Instant::now();
        if now < self.next {
            return Some(self.next - now);
        }
        let (mut any, mut waiting) = (false, None);
        for (place, seen) in self.seen.iter_mut().enumerate() {
            let thread = bindings.thread(place);
            if thread <= FREE {
                *seen = Seen::default();
                continue;
            }
            let turns = bindings.turns(place);
            if turns != seen.turns {
                *seen = Seen { turns, looks: 0 };
            }
            seen.looks += 1;
            let mut waits = || *waiting.get_or_insert_with(|| shared.poll.has_events());
            let next = match seen.looks {
                0..=2 => thread,
                _ if shared.fill.activities.is_at_work(place) || waits() => STARVED,
                IDLE_LOOKS.. => FREE,
                _ => thread,
            };
            if next == thread {
                any = true;
            } else {
                bindings.free(place, thread, next, &anywhere);
            }
        }
        self.next = if any { now + POLL_INTERVAL } else { now };
        any.then_some(POLL_INTERVAL)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::thread;

    use super::*;
    use crate::pager::races::real_time::{self, cpu_time};
    use crate::pager::{Delivery, FaultAround, PageData};
    use crate::support::proc::wait_until;
    use crate::support::{child, require, test_name};
    use crate::{FeatureFlags, LazyMemory, sys};

    /// The CPUs that the worker of this process may run on, as /proc lists them.
    fn cpus_of_worker() -> Option<String> {
        std::fs::read_dir("/proc/self/task").unwrap().flatten().find_map(|task| {
            let status = std::fs::read_to_string(task.path().join("status")).ok()?;
            let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            (field("Name:")? == "uffd-pager").then(|| field("Cpus_allowed_list:").map(str::to_owned))?
        })
    }

    #[test]
    fn a_worker_gets_away_from_a_cpu_that_another_thread_keeps() {
        require!(FeatureFlags::THREAD_ID, root);
        child::run_well(test_name!(), || {
            let Some([cpu, other]) = real_time::cpus(test_name!()) else { return };
            let all = cpus_of_worker();
            assert_eq!(all, None);
            let page = crate::page_size();
            let source = |_: u64, _: &mut [u8]| Ok(PageData::Zero);
            let memory = LazyMemory::builder(source).len(16 * page).fault_around(FaultAround::Page);
            let memory = memory.delivery(Delivery::SameCpu).threads(1).max_threads(1).build().unwrap();
            let anywhere = cpus_of_worker().unwrap();
            sys::run_on(cpu).unwrap();
            assert_eq!(memory[0], 0);
            wait_until(|| cpus_of_worker().unwrap() == cpu.to_string());
            // Idle, it is bound no longer, and by the next fault it is again.
            wait_until(|| cpus_of_worker().unwrap() == anywhere);
            assert_eq!(memory[page], 0);
            wait_until(|| cpus_of_worker().unwrap() == cpu.to_string());
            sys::run_on(other).unwrap();
            let (spent, done) = (AtomicU64::new(0), AtomicBool::new(false));
            let waited = thread::scope(|scope| {
                let (spent, done) = (&spent, &done);
                scope.spawn(move || {
                    sys::run_on(cpu).unwrap();
                    assert!(real_time::enter());
                    while !done.load(Ordering::SeqCst) {
                        spent.store(cpu_time().as_millis() as u64, Ordering::SeqCst);
                    }
                });
                let waited = (2..8)
                    .map(|at| {
                        // Not in the moment that the kernel leaves to other threads.
                        let from = spent.load(Ordering::SeqCst);
                        while spent.load(Ordering::SeqCst) < from + 120 {
                            thread::yield_now();
                        }
                        // Bound there, as the first one finds it.
                        let start = Instant::now();
                        assert_eq!(memory[at * page], 0);
                        start.elapsed()
                    })
                    .collect::<Vec<_>>();
                done.store(true, Ordering::SeqCst);
                waited
            });
            let sum: Duration = waited.iter().sum();
            assert!(sum < Duration::from_millis(1500), "{waited:?}");
        });
    }
}
