//! Which process made a thing, and what becomes of it in the child of a fork.
//!
//! A child inherits the memory of its parent and copies of its descriptors, but no thread. Whatever it asks of an
//! inherited descriptor happens in the parent: its memory is poisoned, its ranges are unregistered, its epoll instance
//! loses a member. Locks that another thread held at the moment of the fork stay locked, and a handle of a thread
//! leads to none, or to another one. So each thing that has threads or descriptors notes its [`Owner`]. In any other
//! process it
//!
//! - closes its own numbers when it is dropped ([`InheritedFd`]), and does nothing else: no system call on the
//!   descriptors, no lock that may be held, no join, no munmap of what the child hasn't got;
//! - answers every method that would do more with an error;
//! - panics instead of dereferencing memory that the child hasn't got.

#![cfg_attr(
    not(all(feature = "pager", feature = "tracking", feature = "snapshot")),
    allow(dead_code, reason = "each feature uses a part")
)]
#![expect(unsafe_code, reason = "closes numbers whose owner is out of reach")]

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use crate::{Errno, sys};

/// The process that made a thing.
///
/// Its generation lies in a page that the kernel clears in a fork's child (MADV_WIPEONFORK), so that a look at it is a
/// load. A process that shares all memory with its parent, as vfork(2) makes it, counts as the same.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner {
    now: &'static AtomicUsize,
    generation: usize,
}

/// How many generations this process and its ancestors have had.
static GENERATIONS: AtomicUsize = AtomicUsize::new(0);

impl Owner {
    /// Returns this process.
    pub(crate) fn current() -> Result<Self, Errno> {
        let now = sys::zero_after_fork()?;
        let mut generation = now.load(Ordering::Relaxed);
        if generation == 0 {
            // Of those that try at the same time one is right; a child begins above all that its ancestors had.
            let new = GENERATIONS.fetch_add(1, Ordering::Relaxed) + 1;
            let set = now.compare_exchange(0, new, Ordering::Relaxed, Ordering::Relaxed);
            generation = set.map_or_else(|other| other, |_| new);
        }
        Ok(Self { now, generation })
    }

    /// Returns whether this process is the owner.
    #[inline]
    pub(crate) fn is_current(&self) -> bool {
        self.now.load(Ordering::Relaxed) == self.generation
    }
}

/// A value that each process has of its own. A fork's child makes a new one: it may have inherited its parent's locked, or
/// half changed.
#[derive(Debug)]
pub(crate) struct PerProcess<T: 'static>(AtomicPtr<(Owner, T)>);

impl<T: Default + Send + Sync> PerProcess<T> {
    pub(crate) const fn new() -> Self {
        Self(AtomicPtr::new(std::ptr::null_mut()))
    }

    /// Returns this process's value, if it has made one. Allocates nothing.
    pub(crate) fn made(&self) -> Option<&'static T> {
        self.current(self.0.load(Ordering::Acquire))
    }

    fn current(&self, value: *mut (Owner, T)) -> Option<&'static T> {
        // SAFETY: null, or a box that was leaked, whose content the store of the pointer has published.
        let (owner, value) = unsafe { value.as_ref::<'static>() }?;
        owner.is_current().then_some(value)
    }

    /// Returns this process's value. Makes it, at first.
    pub(crate) fn get(&self) -> Result<&'static T, Errno> {
        let mut seen = self.0.load(Ordering::Acquire);
        loop {
            if let Some(value) = self.current(seen) {
                return Ok(value);
            }
            let new = Box::into_raw(Box::new((Owner::current()?, T::default())));
            match self.0.compare_exchange(seen, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => seen = new,
                Err(other) => {
                    seen = other;
                    // SAFETY: it comes from a box, and no other thread has seen the pointer.
                    drop(unsafe { Box::from_raw(new) });
                }
            }
        }
    }
}

/// The number of a descriptor, for a fork's child to close whose threads would have owned it.
#[derive(Debug)]
pub(crate) struct InheritedFd(AtomicI32);

const CLOSED: RawFd = -1;

impl InheritedFd {
    pub(crate) fn new(fd: BorrowedFd<'_>) -> Self {
        Self(AtomicI32::new(fd.as_raw_fd()))
    }

