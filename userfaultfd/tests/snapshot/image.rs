//! A sink that tests look into, and can stop.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use userfaultfd::snapshot::{Content, Geometry, Sink};

use crate::support::memory::Memory;
use crate::support::{page, proc};

/// What was delivered.
#[derive(Debug, Default)]
pub(crate) struct Delivered {
    pub(crate) geometry: Option<Geometry>,
    pub(crate) bytes: Vec<u8>,
    /// How often each page of the base size was.
    pub(crate) times: Vec<u32>,
    /// The pages that were gone.
    pub(crate) gone: Vec<u64>,
    /// The first page of each piece, in order.
    pub(crate) order: Vec<u64>,
    pub(crate) finished: bool,
    /// How many pieces may still be taken.
    open: usize,
    /// How many wait at the gate.
    waiting: usize,
    /// Fails at this piece.
    pub(crate) fails_at: Option<usize>,
}

/// A sink with a gate, which is open at first. Its copies are the same sink.
#[derive(Clone, Debug)]
pub(crate) struct Image(Arc<(Mutex<Delivered>, Condvar)>);

impl Image {
    pub(crate) fn new() -> Self {
        let delivered = Delivered { open: usize::MAX, ..Delivered::default() };
        Self(Arc::new((Mutex::new(delivered), Condvar::new())))
    }

    /// With the gate closed: the first piece waits there.
    pub(crate) fn closed() -> Self {
        let image = Self::new();
        image.with(|delivered| delivered.open = 0);
        image
    }

    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut Delivered) -> T) -> T {
        look(&mut self.0.0.lock().unwrap())
    }

    pub(crate) fn open(&self) {
        self.with(|delivered| delivered.open = usize::MAX);
        self.0.1.notify_all();
    }

    /// Waits until a piece waits at the gate.
    pub(crate) fn wait_for_piece(&self) {
        let (lock, changed) = &*self.0;
        drop(changed.wait_while(lock.lock().unwrap(), |delivered| delivered.waiting == 0).unwrap());
    }

    /// The first byte of each page of `memory`, whose snapshot it alone is: each was delivered once.
    #[track_caller]
    pub(crate) fn content(&self, memory: &Memory) -> Vec<u8> {
        self.with(|delivered| {
            assert!(delivered.finished);
            assert!(delivered.times.iter().all(|times| *times == 1), "{:?}", delivered.times);
            delivered.bytes.iter().step_by(memory.page()).copied().collect()
        })
    }

    /// The pages of the base size that were delivered.
    pub(crate) fn pages(&self) -> Vec<usize> {
        self.with(|delivered| {
            assert!(delivered.times.iter().all(|times| *times <= 1), "{:?}", delivered.times);
            (0..delivered.times.len()).filter(|page| delivered.times[*page] == 1).collect()
        })
    }
}

impl Sink for Image {
    fn begin(&mut self, geometry: &Geometry) -> io::Result<()> {
        self.with(|delivered| {
            if delivered.fails_at == Some(0) {
                return Err(io::Error::other("it can't begin"));
            }
            let len = geometry.len() as usize;
            delivered.bytes = vec![0xee; len];
            delivered.times = vec![0; len / page()];
            delivered.geometry = Some(geometry.clone());
            Ok(())
        })
    }

    fn write(&mut self, offset: u64, content: Content<'_>) -> io::Result<()> {
        let (lock, changed) = &*self.0;
        let mut delivered = lock.lock().unwrap();
        delivered.waiting += 1;
        changed.notify_all();
        delivered = changed.wait_while(delivered, |delivered| delivered.open == 0).unwrap();
        delivered.waiting -= 1;
        delivered.open -= 1;
        let at = offset as usize;
        let range = at..at + content.len() as usize;
        delivered.order.push(offset / page() as u64);
        for page in range.start / page()..range.end / page() {
            delivered.times[page] += 1;
        }
        match content {
            Content::Data(bytes) => delivered.bytes[range].copy_from_slice(bytes),
            Content::Zero(_) => delivered.bytes[range].fill(0),
            Content::Gone(_) => {
                delivered.bytes[range.clone()].fill(0xdd);
                delivered.gone.extend((range.start / page()..range.end / page()).map(|page| page as u64));
            }
            other => panic!("{other:?}"),
        }
        match delivered.fails_at {
            Some(piece) if delivered.order.len() >= piece => Err(io::Error::other("it is full")),
            _ => Ok(()),
        }
    }

    fn finish(&mut self) -> io::Result<()> {
        self.with(|delivered| delivered.finished = true);
        Ok(())
    }
}

/// Ends the threads of a test whatever happens.
pub(crate) struct Stop<'a>(pub(crate) &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// The addresses of some memory.
pub(crate) fn addresses(memory: &Memory) -> Range<usize> {
    memory.range(0, memory.pages())
}

/// Writes to each page its number and something.
pub(crate) fn number(memory: &Memory, plus: usize) -> Vec<u8> {
    let content: Vec<u8> = (0..memory.pages()).map(|page| ((page + plus) % 251) as u8).collect();
    content.iter().enumerate().for_each(|(page, byte)| memory.write(page, *byte));
    content
}

/// The first byte of each page.
pub(crate) fn content(memory: &Memory) -> Vec<u8> {
    (0..memory.pages()).map(|page| memory.read(page)).collect()
}

/// Waits until a thread of this process sleeps and isn't in a system call: in a fault.
pub(crate) fn wait_until_in_fault(thread: libc::pid_t) {
    proc::wait_until(|| {
        let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/syscall"));
        text.expect("a kernel that tells of system calls").starts_with("-1 ")
    });
}

/// Has the calling thread, and those that it starts, run on the CPU that it runs on.
pub(crate) fn stay_on_this_cpu() {
    // SAFETY: touches no memory.
    let cpu = usize::try_from(unsafe { libc::sched_getcpu() }).unwrap();
    // SAFETY: all zeros is an empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    assert!(cpu < 8 * size_of_val(&set), "CPU {cpu}");
    // SAFETY: the CPU is one that fits the set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the kernel reads the set, which is as long as is told.
    assert_eq!(unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) }, 0);
}
