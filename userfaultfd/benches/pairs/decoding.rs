//! Decoding, which no call of the library does alone: it is what a round takes beyond a read(2) of the same messages.
//!
//! The messages come from a file, so that a read costs little, the same each time, and needs no threads. The library
//! then knows the descriptor as an adopted one, and looks through the messages once more (no fork event may come
//! from anything but a userfaultfd). That is in the result, since handlers of other processes work so.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use userfaultfd::{EventBuffer, Uffd};
use userfaultfd_sys::*;

use super::memfd::memfd;
use super::random::Random;
use super::{Pair, ROOM, Way, bare, timed, use_event, use_message};

/// How many messages a read gets.
const MESSAGES: usize = 256;

/// Faults for missing pages, reads and writes in no order.
pub(super) fn faults() -> Vec<[u64; 4]> {
    random().map(|(bits, address)| [event(UFFD_EVENT_PAGEFAULT), bits & 1, address, 0]).collect()
}

/// Every kind of event that has no descriptor in it, and every kind of fault, in no order.
pub(super) fn all_kinds() -> Vec<[u64; 4]> {
    let events = [UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP];
    random()
        .map(|(bits, address)| match events[bits as usize % 4] {
            UFFD_EVENT_PAGEFAULT => {
                [event(UFFD_EVENT_PAGEFAULT), [0, 1, 3, 4, 5, 8, 9][bits as usize / 4 % 7], address, 0]
            }
            change => [event(change), address, address + 4096, 4096],
        })
        .collect()
}

/// The first word of a message: the kind of event in its first byte.
fn event(kind: u8) -> u64 {
    u64::from_ne_bytes([kind, 0, 0, 0, 0, 0, 0, 0])
}

/// Bits without order, and an address.
fn random() -> impl Iterator<Item = (u64, u64)> {
    let mut random = Random::new(1);
    (0..MESSAGES as u64).map(move |index| (random.next(), 0x7f00_0000_0000 + index * 4096))
}

/// Where messages are read from, and to.
pub(super) struct Stage {
    uffd: Uffd,
    buffer: EventBuffer,
    messages: Vec<uffd_msg>,
}

/// Reads and decodes a batch; what the decoding is told of.
type Work = fn(&mut Stage) -> usize;

/// With [`Uffd::read_events`].
pub(super) fn events(stage: &mut Stage) -> usize {
    let events = stage.uffd.read_events(&mut stage.buffer).expect("a read");
    events.map(|event| use_event(event.expect("an event"))).count()
}

/// With [`Uffd::read_batch`], sorted.
pub(super) fn changes_first(stage: &mut Stage) -> usize {
    let read = stage.uffd.read_batch(&mut stage.buffer).expect("a read");
    stage.buffer.changes_first();
    while let Some(event) = stage.buffer.pop() {
        use_event(event.expect("an event"));
    }
    read
}

/// By hand.
pub(super) fn by_hand(stage: &mut Stage) -> usize {
    let read = undecoded(stage);
    stage.messages[..read].iter().for_each(use_message);
    read
}

fn undecoded(stage: &mut Stage) -> usize {
    bare::read(stage.uffd.as_raw_fd(), &mut stage.messages).expect("a read")
}

/// `work` and, as the way by hand, the same read without any decoding.
pub(super) struct Decoding {
    file: File,
    work: Work,
    stage: Stage,
}

impl Decoding {
    pub(super) fn new(messages: Vec<[u64; 4]>, work: Work) -> Self {
        let mut file = memfd();
        for word in messages.as_flattened() {
            file.write_all(&word.to_ne_bytes()).expect("room in the file");
        }
        let uffd = Uffd::from(OwnedFd::from(file.try_clone().expect("a descriptor")));
        let stage = Stage { uffd, buffer: EventBuffer::new(ROOM), messages: vec![uffd_msg::default(); ROOM] };
        Self { file, work, stage }
    }
}

impl Pair for Decoding {
    fn count(&self) -> u32 {
        MESSAGES as u32
    }

    fn round(&mut self, way: Way) -> Duration {
        self.file.rewind().expect("a file"); // the library's descriptor shares the position
        let work = match way {
            Way::Library => self.work,
            Way::ByHand => undecoded,
        };
        let mut read = 0;
        let time = timed(|| read = work(&mut self.stage));
        assert_eq!(read, MESSAGES);
        time
    }
}
