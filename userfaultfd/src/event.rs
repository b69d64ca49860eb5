//! Events, and the buffer into which they are read.

use std::ffi::c_void;
use std::fmt;
use std::mem::offset_of;
use std::os::fd::RawFd;
use std::ptr;

use crate::uffd::Terms;
use crate::{Error, Pid, Result, Uffd, sys};

/// Whether a fault was a read or a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReadWrite {
    /// A read, or the fetch of an instruction.
    Read,
    /// A write.
    Write,
}

/// The kind of a fault. Each kind is delivered only in ranges that are registered for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FaultKind {
    /// The page is missing. Fill it with [`copy`](Uffd::copy), [`zeropage`](Uffd::zeropage),
    /// [`poison`](Uffd::poison) or [`move_pages`](Uffd::move_pages).
    Missing,
    /// A write to a write-protected page. Lift the protection with
    /// [`remove_write_protection`](Uffd::remove_write_protection). Since Linux 5.7.
    WriteProtected,
    /// The page cache holds the page, perhaps on a swap device, and this mapping doesn't map it yet or any more. Map it with
    /// [`continue`](Uffd::continue). Since Linux 5.13.
    Minor,
    /// An access to a read-write-protected page. Lift the protection with
    /// [`remove_read_write_protection`](Uffd::remove_read_write_protection). Since Linux 7.3.
    ReadWriteProtected,
    /// A kind that this version of the crate doesn't know, with the message's flags.
    Unknown(u64),
}

/// An event read from a userfaultfd. A fault must be resolved; the other events report changes, and the thread that
/// made the change goes on once the event is read.
///
/// Unlike other types that the kernel may extend, this isn't `#[non_exhaustive]`: programs written for 0.9 match all
/// five variants, the kernel has added none since 4.11, and an event that this version doesn't know is
/// [`Error::UnrecognizedEvent`], which such programs handle already.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for a page.
    #[doc(alias = "UFFD_EVENT_PAGEFAULT")]
    Pagefault {
        /// The kind of the fault.
        kind: FaultKind,
        /// The thread's access.
        rw: ReadWrite,
        /// The address: that of the page, of the huge page on hugetlb memory; the exact address with
        /// [`EXACT_ADDRESS`](crate::FeatureFlags::EXACT_ADDRESS), except on s390x. Kernels before 5.18 were inconsistent, so
        /// round it down.
        addr: *mut c_void,
        /// The id of the faulting thread with [`THREAD_ID`](crate::FeatureFlags::THREAD_ID), 0 without.
        thread_id: Pid,
    },
    /// The process forked. The child has the same ranges registered, with a userfaultfd of its own.
    ///
    /// Needs [`EVENT_FORK`](crate::FeatureFlags::EVENT_FORK). An interrupted fork may leave a userfaultfd whose operations
    /// fail with `ESRCH`.
    #[doc(alias = "UFFD_EVENT_FORK")]
    Fork {
        /// The child's userfaultfd.
        uffd: Uffd,
    },
    /// A range was moved and is registered at its new place. With
    /// [`EVENT_REMAP`](crate::FeatureFlags::EVENT_REMAP).
    #[doc(alias = "UFFD_EVENT_REMAP")]
    Remap {
        /// The old address.
        from: *mut c_void,
        /// The new address.
        to: *mut c_void,
        /// The old length, in bytes.
        len: usize,
    },
    /// The pages of a range are about to be dropped. The range stays registered, and zeros belong there from now on.
    ///
    /// With [`EVENT_REMOVE`](crate::FeatureFlags::EVENT_REMOVE): madvise(2) with `MADV_DONTNEED`, `MADV_FREE`
    /// or `MADV_REMOVE`. Holes punched by fallocate(2) and what happens through other mappings is not told.
    #[doc(alias = "UFFD_EVENT_REMOVE")]
    Remove {
        /// The first address.
        start: *mut c_void,
        /// The address behind the last.
        end: *mut c_void,
    },
    /// A range was unmapped; nothing of it is registered any more. With
    /// [`EVENT_UNMAP`](crate::FeatureFlags::EVENT_UNMAP): munmap(2), mmap(2) and mremap(2) over the range,
    /// brk(2).
    #[doc(alias = "UFFD_EVENT_UNMAP")]
    Unmap {
        /// The first address.
        start: *mut c_void,
        /// The address behind the last.
        end: *mut c_void,
    },
}

