//! A tracer that follows forks: a list of userfaultfds, which grows with every child.

use std::sync::mpsc::channel;
use std::thread;

use userfaultfd::{Event, EventBuffer, FeatureFlags, Uffd, UffdBuilder};

use crate::mapping::Mapping;
use crate::support::child::{self, Forked};
use crate::support::{require, test_name};

/// A userfaultfd and what is known about it.
#[derive(Debug)]
struct Traced {
    uffd: Uffd,
    generation: usize,
}

impl From<Uffd> for Traced {
    fn from(uffd: Uffd) -> Self {
        Self { uffd, generation: 0 }
    }
}

/// Reads every event of every userfaultfd over one buffer. Returns the userfaultfds of new children.
fn drain(traced: &[Traced], buffer: &mut EventBuffer) -> Vec<Traced> {
    let mut children = Vec::new();
    for Traced { uffd, generation } in traced {
        for event in uffd.read_events(buffer).expect("events") {
            match event.expect("an event") {
                Event::Fork { uffd } => {
                    children.push(Traced { generation: generation + 1, ..Traced::from(uffd) });
                }
                event => panic!("{event:?}"),
            }
        }
    }
    children
}

#[test]
fn child_s_userfaultfd_joins_the_list() {
    require!(FeatureFlags::EVENT_FORK, root);
    // In a process of its own, since the fork waits with the allocator's locks held.
    child::run_well(test_name!(), || {
        let memory = Mapping::anonymous(1);
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .require_features(FeatureFlags::EVENT_FORK)
            .create()
            .unwrap();
        uffd.register(memory.ptr, memory.len).unwrap();
        let (children, received) = channel::<Forked>();
        let mut traced = vec![Traced::from(uffd)];
        let (mut buffer, mut new) = (EventBuffer::new(8), Vec::with_capacity(8));
        thread::scope(|scope| {
            scope.spawn(move || children.send(child::fork(|| {})).unwrap());
            while new.is_empty() {
                new = drain(&traced, &mut buffer);
            }
        });
        traced.append(&mut new);
        assert_eq!(traced.iter().map(|traced| traced.generation).collect::<Vec<_>>(), [0, 1]);
        received.recv().unwrap().succeed();
        // SAFETY: the child is gone, and so nobody refers to its memory.
        let gone = unsafe { traced[1].uffd.zeropage(memory.ptr, memory.len, true) };
        assert!(
            matches!(gone, Err(userfaultfd::Error::ZeropageFailed(errno)) if errno as i32 == libc::ESRCH),
            "{gone:?}"
        );
    });
}
