//! Which pages a program writes: write protection, and batches of events.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use libc::c_void;
use userfaultfd::{
    Event, EventBuffer, FaultKind, FeatureFlags, IoctlFlags, ReadWrite, RegisterMode, Uffd, UffdBuilder,
};

use crate::mapping::{Mapping, page_size};
use crate::support::require;

/// What the descriptor must be able to do, and what it watches.
#[derive(Clone, Debug)]
struct Config {
    features: FeatureFlags,
    ioctls: IoctlFlags,
    mode: RegisterMode,
}

/// Makes missing pages, lifts protection, and notes both, as long as it is told to go on.
fn track(uffd: &Uffd, orders: &Receiver<()>, notes: &Sender<(FaultKind, usize)>) {
    let mut buffer = EventBuffer::new(16);
    let mut deferred = Vec::new();
    while orders.recv().is_ok() {
        while deferred.is_empty() {
            for event in uffd.read_events(&mut buffer).unwrap() {
                deferred.push(event.unwrap());
            }
            thread::yield_now();
        }
        for event in &deferred {
            if let Event::Pagefault { kind, rw, addr, .. } = event {
                match kind {
                    FaultKind::Missing => {
                        // SAFETY: what was never written is zero.
                        let zeroed = unsafe { uffd.zeropage(*addr, page_size(), false) };
                        assert_eq!(zeroed.unwrap(), page_size());
                        if *rw == ReadWrite::Read {
                            uffd.write_protect(*addr, page_size()).unwrap();
                        }
                        uffd.wake(*addr, page_size()).unwrap();
                    }
                    FaultKind::WriteProtected => {
                        let page = (*addr as usize & !(page_size() - 1)) as *mut c_void;
                        uffd.remove_write_protection(page, page_size(), true).unwrap();
                    }
                    FaultKind::Minor => panic!("not registered for minor faults"),
                    other => unreachable!("{other:?}"),
                }
                notes.send((*kind, *addr as usize)).unwrap();
            }
        }
        deferred.clear();
    }
}

#[test]
fn writes_are_tracked_by_write_protection() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    let config = Config {
        features: FeatureFlags::PAGEFAULT_FLAG_WP,
        ioctls: IoctlFlags::REGISTER | IoctlFlags::UNREGISTER,
        mode: RegisterMode::MISSING | RegisterMode::WRITE_PROTECT,
    };
    let memory = Mapping::anonymous(4);
    let uffd = UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        .require_features(config.features)
        .require_ioctls(config.ioctls)
        .create()
        .unwrap();
    let ioctls = uffd.register_with_mode(memory.ptr, memory.len, config.mode).unwrap();
    assert!(ioctls.contains(IoctlFlags::WRITE_PROTECT), "{ioctls:?}");

    let (go, orders) = channel();
    let (notes, noted) = channel();
    let noted: Vec<_> = thread::scope(|scope| {
        let (uffd, notes) = (&uffd, notes);
        scope.spawn(move || track(uffd, &orders, &notes));
        let access = |access: &dyn Fn()| {
            go.send(()).unwrap();
            access();
            noted.recv().unwrap()
        };
        let noted = vec![
            access(&|| assert_eq!(memory.get(0), 0)),
            access(&|| memory.set(0, 1)),
            access(&|| memory.set(1, 1)),
        ];
        // Each page is written freely now.
        memory.set(0, 2);
        memory.set(1, 2);
        drop(go);
        noted
    });
    let address = |page: usize| memory.page(page) as usize;
    let expected = [
        (FaultKind::Missing, address(0)),
        (FaultKind::WriteProtected, address(0)),
        (FaultKind::Missing, address(1)),
    ];
    assert_eq!(noted, expected);
    let pages: BTreeSet<usize> = noted.iter().map(|(_, address)| *address).collect();
    assert_eq!(pages.len(), 2);
    uffd.unregister(memory.ptr, memory.len).unwrap();
}