#[expect(unsafe_code, reason = "Send and Sync")]
// SAFETY: the pointers are addresses that the kernel reports, perhaps of another process; nothing is owned or
// dereferenced through them. The rest is Send.
unsafe impl Send for Event {}

#[expect(unsafe_code, reason = "Send and Sync")]
// SAFETY: as for Send; no method of the type mutates through a shared reference.
unsafe impl Sync for Event {}

/// A message of the kernel's: the bytes of a `struct uffd_msg`.
pub(crate) type Message = [u8; size_of::<sys::uffd_msg>()];

/// No message.
pub(crate) const EMPTY: Message = [0; size_of::<sys::uffd_msg>()];

/// A message decoded. A descriptor in it is but a number here.
#[derive(Debug, PartialEq, Eq)]
enum Decoded {
    Pagefault { flags: u64, address: u64, thread_id: i32 },
    Fork { fd: RawFd },
    Remap { from: u64, to: u64, len: u64 },
    Remove { start: u64, end: u64 },
    Unmap { start: u64, end: u64 },
    Unknown { event: u8 },
}

/// Where the part of a message lies that depends on its kind: three words.
const ARG: usize = offset_of!(sys::uffd_msg, arg);

#[inline]
fn bytes_at<const LEN: usize>(message: &Message, at: usize) -> [u8; LEN] {
    *message[at..].first_chunk().expect("a message is longer than where its fields are")
}

#[inline]
fn u32_at(message: &Message, at: usize) -> u32 {
    u32::from_ne_bytes(bytes_at(message, at))
}

#[inline]
fn u64_at(message: &Message, at: usize) -> u64 {
    u64::from_ne_bytes(bytes_at(message, at))
}

#[inline]
fn kind_of(message: &Message) -> u8 {
    message[offset_of!(sys::uffd_msg, event)]
}

#[inline]
pub(crate) fn is_fork(message: &Message) -> bool {
    kind_of(message) == sys::UFFD_EVENT_FORK
}

#[inline]
fn is_pagefault(message: &Message) -> bool {
    kind_of(message) == sys::UFFD_EVENT_PAGEFAULT
}

#[inline]
fn decode(message: &Message) -> Decoded {
    let word = |index: usize| u64_at(message, ARG + index * size_of::<u64>());
    match kind_of(message) {
        sys::UFFD_EVENT_PAGEFAULT => Decoded::Pagefault {
            flags: word(0),
            address: word(1),
            thread_id: u32_at(message, ARG + 2 * size_of::<u64>()) as i32,
        },
        sys::UFFD_EVENT_FORK => Decoded::Fork { fd: u32_at(message, ARG) as RawFd },
        sys::UFFD_EVENT_REMAP => Decoded::Remap { from: word(0), to: word(1), len: word(2) },
        sys::UFFD_EVENT_REMOVE => Decoded::Remove { start: word(0), end: word(1) },
        sys::UFFD_EVENT_UNMAP => Decoded::Unmap { start: word(0), end: word(1) },
        event => Decoded::Unknown { event },
    }
}

/// What a message says of the layout that another process has read: the descriptor in it was that process's.
#[cfg(feature = "pager")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// It is none, or a fault.
    Nothing,
    Removed(std::ops::Range<usize>),
    Forked,
    Moved,
    Unmapped,
    Unknown,
}

/// Decodes a message that another process has read.
#[cfg(feature = "pager")]
pub(crate) fn kept(message: &Message) -> Kept {
    match decode(message) {
        Decoded::Pagefault { .. } | Decoded::Unknown { event: 0 } => Kept::Nothing,
        Decoded::Remove { start, end } => Kept::Removed(start as usize..end as usize),
        Decoded::Fork { .. } => Kept::Forked,
        Decoded::Remap { .. } => Kept::Moved,
        Decoded::Unmap { .. } => Kept::Unmapped,
        Decoded::Unknown { .. } => Kept::Unknown,
    }
}

