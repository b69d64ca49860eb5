//! Reads, of nothing and of faults that threads wait for.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use memmap2::MmapMut;
use userfaultfd::{EventBuffer, Uffd};
use userfaultfd_sys::uffd_msg;

use super::{Pair, ROOM, Way, bare, timed, uffd, use_event, use_message};

/// Reads where no event is.
pub(super) struct Nothing(Uffd);

impl Nothing {
    pub(super) fn new() -> Self {
        Self(uffd(true))
    }
}

impl Pair for Nothing {
    fn count(&self) -> u32 {
        256
    }

    fn round(&mut self, way: Way) -> Duration {
        let count = self.count();
        match way {
            Way::Library => timed(|| {
                for _ in 0..count {
                    assert!(self.0.read_event().expect("an empty read").is_none());
                }
            }),
            Way::ByHand => timed(|| {
                for _ in 0..count {
                    let read = bare::read(self.0.as_raw_fd(), &mut [uffd_msg::default()]);
                    assert_eq!(read, Err(libc::EAGAIN));
                }
            }),
        }
    }
}

/// How many threads wait, and events are read in a round.
const WAITERS: usize = 32;

/// How many events a call reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    One,
    Batch,
}

/// Reads the faults of threads that wait. They are woken after each round with nothing resolved, so that they fault again.
pub(super) struct Waiting {
    call: Call,
    buffer: EventBuffer,
    messages: Vec<uffd_msg>,
    uffd: Uffd,
    fdinfo: File,
    memory: MmapMut,
    threads: Vec<JoinHandle<()>>,
}

impl Waiting {
    pub(super) fn new(call: Call) -> Self {
        let uffd = uffd(true);
        let page = userfaultfd::page_size();
        let mut memory = MmapMut::map_anon(WAITERS * page).expect("memory");
        uffd.register(memory.as_mut_ptr().cast(), memory.len()).expect("a registered range");
        let start = memory.as_mut_ptr().expose_provenance();
        let wait = move |index: usize| {
            let address = std::ptr::with_exposed_provenance::<u8>(start + index * page);
            // SAFETY: the memory lives until the thread is joined.
            unsafe { address.read_volatile() };
        };
        let threads = (0..WAITERS).map(|index| thread::spawn(move || wait(index))).collect();
        let fdinfo = File::open(format!("/proc/self/fdinfo/{}", uffd.as_raw_fd())).expect("fdinfo");
        let (buffer, messages) = (EventBuffer::new(ROOM), vec![uffd_msg::default(); ROOM]);
        let waiting = Self { call, buffer, messages, uffd, fdinfo, memory, threads };
        waiting.until_all_wait();
        waiting
    }

    /// Lets the threads run until the fault of each is there to be read. The kernel counts them.
    fn until_all_wait(&self) {
        loop {
            let mut text = [0; 256];
            let len = self.fdinfo.read_at(&mut text, 0).expect("fdinfo");
            let text = std::str::from_utf8(&text[..len]).expect("text");
            let pending = text.lines().find_map(|line| line.strip_prefix("pending:"));
            if pending.expect("a userfaultfd's fdinfo").trim() == WAITERS.to_string() {
                return;
            }
            thread::yield_now();
        }
    }
}

impl Pair for Waiting {
    fn count(&self) -> u32 {
        WAITERS as u32
    }

    fn round(&mut self, way: Way) -> Duration {
        let Self { uffd, buffer, messages, .. } = self;
        let time = match (way, self.call) {
            (Way::Library, Call::One) => timed(|| {
                for _ in 0..WAITERS {
                    use_event(uffd.read_event().expect("a read").expect("an event"));
                }
            }),
            (Way::ByHand, Call::One) => timed(|| {
                for _ in 0..WAITERS {
                    let mut message = [uffd_msg::default()];
                    assert_eq!(bare::read(uffd.as_raw_fd(), &mut message), Ok(1));
                    use_message(&message[0]);
                }
            }),
            (Way::Library, Call::Batch) => timed(|| {
                for event in uffd.read_events(buffer).expect("a read") {
                    use_event(event.expect("an event"));
                }
            }),
            (Way::ByHand, Call::Batch) => timed(|| {
                let read = bare::read(uffd.as_raw_fd(), messages).expect("a read");
                messages[..read].iter().for_each(use_message);
            }),
        };
        uffd.wake(self.memory.as_mut_ptr().cast(), self.memory.len()).expect("a wake");
        self.until_all_wait();
        time
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // It wakes who waits: the pages are zero then.
        let (start, len) = (self.memory.as_mut_ptr().cast(), self.memory.len());
        self.uffd.unregister(start, len).expect("an unregistered range");
        for thread in self.threads.drain(..) {
            thread.join().expect("a thread that has read");
        }
    }
}
