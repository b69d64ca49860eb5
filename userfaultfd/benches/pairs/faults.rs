//! Whole faults: a thread touches missing pages, another one reads the events and copies.

use std::os::fd::AsRawFd;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use memmap2::{MmapMut, UncheckedAdvice};
use userfaultfd::{Event, EventBuffer, Uffd};
use userfaultfd_sys::uffd_msg;

use super::{Pair, Way, bare, timed, uffd};

/// How many pages a round touches.
const PAGES: usize = 64;

/// How many events the handler's call may read. One is there, since one thread faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    One,
    Batch,
}

/// A thread that touches, which is the one that times, and one that handles. They share a CPU if this thread is
/// pinned to one, as the handler inherits that.
pub(super) struct Faults {
    memory: MmapMut,
    /// In which way the handler must serve the next round. It ends when this is dropped.
    orders: Option<Sender<Way>>,
    handler: Option<JoinHandle<()>>,
}

impl Faults {
    pub(super) fn new(call: Call) -> Self {
        let uffd = uffd(false);
        let mut memory = MmapMut::map_anon(PAGES * userfaultfd::page_size()).expect("memory");
        uffd.register(memory.as_mut_ptr().cast(), memory.len()).expect("a registered range");
        let (orders, inbox) = mpsc::channel();
        let handler = thread::spawn(move || Handler::new(uffd).serve(call, &inbox));
        Self { memory, orders: Some(orders), handler: Some(handler) }
    }
}

impl Pair for Faults {
    fn count(&self) -> u32 {
        PAGES as u32
    }

    fn round(&mut self, way: Way) -> Duration {
        self.orders.as_ref().expect("not dropped yet").send(way).expect("a handler");
        let page = userfaultfd::page_size();
        let time = timed(|| {
            for index in 0..PAGES {
                let address = self.memory.as_ptr().wrapping_add(index * page);
                // SAFETY: inside the memory.
                assert_eq!(unsafe { address.read_volatile() }, 42);
            }
        });
        // SAFETY: nothing refers to the content, and any other is as good.
        unsafe { self.memory.unchecked_advise(UncheckedAdvice::DontNeed) }.expect("dropped pages");
        time
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        drop(self.orders.take());
        self.handler.take().expect("dropped once").join().expect("a handler");
    }
}

struct Handler {
    uffd: Uffd,
    content: Vec<u8>,
    buffer: EventBuffer,
    messages: Vec<uffd_msg>,
}

impl Handler {
    fn new(uffd: Uffd) -> Self {
        let content = vec![42; userfaultfd::page_size()];
        Self { uffd, content, buffer: EventBuffer::new(16), messages: vec![uffd_msg::default(); 16] }
    }

    fn serve(mut self, call: Call, orders: &Receiver<Way>) {
        while let Ok(way) = orders.recv() {
            let mut served = 0;
            while served < PAGES {
                served += match (way, call) {
                    (Way::Library, Call::One) => self.one(),
                    (Way::ByHand, Call::One) => self.one_by_hand(),
                    (Way::Library, Call::Batch) => self.batch(),
                    (Way::ByHand, Call::Batch) => self.batch_by_hand(),
                };
            }
        }
    }

    fn one(&self) -> usize {
        let Some(Event::Pagefault { addr, .. }) = self.uffd.read_event().expect("a read") else {
            panic!("no fault");
        };
        let (content, len) = (self.content.as_ptr().cast(), self.content.len());
        // SAFETY: the content lives on, and it is what the other thread must find.
        unsafe { self.uffd.copy(content, addr, len, true) }.expect("a copy");
        1
    }

    fn one_by_hand(&self) -> usize {
        let fd = self.uffd.as_raw_fd();
        let mut message = [uffd_msg::default()];
        assert_eq!(bare::read(fd, &mut message), Ok(1));
        let (address, _, _) = bare::decode(&message[0]).expect("a fault");
        // SAFETY: the content lives on, and it is what the other thread must find.
        unsafe { bare::copy(fd, self.content.as_ptr(), address as *mut u8, self.content.len()) }
            .expect("a copy");
        1
    }

    fn batch(&mut self) -> usize {
        let (content, len) = (self.content.as_ptr().cast(), self.content.len());
        let mut served = 0;
        for event in self.uffd.read_events(&mut self.buffer).expect("a read") {
            let Event::Pagefault { addr, .. } = event.expect("an event") else { panic!("no fault") };
            // SAFETY: the content lives on, and it is what the other thread must find.
            unsafe { self.uffd.copy(content, addr, len, true) }.expect("a copy");
            served += 1;
        }
        served
    }

    fn batch_by_hand(&mut self) -> usize {
        let fd = self.uffd.as_raw_fd();
        let read = bare::read(fd, &mut self.messages).expect("a read");
        for message in &self.messages[..read] {
            let (address, _, _) = bare::decode(message).expect("a fault");
            // SAFETY: the content lives on, and it is what the other thread must find.
            unsafe { bare::copy(fd, self.content.as_ptr(), address as *mut u8, self.content.len()) }
                .expect("a copy");
        }
        read
    }
}