/// Decodes a message that was read from a userfaultfd, and takes ownership of the descriptor in it. To be
/// called once for each message read.
///
/// Always inlined, like its callers: an event that is handed over in memory takes twice the time.
#[expect(unsafe_code, reason = "owning the descriptor of a fork")]
#[inline(always)]
pub(crate) fn claim(message: &Message, terms: &Terms) -> Result<Event> {
    Ok(match decode(message) {
        Decoded::Pagefault { flags, address, thread_id } => Event::Pagefault {
            kind: kind(flags),
            rw: if flags & sys::UFFD_PAGEFAULT_FLAG_WRITE == 0 { ReadWrite::Read } else { ReadWrite::Write },
            addr: pointer(address),
            thread_id: Pid::from_raw(thread_id),
        },
        Decoded::Fork { fd } => {
            // SAFETY: the kernel opened the descriptor for the reader of this message, and it was read once.
            Event::Fork { uffd: Uffd::new(unsafe { sys::own(fd) }, terms.of_child()) }
        }
        Decoded::Remap { from, to, len } => {
            Event::Remap { from: pointer(from), to: pointer(to), len: len as usize }
        }
        Decoded::Remove { start, end } => Event::Remove { start: pointer(start), end: pointer(end) },
        Decoded::Unmap { start, end } => Event::Unmap { start: pointer(start), end: pointer(end) },
        Decoded::Unknown { event } => return Err(Error::UnrecognizedEvent(event)),
    })
}

/// The reason among a fault's flags. There is one at most.
#[inline]
fn kind(flags: u64) -> FaultKind {
    const REASONS: [(u64, FaultKind); 3] = [
        (sys::UFFD_PAGEFAULT_FLAG_WP, FaultKind::WriteProtected),
        (sys::UFFD_PAGEFAULT_FLAG_MINOR, FaultKind::Minor),
        (sys::UFFD_PAGEFAULT_FLAG_RWP, FaultKind::ReadWriteProtected),
    ];
    if flags & !sys::UFFD_PAGEFAULT_FLAG_WRITE == 0 {
        return FaultKind::Missing;
    }
    REASONS.iter().find(|(flag, _)| flags & flag != 0).map_or(FaultKind::Unknown(flags), |(_, kind)| *kind)
}

/// An address that the kernel reports. It may be of another process, so it is only a number here.
#[inline]
fn pointer(address: u64) -> *mut c_void {
    ptr::with_exposed_provenance_mut(address as usize)
}

/// A buffer for events: one system call reads many, and the program takes them out in one of two orders.
///
/// It is allocated once, with room for `size` events, and reused. The buffer owns the descriptor of a fork event until
/// the event is taken out, and closes it if that never happens.
///
/// The kernel delivers faults before other events, whatever happened first. So a fault may concern an address whose
/// removal or unmapping comes later in the same batch: a fill then fails with `EAGAIN` or `ENOENT`, or puts old data
/// where zeros belong. A handler with events must take them [changes first](Self::changes_first).
///
/// ```
/// use userfaultfd::{EventBuffer, UffdBuilder};
///
/// let uffd = UffdBuilder::new().non_blocking(true).create()?;
/// let mut buffer = EventBuffer::new(64);
///
/// // In the order of delivery:
/// for event in uffd.read_events(&mut buffer)? {
///     println!("{:?}", event?);
/// }
///
/// // Changes first:
/// uffd.read_batch(&mut buffer)?;
/// for event in buffer.changes_first().drain() {
///     println!("{:?}", event?);
/// }
/// # Ok::<(), userfaultfd::Error>(())
/// ```
pub struct EventBuffer {
    messages: Box<[Message]>,
    /// `messages[next..end]` were read and not taken out yet.
    next: usize,
    end: usize,
    /// What a child of the userfaultfd that was read last inherits.
    terms: Terms,
}

impl EventBuffer {
    /// Returns a buffer with room for `size` events of 32 bytes each.
    ///
    /// With `size` 0, reading fails with [`EmptyBuffer`](Error::EmptyBuffer).
    #[must_use]
    pub fn new(size: usize) -> Self {
        Self::of(vec![EMPTY; size])
    }

    /// The same. `None` if there is no memory.
    #[cfg(feature = "pager")]
    pub(crate) fn try_new(size: usize) -> Option<Self> {
        let mut messages = Vec::new();
        messages.try_reserve_exact(size).ok()?;
        messages.resize(size, EMPTY);
        Some(Self::of(messages))
    }

