//! A monitor that restores a guest from its snapshot, page by page as they are needed, while the guest gives pages
//! back.

use std::collections::BTreeSet;
use std::os::unix::io::{FromRawFd, IntoRawFd};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use libc::c_void;
use userfaultfd::{Error, Event, FeatureFlags, Uffd, UffdBuilder};

use crate::mapping::{Mapping, page_size};
use crate::support::require;

/// Where a part of the guest's memory is, and its content in the snapshot.
#[derive(Clone, Copy, Debug)]
struct Region {
    address: u64,
    size: u64,
    offset: u64,
}

/// The monitor of a guest.
#[derive(Debug)]
struct Monitor {
    uffd: Uffd,
    regions: Vec<Region>,
    snapshot: Mapping,
    /// Pages that the guest gave back. They are zero from then on.
    returned: BTreeSet<u64>,
}

/// Whether an event is done with.
#[derive(Debug, PartialEq)]
enum Served {
    Done,
    Later,
}

impl Monitor {
    fn region_of(&self, address: u64) -> Region {
        let holds = |region: &&Region| (region.address..region.address + region.size).contains(&address);
        *self.regions.iter().find(holds).unwrap_or_else(|| panic!("{address:#x} is not of the guest"))
    }

    fn serve(&mut self, event: &Event) -> Served {
        match *event {
            Event::Pagefault { addr, .. } => self.fill(addr as u64 & !(page_size() as u64 - 1)),
            Event::Remove { start, end } => {
                self.returned.extend((start as u64..end as u64).step_by(page_size()));
                Served::Done
            }
            _ => panic!("unexpected event: {event:?}"),
        }
    }

    fn fill(&self, page: u64) -> Served {
        let region = self.region_of(page);
        let dst = page as *mut c_void;
        if self.returned.contains(&page) {
            // SAFETY: the guest gave the page back, and expects zeros.
            return match unsafe { self.uffd.zeropage(dst, page_size(), true) } {
                Ok(_) => Served::Done,
                Err(Error::ZeropageFailed(errno)) if errno as i32 == libc::EAGAIN => Served::Later,
                Err(Error::ZeropageFailed(errno)) if errno as i32 == libc::EEXIST => self.wake(dst),
                result => panic!("unexpected result: {result:?}"),
            };
        }
        let src = self.snapshot.ptr.wrapping_byte_add((region.offset + page - region.address) as usize);
        // SAFETY: the page of the snapshot is what the guest expects.
        match unsafe { self.uffd.copy(src, dst, page_size(), true) } {
            Ok(copied) => assert!(copied > 0),
            // A removal waits to be read. Releases before 0.10 had an errno for a count here.
            Err(Error::PartiallyCopied(copied)) if copied == 0 || copied == (-libc::EAGAIN) as usize => {
                return Served::Later;
            }
            Err(Error::CopyFailed(errno))
                if std::io::Error::from(errno).raw_os_error() == Some(libc::EEXIST) =>
            {
                return self.wake(dst);
            }
            Err(Error::CopyFailed(errno)) if [libc::ENOENT, libc::ESRCH].contains(&(errno as i32)) => {}
            Err(error) => panic!("copy: {error:?}"),
        }
        Served::Done
    }

    fn wake(&self, page: *mut c_void) -> Served {
        self.uffd.wake(page, page_size()).expect("a wake");
        Served::Done
    }

    /// Serves all events, and those again that weren't done with, until told that the guest is done.
    fn run(mut self, done: &Receiver<()>) -> BTreeSet<u64> {
        let mut deferred: Vec<Event> = Vec::new();
        while done.try_recv().is_err() {
            let mut events = std::mem::take(&mut deferred);
            while let Some(event) = self.uffd.read_event().expect("read uffd_msg") {
                events.push(event);
            }
            // Removals are read together with the faults that follow them, but behind them.
            events.sort_by_key(|event| matches!(event, Event::Pagefault { .. }));
            deferred = events.into_iter().filter(|event| self.serve(event) == Served::Later).collect();
            thread::yield_now();
        }
        self.returned
    }
}

#[test]
fn guest_is_restored_while_it_gives_pages_back() {
    require!(FeatureFlags::EVENT_REMOVE);
    const PAGES: usize = 32;
    let (low, high, snapshot) =
        (Mapping::anonymous(PAGES), Mapping::anonymous(PAGES), Mapping::anonymous(2 * PAGES));
    for page in 0..2 * PAGES {
        snapshot.set(page, page as u8 + 1);
    }

    // The guest's side makes the userfaultfd, and hands its number and the layout over.
    let mut builder = UffdBuilder::new();
    builder.require_features(FeatureFlags::EVENT_REMOVE);
    let uffd = builder.close_on_exec(true).non_blocking(true).user_mode_only(true).create().unwrap();
    let mut regions = Vec::new();
    for (memory, offset) in [(&low, 0), (&high, low.len as u64)] {
        uffd.register(memory.ptr, memory.len).unwrap();
        regions.push(Region { address: memory.ptr as u64, size: memory.len as u64, offset });
    }
    let fd = uffd.into_raw_fd();

    let (end, done) = channel();
    let monitor = thread::spawn(move || {
        // SAFETY: nothing else owns the number.
        let uffd = unsafe { Uffd::from_raw_fd(fd) };
        Monitor { uffd, regions, snapshot, returned: BTreeSet::new() }.run(&done)
    });
    thread::scope(|scope| {
        for (memory, first) in [(&low, 1), (&high, PAGES as u8 + 1), (&low, 1)] {
            scope.spawn(move || {
                for page in (0..PAGES).rev() {
                    assert_eq!(memory.get(page), first + page as u8);
                }
            });
        }
    });
    for page in (0..PAGES).step_by(3) {
        high.discard(page);
        assert_eq!((high.get(page), high.get(page + 1)), (0, (PAGES + page + 2) as u8));
    }
    end.send(()).unwrap();
    assert_eq!(monitor.join().unwrap().len(), PAGES.div_ceil(3));
}