    /// Forgets the number: its owner is about to close it.
    pub(crate) fn forget(&self) {
        self.0.store(CLOSED, Ordering::Relaxed);
    }

    /// Closes the number in the child. Once.
    ///
    /// # Safety
    ///
    /// The caller must make sure that
    ///
    /// - this process is a child of the one that the number was noted in, and the descriptor was open there when it
    ///   forked.
    /// - the value that owns the descriptor is neither used nor dropped in this process.
    pub(crate) unsafe fn close(&self) {
        let number = self.0.swap(CLOSED, Ordering::Relaxed);
        if number != CLOSED {
            // SAFETY: it is open, since it was when this process came into being and its owner is out of reach, as the
            // caller has made sure; and it is taken out above, so that it is closed once.
            drop(unsafe { sys::own(number) });
        }
    }
}

/// Entries of the first block of [`InheritedFds`]; each block has twice as many as the one before it.
const FIRST_BLOCK_ENTRIES: usize = 8;

/// Blocks of [`InheritedFds`]: more entries than a process can have descriptors.
const BLOCKS: usize = 28;

/// Numbers of descriptors that come and go, for a fork's child to close. Found without a lock: another thread may have
/// held it when the process forked.
#[derive(Debug, Default)]
pub(crate) struct InheritedFds {
    blocks: [OnceLock<Box<[InheritedEntry]>>; BLOCKS],
}

#[derive(Debug)]
struct InheritedEntry {
    fd: InheritedFd,
    /// What the descriptor is of.
    of: AtomicUsize,
}

impl InheritedEntry {
    /// Between free and in use. A child that finds it so hasn't got the owner, which was still to be.
    const TAKEN: RawFd = -2;

    fn free() -> Self {
        Self { fd: InheritedFd(AtomicI32::new(CLOSED)), of: AtomicUsize::new(0) }
    }