    fn of(messages: Vec<Message>) -> Self {
        Self { messages: messages.into_boxed_slice(), next: 0, end: 0, terms: Terms::default() }
    }

    /// Returns the number of events that the buffer has room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.messages.len()
    }

    /// Returns the number of events that were read and not taken out yet.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        self.end - self.next
    }

    /// Returns whether every event was taken out.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.next == self.end
    }

    /// Moves changes (forks, moves, removals, unmappings, unknown events) before the faults; within both, the order of
    /// delivery stays.
    pub fn changes_first(&mut self) -> &mut Self {
        let messages = &mut self.messages[self.next..self.end];
        // Everything before `sorted` is a change. As the kernel delivers faults first, there is one round for
        // each batch in the buffer.
        let mut sorted = 0;
        while let Some(faults) = messages[sorted..].iter().position(|message| !is_pagefault(message)) {
            let rest = &mut messages[sorted..];
            let changes = rest[faults..].iter().take_while(|message| !is_pagefault(message)).count();
            rest[..faults + changes].rotate_left(faults);
            sorted += changes;
        }
        self
    }

    /// Takes out and returns the next event, or `None` if none is left.
    ///
    /// # Errors
    ///
    /// [`UnrecognizedEvent`](Error::UnrecognizedEvent): a kind of event that this crate doesn't know.
    #[inline(always)]
    pub fn pop(&mut self) -> Option<Result<Event>> {
        if self.is_empty() {
            return None;
        }
        let message = &self.messages[self.next];
        self.next += 1;
        Some(claim(message, &self.terms))
    }

    /// Returns an iterator that takes out all events. Dropping it drops the events that are left, and closes the descriptors
    /// of forks among them.
    #[inline]
    pub fn drain(&mut self) -> Drain<'_> {
        Drain { buffer: self }
    }

    /// Returns the messages that were read and not taken out yet, as the kernel wrote them: `struct uffd_msg`, 32 bytes
    /// each.
    ///
    /// Use it for fields that [`Event`] doesn't have. The buffer owns the descriptors in the messages.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.messages[self.next..self.end].as_flattened()
    }

    /// Makes room, has `read` put messages there, and takes them over.
    #[inline]
    pub(crate) fn receive(
        &mut self,
        terms: Terms,
        read: impl FnOnce(&mut [Message]) -> Result<usize>,
    ) -> Result<usize> {
        if self.messages.is_empty() {
            return Err(Error::EmptyBuffer);
        }
        self.messages.copy_within(self.next..self.end, 0);
        self.end -= self.next;
        self.next = 0;
        if self.end == self.messages.len() {
            return Ok(0);
        }
        let read = read(&mut self.messages[self.end..])?;
        let terms = terms.of_child();
        // Where the events of two userfaultfds mix, what a fork's child inherits is asked of the kernel.
        self.terms = if self.end == 0 || self.terms == terms { terms } else { Terms::default() };
        self.end += read;
        Ok(read)
    }

    /// Drops what is left.
    #[inline]
    fn clear(&mut self) {
        while self.next < self.end {
            let message = &self.messages[self.next];
            self.next += 1;
            if is_fork(message) {
                drop(claim(message, &self.terms));
            }
        }
    }
}

impl Drop for EventBuffer {
    #[inline]
    fn drop(&mut self) {
        self.clear();
    }
}

impl fmt::Debug for EventBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventBuffer").field("capacity", &self.capacity()).field("len", &self.len()).finish()
    }
}

/// Iterator that takes the events out of an [`EventBuffer`].
#[derive(Debug)]
pub struct Drain<'a> {
    buffer: &'a mut EventBuffer,
}

impl Iterator for Drain<'_> {
    type Item = Result<Event>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        self.buffer.pop()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.buffer.len(), Some(self.buffer.len()))
    }
}

impl ExactSizeIterator for Drain<'_> {}

impl std::iter::FusedIterator for Drain<'_> {}

