//! A cache of a file in memory that drops pages by itself: what is dropped is missing, and read again. An
//! edge-triggered epoll waits for faults, and for the number that ends it.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use libc::c_void;
use nix::errno::Errno;
use userfaultfd::{Error, Event, IoctlFlags, RegisterMode, Uffd, UffdBuilder};

use crate::mapping::{Mapping, memfd, page_size};
use crate::support::require;

/// What the cache and its thread share.
struct State {
    uffd: Uffd,
    memory: Mapping,
    file: File,
    /// Pages that may be there, the oldest first.
    resident: Mutex<VecDeque<usize>>,
    reads: AtomicUsize,
}

struct Cache {
    state: Arc<State>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<Result<(), Error>>>,
}

impl State {
    /// Fills a page, and drops the oldest one where that is one too many.
    fn fill(&self, page: usize, most: usize) -> Result<(), Error> {
        let mut resident = self.resident.lock().unwrap();
        if resident.contains(&page) {
            // Another thread's fault has brought it.
            return self.uffd.wake(self.memory.page(page), page_size());
        }
        let mut bytes = vec![0; page_size()];
        self.file.read_exact_at(&mut bytes, (page * page_size()) as u64).expect("a page of the file");
        self.reads.fetch_add(1, Ordering::Relaxed);
        if resident.len() == most {
            self.memory.discard(resident.pop_front().expect("there are some"));
        }
        resident.push_back(page);
        drop(resident);
        // SAFETY: the page is the file's.
        match unsafe { self.uffd.copy(bytes.as_ptr().cast(), self.memory.page(page), page_size(), true) } {
            Err(Error::CopyFailed(errno)) if errno as i32 == libc::EEXIST => {
                self.uffd.wake(self.memory.page(page), page_size())
            }
            result => result.map(drop),
        }
    }

    /// Answers faults until the number is written.
    fn serve(&self, stop: &OwnedFd, most: usize) -> Result<(), Error> {
        // SAFETY: touches no memory.
        let epoll = Errno::result(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: it was just opened, and nothing else owns it.
        let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
        for fd in [self.uffd.as_raw_fd(), stop.as_raw_fd()] {
            let mut event =
                libc::epoll_event { events: (libc::EPOLLIN | libc::EPOLLET) as u32, u64: fd as u64 };
            // SAFETY: the event is borrowed for the call.
            Errno::result(unsafe {
                libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event)
            })?;
        }
        loop {
            let mut events = [libc::epoll_event { events: 0, u64: 0 }; 2];
            // SAFETY: the array has room for as many as is told.
            let ready =
                unsafe { libc::epoll_wait(epoll.as_raw_fd(), events.as_mut_ptr(), events.len() as i32, -1) };
            let ready = Errno::result(ready)?;
            // An edge tells once.
            while let Some(event) = self.uffd.read_event()? {
                let Event::Pagefault { addr, .. } = event else {
                    panic!("only faults are asked for: {event:?}")
                };
                self.fill((addr as usize - self.memory.ptr as usize) / page_size(), most)?;
            }
            if events[..ready as usize].iter().any(|event| event.u64 == stop.as_raw_fd() as u64) {
                return Ok(());
            }
        }
    }
}

impl Cache {
    fn new(file: File, pages: usize, most: usize) -> Result<Self, Error> {
        let uffd = UffdBuilder::new().close_on_exec(true).non_blocking(true).user_mode_only(true).create()?;
        let memory = Mapping::anonymous(pages);
        let ioctls = uffd.register(memory.ptr, memory.len)?;
        assert!(ioctls.contains(IoctlFlags::COPY | IoctlFlags::WAKE));
        // SAFETY: touches no memory.
        let stop = Errno::result(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        // SAFETY: it was just opened, and nothing else owns it.
        let stop = Arc::new(unsafe { OwnedFd::from_raw_fd(stop) });
        let resident = Mutex::new(VecDeque::with_capacity(most));
        let state = Arc::new(State { uffd, memory, file, resident, reads: AtomicUsize::new(0) });
        let of_thread = (Arc::clone(&state), Arc::clone(&stop));
        let thread = thread::spawn(move || of_thread.0.serve(&of_thread.1, most));
        Ok(Self { state, stop, thread: Some(thread) })
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        // SAFETY: the eight bytes are read.
        let written = unsafe { libc::write(self.stop.as_raw_fd(), (&raw const ONE).cast::<c_void>(), 8) };
        assert_eq!(written, 8);
        self.thread.take().unwrap().join().unwrap().expect("served to the end");
        self.state
            .uffd
            .unregister(self.state.memory.ptr, self.state.memory.len)
            .expect("registered until now");
    }
}

static ONE: u64 = 1;

/// A file whose pages are all of a byte, their number and one.
fn file(pages: usize) -> File {
    let file = memfd(pages);
    for page in 0..pages {
        file.write_all_at(&vec![page as u8 + 1; page_size()], (page * page_size()) as u64).unwrap();
    }
    file
}

#[test]
fn dropped_cache_pages_are_read_again() {
    require!();
    const PAGES: usize = 8;
    let cache = Cache::new(file(PAGES), PAGES, 3).unwrap();
    let memory = &cache.state.memory;
    for round in 1..=3 {
        for page in 0..PAGES {
            // Twice, of which the second finds it there.
            assert_eq!((memory.get(page), memory.get(page)), (page as u8 + 1, page as u8 + 1));
        }
        assert_eq!(cache.state.reads.load(Ordering::Relaxed), round * PAGES);
    }
    // One that is there still.
    assert_eq!(memory.get(PAGES - 1), PAGES as u8);
    assert_eq!(cache.state.reads.load(Ordering::Relaxed), 3 * PAGES);
}

/// As of a guest's memory that is put on another file piece by piece.
#[test]
fn piece_that_is_mapped_anew_is_registered_anew() {
    require!();
    const PAGES: usize = 6;
    let cache = Cache::new(file(PAGES), PAGES, PAGES).unwrap();
    let State { uffd, memory, reads, .. } = &*cache.state;
    assert_eq!((memory.get(2), memory.get(3)), (3, 4));
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let len = 2 * page_size();
    // SAFETY: only raw pointers lead there, and nothing is accessed meanwhile.
    let anew = unsafe { libc::mmap(memory.page(2), len, protection, flags | libc::MAP_FIXED, -1, 0) };
    assert_eq!(anew, memory.page(2));
    cache.state.resident.lock().unwrap().clear();
    let ioctls = uffd.register_with_mode(anew, len, RegisterMode::MISSING).unwrap();
    assert!(ioctls.contains(IoctlFlags::COPY));
    assert_eq!(reads.load(Ordering::Relaxed), 2);
    assert_eq!((1..5).map(|page| memory.get(page)).collect::<Vec<_>>(), [2, 3, 4, 5]);
    assert_eq!(reads.load(Ordering::Relaxed), 6);
}