    fn take(&self) -> bool {
        self.fd.0.compare_exchange(CLOSED, Self::TAKEN, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

impl InheritedFds {
    /// Notes a number until the guard is dropped, which must come before the descriptor is closed. Allocates.
    pub(crate) fn note(self: &Arc<Self>, fd: BorrowedFd<'_>, of: u64) -> NotedFd {
        let (block, index) = (0..BLOCKS)
            .find_map(|block| {
                let entries = FIRST_BLOCK_ENTRIES << block;
                let made = || std::iter::repeat_with(InheritedEntry::free).take(entries).collect();
                let index = self.blocks[block].get_or_init(made).iter().position(InheritedEntry::take)?;
                Some((block, index))
            })
            .expect("there are more entries than numbers");
        let noted = NotedFd { all: Arc::clone(self), block, index, is_noted: AtomicBool::new(true) };
        let entry = noted.entry();
        entry.of.store(of as usize, Ordering::Relaxed);
        // Release: a child that sees the number sees what it is of. The fork copies memory after that.
        entry.fd.0.store(fd.as_raw_fd(), Ordering::Release);
        noted
    }

    /// Closes the numbers in the child, of one thing or of all.
    ///
    /// # Safety
    ///
    /// As of [`InheritedFd::close`], for each number.
    pub(crate) unsafe fn close(&self, of: Option<u64>) {
        for entry in self.blocks.iter().filter_map(OnceLock::get).flatten() {
            let number = entry.fd.0.load(Ordering::Acquire);
            let is_meant = of.is_none_or(|of| entry.of.load(Ordering::Relaxed) == of as usize);
            if number >= 0 && is_meant {
                // SAFETY: as the caller has made sure.
                unsafe { entry.fd.close() };
            }
        }
    }
}

/// A number that is noted.
#[derive(Debug)]
pub(crate) struct NotedFd {
    all: Arc<InheritedFds>,
    block: usize,
    index: usize,
    is_noted: AtomicBool,
}

impl NotedFd {
    fn entry(&self) -> &InheritedEntry {
        let block = self.all.blocks[self.block].get();
        &block.expect("it was made before the number was noted")[self.index]
    }

    /// Forgets the number: its owner is about to close it.
    pub(crate) fn forget(&self) {
        if self.is_noted.swap(false, Ordering::Relaxed) {
            self.entry().fd.forget();
        }
    }
}

impl Drop for NotedFd {
    fn drop(&mut self) {
        self.forget();
    }
}

/// Keeps a value from being dropped in a fork's child, with all that it leads to.
pub(crate) fn abandon<T>(shared: &Arc<T>) {
    std::mem::forget(Arc::clone(shared));
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::sync::Mutex;

    use super::*;
    use crate::support::{child, require, test_name};

    #[test]
    fn forked_child_and_grandchild_are_other_owners() {
        require!();
        child::run_well(test_name!(), || {
            let parent = Owner::current().unwrap();
            assert!(parent.is_current() && Owner::current().unwrap().generation == parent.generation);
            child::fork(|| {
                assert!(!parent.is_current());
                let own = Owner::current().unwrap();
                assert!(own.is_current() && !parent.is_current() && own.generation != parent.generation);
                child::fork(|| {
                    // The first to ask, or not.
                    assert!(!own.is_current() && !parent.is_current());
                    assert!(Owner::current().unwrap().is_current());
                    assert!(!own.is_current() && !parent.is_current());
                })
                .succeed();
                assert!(own.is_current());
            })
            .succeed();
            assert!(parent.is_current());
            assert_eq!(Owner::current().unwrap().generation, parent.generation);
        });
    }

    #[test]
    fn forked_child_makes_own_values_despite_lock() {
        require!();
        static VALUE: PerProcess<Mutex<u32>> = PerProcess::new();
        child::run_well(test_name!(), || {
            assert!(VALUE.made().is_none());
            let mut value = VALUE.get().unwrap().lock().unwrap();
            *value = 7;
            child::fork(|| {
                assert!(VALUE.made().is_none());
                assert_eq!(*VALUE.get().unwrap().lock().unwrap(), 0);
            })
            .succeed();
            drop(value);
            assert_eq!(*VALUE.made().unwrap().lock().unwrap(), 7);
            let threads: Vec<_> = (0..4).map(|_| std::thread::spawn(|| VALUE.get().unwrap())).collect();
            for thread in threads {
                assert!(std::ptr::eq(thread.join().unwrap(), VALUE.get().unwrap()));
            }
        });
    }

    #[test]
    fn child_closes_the_numbers_that_are_noted() {
        require!();
        child::run_well(test_name!(), || {
            let files: Vec<_> = (0..40).map(|_| File::open("/proc/self/exe").unwrap()).collect();
            let fds = Arc::new(InheritedFds::default());
            let mut noted: Vec<_> =
                files.iter().enumerate().map(|(at, file)| fds.note(file.as_fd(), at as u64 % 2)).collect();
            // Its place is another one's, so that forgetting it twice would forget that.
            let first = noted.remove(0);
            first.forget();
            noted.push(fds.note(files[0].as_fd(), 2));
            drop(first);
            noted[11].forget();
            let closed = || -> Vec<bool> {
                // SAFETY: touches no memory.
                files
                    .iter()
                    .map(|file| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFD) } == -1)
                    .collect()
            };
            child::fork(|| {
                // SAFETY: this is a child, which ends without dropping the files.
                unsafe { fds.close(Some(1)) };
                assert!(closed().iter().enumerate().all(|(at, closed)| *closed == (at % 2 == 1)));
                // SAFETY: as above.
                unsafe { fds.close(None) };
                assert!(closed().iter().enumerate().all(|(at, closed)| *closed == (at != 12)));
            })
            .succeed();
            assert!(closed().iter().all(|closed| !closed));
        });
    }

    #[test]
    fn number_is_closed_once() {
        require!();
        child::run_well(test_name!(), || {
            let file = File::open("/proc/self/exe").unwrap();
            let inherited = InheritedFd::new(file.as_fd());
            let number = file.as_raw_fd();
            child::fork(|| {
                // SAFETY: this is a child, which ends without dropping the file.
                unsafe { inherited.close() };
                let other = File::open("/proc/self/exe").unwrap();
                assert_eq!(other.as_raw_fd(), number, "the lowest that is free");
                // SAFETY: as above; nothing is left to close.
                unsafe { inherited.close() };
                other.metadata().unwrap();
            })
            .succeed();
            file.metadata().unwrap();
        });
    }
}