impl Drop for Drain<'_> {
    #[inline]
    fn drop(&mut self) {
        self.buffer.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::{AsRawFd, IntoRawFd};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::FeatureFlags;

    /// A message as the kernel would write it.
    fn message(event: u8, words: [u64; 3]) -> Message {
        let mut message = EMPTY;
        message[0] = event;
        for (index, word) in words.iter().enumerate() {
            message[8 + index * 8..][..8].copy_from_slice(&word.to_ne_bytes());
        }
        message
    }

    fn fault(address: u64) -> Message {
        message(sys::UFFD_EVENT_PAGEFAULT, [0, address, 0])
    }

    fn remove(start: u64) -> Message {
        message(sys::UFFD_EVENT_REMOVE, [start, start + 0x1000, 0])
    }

    /// A message of a fork, with a real descriptor, and the other end of its socket.
    fn fork() -> (Message, UnixStream) {
        let (reader, writer) = UnixStream::pair().unwrap();
        let mut message = EMPTY;
        message[0] = sys::UFFD_EVENT_FORK;
        message[8..12].copy_from_slice(&writer.into_raw_fd().to_ne_bytes());
        (message, reader)
    }

    /// Whether the other end is closed, for which it waits.
    fn is_closed(mut reader: UnixStream) -> bool {
        reader.read(&mut [0]).unwrap() == 0
    }

    fn fill(buffer: &mut EventBuffer, messages: &[Message]) -> usize {
        let read = |room: &mut [Message]| {
            let fits = messages.len().min(room.len());
            room[..fits].copy_from_slice(&messages[..fits]);
            Ok(fits)
        };
        buffer.receive(Terms::default(), read).unwrap()
    }

    fn addresses(events: impl Iterator<Item = Result<Event>>) -> Vec<usize> {
        events
            .map(|event| match event.unwrap() {
                Event::Pagefault { addr, .. } => addr.addr(),
                Event::Remove { start, .. } => start.addr(),
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn every_kind_of_message_is_decoded() {
        crate::support::require!();
        use sys::{UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP};
        let (from, to, len) = (0x1000, 0x2000, 0x3000);
        assert_eq!(decode(&message(UFFD_EVENT_REMAP, [from, to, len])), Decoded::Remap { from, to, len });
        let (start, end) = (from, to);
        assert_eq!(decode(&message(UFFD_EVENT_REMOVE, [start, end, 0])), Decoded::Remove { start, end });
        assert_eq!(decode(&message(UFFD_EVENT_UNMAP, [start, end, 0])), Decoded::Unmap { start, end });
        for event in (0..=u8::MAX).filter(|event| !(0x12..=0x16).contains(event)) {
            assert_eq!(decode(&message(event, [1, 2, 3])), Decoded::Unknown { event });
        }

        let mut message = message(sys::UFFD_EVENT_PAGEFAULT, [3, u64::MAX, 0]);
        message[24..28].copy_from_slice(&4711u32.to_ne_bytes());
        let decoded = Decoded::Pagefault { flags: 3, address: u64::MAX, thread_id: 4711 };
        assert_eq!(decode(&message), decoded);

        let mut message = EMPTY;
        message[0] = sys::UFFD_EVENT_FORK;
        message[8..12].copy_from_slice(&7u32.to_ne_bytes());
        assert_eq!(decode(&message), Decoded::Fork { fd: 7 });
    }

    #[test]
    fn flags_of_a_fault_tell_its_kind() {
        crate::support::require!();
        let cases = [
            (0x0, FaultKind::Missing, ReadWrite::Read),
            (0x1, FaultKind::Missing, ReadWrite::Write),
            (0x3, FaultKind::WriteProtected, ReadWrite::Write),
            (0x4, FaultKind::Minor, ReadWrite::Read),
            (0x5, FaultKind::Minor, ReadWrite::Write),
            (0x8, FaultKind::ReadWriteProtected, ReadWrite::Read),
            (0x9, FaultKind::ReadWriteProtected, ReadWrite::Write),
            (0x11, FaultKind::Unknown(0x11), ReadWrite::Write),
            (0x14, FaultKind::Minor, ReadWrite::Read),
            (1 << 63, FaultKind::Unknown(1 << 63), ReadWrite::Read),
        ];
        for (flags, expected, access) in cases {
            let event = claim(&message(sys::UFFD_EVENT_PAGEFAULT, [flags, 0x1000, 0]), &Terms::default());
            let Ok(Event::Pagefault { kind, rw, addr, thread_id }) = event else { panic!("{event:?}") };
            assert_eq!((kind, rw, addr.addr()), (expected, access, 0x1000), "{flags:#x}");
            assert_eq!(thread_id.as_raw(), 0);
        }
    }

    #[test]
    fn any_bytes_decode_without_panic() {
        crate::support::require!();
        let mut numbers = crate::support::random::Random::new(1);
        let mut random = || numbers.next();
        for _ in 0..100_000 {
            let words = [random(), random(), random()];
            // Mostly events that exist.
            let event = if random() % 4 == 0 { random() as u8 } else { 0x12 + (random() % 5) as u8 };
            let mut message = message(event, words);
            message[1..8].copy_from_slice(&random().to_ne_bytes()[..7]);
            let first_half = u32::from_ne_bytes(words[0].to_ne_bytes()[..4].try_into().unwrap());
            match decode(&message) {
                Decoded::Pagefault { flags, address, .. } => {
                    assert_eq!((event, flags, address), (0x12, words[0], words[1]));
                    let explained = matches!(kind(flags), FaultKind::Unknown(unknown) if unknown == flags);
                    assert!(explained || flags & 0xe != 0 || flags & !1 == 0, "{flags:#x}");
                }
                Decoded::Fork { fd } => assert_eq!((event, fd as u32), (0x13, first_half)),
                Decoded::Remap { from, to, len } => assert_eq!((event, [from, to, len]), (0x14, words)),
                Decoded::Remove { start, end } => {
                    assert_eq!((event, [start, end]), (0x15, [words[0], words[1]]));
                }
                Decoded::Unmap { start, end } => {
                    assert_eq!((event, [start, end]), (0x16, [words[0], words[1]]));
                }
                Decoded::Unknown { event: unknown } => {
                    assert_eq!(unknown, event);
                    assert!(!(0x12..=0x16).contains(&event));
                }
            }
        }
    }

    #[test]
    fn changes_go_first_and_order_is_kept() {
        crate::support::require!();
        // f: a fault, r: a removal; each at the address of its position.
        for order in ["", "f", "r", "fr", "rf", "fffrrr", "rrrfff", "frfrfr", "ffrrfrrffr", "rfrrf"] {
            let messages: Vec<_> = order
                .bytes()
                .enumerate()
                .map(|(at, kind)| if kind == b'f' { fault(at as u64) } else { remove(at as u64) })
                .collect();
            let positions =
                |kind| order.bytes().enumerate().filter(move |(_, k)| *k == kind).map(|(at, _)| at);
            let expected: Vec<_> = positions(b'r').chain(positions(b'f')).collect();

            let mut buffer = EventBuffer::new(10);
            fill(&mut buffer, &messages);
            assert_eq!(addresses(buffer.changes_first().drain()), expected, "{order}");
            fill(&mut buffer, &messages);
            let delivered: Vec<_> = (0..order.len()).collect();
            assert_eq!(addresses(buffer.drain()), delivered, "{order}");
        }
    }

    #[test]
    fn unknown_event_is_error_and_later_ones_decode() {
        crate::support::require!();
        let mut buffer = EventBuffer::new(3);
        fill(&mut buffer, &[fault(1), message(0x77, [0; 3]), fault(2)]);
        let mut events = buffer.drain();
        assert!(matches!(events.next(), Some(Ok(Event::Pagefault { .. }))));
        assert!(matches!(events.next(), Some(Err(Error::UnrecognizedEvent(0x77)))));
        assert!(matches!(events.next(), Some(Ok(Event::Pagefault { .. }))));
        assert!(events.next().is_none());
    }

    #[test]
    fn reading_keeps_what_was_not_taken_out() {
        crate::support::require!();
        let mut buffer = EventBuffer::new(3);
        assert_eq!(fill(&mut buffer, &[fault(1), fault(2)]), 2);
        assert!(buffer.pop().is_some());
        assert_eq!(fill(&mut buffer, &[fault(3), fault(4), fault(5)]), 2);
        assert_eq!(buffer.as_bytes().len(), 3 * 32);
        assert_eq!(fill(&mut buffer, &[fault(6)]), 0);
        assert_eq!(addresses(buffer.drain()), [2, 3, 4]);
        assert!(buffer.is_empty());
    }

    #[test]
    fn buffer_without_room_is_an_error() {
        crate::support::require!();
        let result = EventBuffer::new(0).receive(Terms::default(), |_| panic!("read"));
        assert!(matches!(result, Err(Error::EmptyBuffer)), "{result:?}");
    }

    #[test]
    fn failed_read_keeps_the_buffer() {
        crate::support::require!();
        let mut buffer = EventBuffer::new(2);
        fill(&mut buffer, &[fault(1)]);
        assert!(buffer.receive(Terms::default(), |_| Err(Error::ReadEof)).is_err());
        assert_eq!(addresses(buffer.drain()), [1]);
    }

    #[test]
    fn dropped_events_close_fork_descriptors() {
        crate::support::require!();
        // With the iterator, after one of three events was taken out of it.
        let ((first, first_end), (second, second_end)) = (fork(), fork());
        let mut buffer = EventBuffer::new(8);
        fill(&mut buffer, &[fault(1), first, second]);
        let mut events = buffer.drain();
        assert!(matches!(events.next(), Some(Ok(Event::Pagefault { .. }))));
        drop(events);
        assert!(is_closed(first_end) && is_closed(second_end));

        // With an iterator that stopped at an error.
        let (message_of_fork, end) = fork();
        fill(&mut buffer, &[message(0x77, [0; 3]), message_of_fork]);
        assert!(buffer.drain().collect::<Result<Vec<_>>>().is_err());
        assert!(is_closed(end));

        // With the buffer, also where the iterator was forgotten.
        let ((first, first_end), (second, second_end)) = (fork(), fork());
        fill(&mut buffer, &[first, second]);
        let mut events = buffer.drain();
        drop(events.next());
        assert!(is_closed(first_end));
        std::mem::forget(events);
        drop(buffer);
        assert!(is_closed(second_end));
    }

    /// Else a child would have the features of whatever was read last.
    #[test]
    fn mixed_events_of_two_userfaultfds_inherit_no_terms() {
        crate::support::require!();
        let terms = |features| {
            let support = crate::Support { features, ioctls: crate::IoctlFlags::API };
            Terms::negotiated(support, crate::IoctlFlags::empty())
        };
        let (message, end) = fork();
        let read = |message: Message| {
            move |room: &mut [Message]| {
                room[0] = message;
                Ok(1)
            }
        };
        let mut buffer = EventBuffer::new(2);
        buffer.receive(terms(FeatureFlags::EVENT_FORK), read(message)).unwrap();
        buffer.receive(terms(FeatureFlags::THREAD_ID), read(fault(1))).unwrap();
        let Some(Ok(Event::Fork { uffd })) = buffer.pop() else { panic!("no fork") };
        // The kernel is asked, and has none for a socket.
        assert_eq!(uffd.features(), FeatureFlags::empty());
        drop(uffd);
        assert!(is_closed(end));

        // Once those are taken out, the next ones are of one userfaultfd again.
        drop(buffer.pop());
        let (message, _end) = fork();
        buffer.receive(terms(FeatureFlags::EVENT_FORK), read(message)).unwrap();
        let Some(Ok(Event::Fork { uffd })) = buffer.pop() else { panic!("no fork") };
        assert_eq!(uffd.features(), FeatureFlags::EVENT_FORK);
    }

    #[test]
    fn fork_s_descriptor_is_event_s_and_inherits_terms() {
        crate::support::require!();
        let (message, end) = fork();
        let features = FeatureFlags::EVENT_FORK;
        let support = crate::Support { features, ioctls: crate::IoctlFlags::API };
        let terms = Terms::negotiated(support, crate::IoctlFlags::empty());
        let mut buffer = EventBuffer::new(1);
        let take = |room: &mut [Message]| {
            room[0] = message;
            Ok(1)
        };
        buffer.receive(terms, take).unwrap();
        let Some(Ok(Event::Fork { uffd })) = buffer.pop() else { panic!("no fork") };
        drop(buffer);
        assert!(uffd.as_raw_fd() >= 0);
        assert_eq!(uffd.features(), features);
        drop(uffd);
        assert!(is_closed(end));
    }
}
