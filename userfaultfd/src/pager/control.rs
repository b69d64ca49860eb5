//! The thread in the background: it calls the program's callback, takes in the children of forks, and notices the end
//! of processes that nobody else would tell of.

use std::fmt;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::time::Duration;

use super::apart;
use super::changes;
use super::descriptor::{Descriptor, at};
use super::layout::{ROOM, Segments};
use super::shared::{Note, Shared, Stopped};
use super::trace::event;
use super::{DescriptorId, Problem};
use crate::{Errno, Uffd};

/// What is called with each problem.
pub(crate) type OnProblem = Arc<dyn Fn(&Problem) + Send + Sync>;

/// So often the children of forks are looked after. Their end isn't told.
const LOOK: Duration = Duration::from_millis(500);

pub(crate) struct Control {
    pub(crate) shared: Arc<Shared>,
    pub(crate) on_problem: Option<OnProblem>,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

impl Control {
    pub(crate) fn run(self) {
        let mut gone: Segments = apart::with_room(ROOM);
        loop {
            self.shared.reap();
            // Whoever has one still doesn't free it, but leaves it to this. What is served in part comes here again.
            gone.retain(|segment| {
                Arc::strong_count(&segment.region) > 1 && !self.shared.serves(&segment.region)
            });
            let children = self.shared.descriptors().into_iter().filter(|descriptor| descriptor.is_child);
            let children: Vec<_> = children.collect();
            let most = (!children.is_empty() || !gone.is_empty()).then_some(LOOK);
            match self.shared.next_note(most) {
                Ok(Some(Note::Problem(problem))) => self.tell(&problem),
                Ok(Some(Note::Gone)) => self.shared.take_gone(&mut gone),
                Ok(Some(Note::Fork(fork))) => {
                    let parent = fork.parent;
                    if let Err((uffd, error)) = changes::adopt(&self.shared, fork) {
                        // Closing it would show zeros where the child's pages are missing.
                        std::mem::forget(uffd);
                        self.tell(&Problem::Fork { descriptor: DescriptorId(parent), error });
                    }
                }
                Ok(None) => children.iter().filter(|child| is_gone(child, &self.shared)).for_each(|child| {
                    self.shared.gone(child);
                }),
                Err(Stopped) => return,
            }
        }
    }

    fn tell(&self, problem: &Problem) {
        event!(WARN, "problem", problem = tracing::field::display(problem));
        if let Some(on_problem) = &self.on_problem {
            // If it panics that has been printed, and forks and further problems come here all the same.
            let _panicked = panic::catch_unwind(AssertUnwindSafe(|| on_problem(problem)));
        }
    }
}

/// Whether the process of a descriptor has ended, or executed another program.
pub(super) fn is_gone(descriptor: &Descriptor, shared: &Shared) -> bool {
    let address = descriptor.segments(shared.outside_id(), None).first().map(|segment| segment.start);
    let serving = descriptor.enter(shared.outside_id());
    serving.as_ref().is_some_and(|serving| target_is_gone(&serving.uffd, address))
}

/// Asks for something that can't be done in any process, and of which one that has gone says so.
#[expect(unsafe_code, reason = "an operation that can't succeed")]
pub(crate) fn target_is_gone(uffd: &Uffd, address: Option<usize>) -> bool {
    let dst = at(address.unwrap_or(16 << 20));
    let len = address.map_or(2 << 20, |_| crate::page_size());
    // An address that no process may use, such as 0, is EINVAL on some kernels, whoever is asked.
    let Ok(unreadable) = crate::sys::unreadable() else { return false };
    // SAFETY: nothing can be read there, so that nothing is copied.
    let answer = unsafe { uffd.copy(unreadable, dst, len, false) };
    answer.is_err_and(|error| error.errno() == Some(Errno::ESRCH))
}

/// Starts a thread of the pager's, which takes no signal of the program's.
pub(crate) fn spawn(
    name: &str,
    run: impl FnOnce() + Send + 'static,
) -> io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        crate::sys::block_signals();
        run();
    })
}
