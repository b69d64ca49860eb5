//! The usual loops: a thread reads a fault, copies a page, and reads the next.

use std::hint;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use memmap2::MmapMut;
use userfaultfd_sys::uffd_msg;

use super::cpus::{self, Place};
use super::{CONTENT, Contender, FAULTS, Walk, bare, memory, raw};

/// How the thread learns of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Loop {
    /// poll(2), then read(2) without waiting, as in the manual's example.
    Poll,
    /// read(2), which sleeps until there is a fault.
    Blocking,
    /// read(2) again and again. The thread sleeps between the rounds.
    Spinning,
    /// As `Poll`, and the content takes this time to come.
    Slow(Duration),
}

/// Memory, and the thread that answers its faults.
pub(crate) struct Handler {
    memory: MmapMut,
    /// How many faults will come. The thread ends when this is dropped.
    orders: Option<Sender<usize>>,
    thread: Option<JoinHandle<()>>,
}

impl Handler {
    /// Fills memory from a content of the same length.
    pub(crate) fn new(place: Place, kind: Loop, content: Arc<[u8]>) -> Result<Self, String> {
        let flags = if kind == Loop::Blocking { 0 } else { libc::O_NONBLOCK };
        let fd = raw::open(flags, 0);
        let mut memory = memory(content.len());
        raw::register(&fd, &mut memory);
        let start = memory.as_ptr().expose_provenance();
        let (orders, inbox) = mpsc::channel();
        let serve = move || serve(&fd, kind, start, &content, &inbox);
        let thread = cpus::answering(place, || thread::spawn(serve))?;
        Ok(Self { memory, orders: Some(orders), thread: Some(thread) })
    }

    /// Announces a number of faults.
    pub(crate) fn expect(&self, faults: usize) {
        self.orders.as_ref().expect("not dropped yet").send(faults).expect("a thread");
    }

    /// The memory.
    pub(crate) fn start(&self) -> *const u8 {
        self.memory.as_ptr()
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        drop(self.orders.take());
        let ended = self.thread.take().expect("dropped once").join();
        assert!(ended.is_ok() || thread::panicking(), "the thread panicked");
    }
}

fn serve(fd: &OwnedFd, kind: Loop, start: usize, content: &[u8], orders: &Receiver<usize>) {
    let (fd, page) = (fd.as_raw_fd(), userfaultfd::page_size());
    while let Ok(faults) = orders.recv() {
        let mut served = 0;
        while served < faults {
            if matches!(kind, Loop::Poll | Loop::Slow(_)) {
                poll(fd);
            }
            let mut message = [uffd_msg::default()];
            match bare::read(fd, &mut message) {
                Ok(_) => {}
                Err(libc::EAGAIN) => {
                    hint::spin_loop();
                    continue;
                }
                Err(errno) => panic!("read: {}", io::Error::from_raw_os_error(errno)),
            }
            let (address, _, _) = bare::decode(&message[0]).expect("a fault");
            let address = address as usize & !(page - 1);
            if let Loop::Slow(latency) = kind {
                thread::sleep(latency);
            }
            let source = content[address - start..][..page].as_ptr();
            let to = std::ptr::with_exposed_provenance_mut(address);
            // SAFETY: the content lives on, and it is what the other thread must find.
            unsafe { bare::copy(fd, source, to, page) }.expect("a copy");
            served += 1;
        }
    }
}

fn poll(fd: RawFd) {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one structure is borrowed for the call.
    let ready = unsafe { libc::poll(&raw mut poll, 1, -1) };
    assert_eq!(ready, 1, "{}", io::Error::last_os_error());
}

struct Ladder {
    place: Place,
    handler: Handler,
    walk: Walk,
}

impl Contender for Ladder {
    fn round(&mut self) -> Duration {
        cpus::stay_on(self.place.faulting());
        self.handler.expect(FAULTS);
        self.walk.read(self.handler.start(), FAULTS)
    }
}

pub(crate) fn make(place: Place, kind: Loop) -> Result<Box<dyn Contender>, String> {
    let handler = Handler::new(place, kind, Arc::clone(&CONTENT))?;
    Ok(Box::new(Ladder { place, handler, walk: Walk::new() }))
}
