//! Handlers that die at a chosen moment, and what can't be gone on with.

use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::handoff::{Dialect, MemoryRegion, Parts};
use crate::pager::{OnEnd, PageData, PageSource, Pager};
use crate::support::child::{self, Forked};
use crate::support::memory::{Kind, Memory};
use crate::support::{page, require, test_name};
use crate::sync_point::{Point, tests::at};
use crate::{FeatureFlags, RegisterMode, UffdBuilder};

/// Pages that are accessed, and how far one is from the next: farther than what is filled for a fault.
const PLACES: usize = 16;
const STRIDE: usize = 1024;

/// Commands to a monitor, each with the number of a place.
const READ: u8 = 0;
const REMOVE: u8 = 1;
const UNMAP: u8 = 2;
const MOVE: u8 = 3;
const CLOSE: u8 = 4;

/// The byte of a place.
fn byte(place: usize) -> u8 {
    (place + 1) as u8
}

struct Monitor {
    process: Forked,
    socket: UnixStream,
    regions: Vec<MemoryRegion>,
}

impl Monitor {
    fn start(features: FeatureFlags) -> Self {
        let memory = Memory::anonymous(PLACES * STRIDE);
        let (start, len) = (memory.start().expose_provenance(), memory.len());
        let regions = vec![MemoryRegion::new(start, len, 0)];
        let (mut socket, there) = UnixStream::pair().unwrap();
        let process = child::fork(|| {
            let mut builder = UffdBuilder::new();
            let uffd =
                builder.close_on_exec(true).non_blocking(true).require_features(features).create().unwrap();
            uffd.register(memory.start(), len).unwrap();
            let mut uffd = Some(uffd);
            let mut command = [0; 2];
            (&there).write_all(&[0]).unwrap();
            while (&there).read(&mut command).unwrap() == command.len() {
                let place = usize::from(command[1]) * STRIDE;
                let answer = match command[0] {
                    READ => memory.read(place),
                    REMOVE => {
                        memory.advise(place, 1, libc::MADV_DONTNEED).unwrap();
                        0
                    }
                    UNMAP => {
                        memory.unmap(place, 1);
                        0
                    }
                    MOVE => {
                        memory.move_over(place, 1, &Memory::anonymous(1), 0);
                        0
                    }
                    CLOSE => {
                        drop(uffd.take());
                        0
                    }
                    other => unreachable!("command {other}"),
                };
                (&there).write_all(&[answer]).unwrap();
            }
        });
        socket.read_exact(&mut [0]).unwrap();
        Self { process, socket, regions }
    }

    fn pid(&self) -> u32 {
        u32::try_from(self.process.pid()).unwrap()
    }

    fn ask(&mut self, command: u8, place: usize) {
        self.socket.write_all(&[command, place as u8]).unwrap();
    }

    fn answer(&mut self) -> u8 {
        let mut byte = [0];
        self.socket.read_exact(&mut byte).unwrap();
        byte[0]
    }

    fn has(&mut self, command: u8, place: usize) -> u8 {
        self.ask(command, place);
        self.answer()
    }

    /// What it would have handed over.
    fn handoff(&self) -> Handoff {
        let pidfd = self.process.pidfd();
        let userfaultfd = take_userfaultfd(pidfd.as_fd(), self.pid(), None).unwrap();
        let credentials = crate::handoff::Credentials { pid: Some(self.pid()), uid: 0, gid: 0 };
        let description = Description {
            dialect: Dialect::Firecracker,
            regions: self.regions.clone(),
            mode: RegisterMode::MISSING.bits(),
            credentials,
            pid: None,
            missing: None,
            on_end: OnEnd::Kill,
        };
        Handoff::from_description(description, userfaultfd, Vec::new(), Some(pidfd))
    }
}

fn source(_: &MemoryRegion) -> impl PageSource + use<> {
    |offset: u64, buffer: &mut [u8]| {
        let first = offset as usize / page();
        for (number, bytes) in buffer.chunks_mut(page()).enumerate() {
            bytes.fill(byte((first + number) / STRIDE));
        }
        io::Result::Ok(PageData::Data)
    }
}

/// A directory that is removed when this is dropped.
struct States(PathBuf);

impl States {
    fn new() -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir =
            Path::new("/dev/shm").join(format!("userfaultfd-succession-{}-{number}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    fn file(&self) -> PathBuf {
        let files: Vec<_> = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path()).collect();
        let [file] = &files[..] else { panic!("{files:?}") };
        file.clone()
    }
}

impl Drop for States {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// A handler that kills itself when it comes to a point and the fuse is lit.
struct Handler(Forked);

impl Handler {
    fn start(states: &States, handoff: impl FnOnce() -> Handoff, point: Point, fuse: &AtomicU64) -> Self {
        let (mut socket, there) = UnixStream::pair().unwrap();
        let fuse = std::ptr::from_ref(fuse).expose_provenance();
        let process = child::fork(|| {
            let pager = Pager::builder().state(&states.0).build().unwrap();
            let _served = pager.serve(handoff(), source).unwrap();
            let _armed = at(point, 0..usize::MAX, move |_| {
                // SAFETY: the number is in memory that outlives this process.
                let fuse = unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(fuse) };
                if fuse.load(Ordering::Relaxed) != 0 {
                    // SAFETY: touches no memory.
                    unsafe { libc::raise(libc::SIGKILL) };
                }
            });
            (&there).write_all(&[0]).unwrap();
            loop {
                thread::park();
            }
        });
        socket.read_exact(&mut [0]).expect("the handler serves");
        Self(process)
    }

    /// Waits for its end by its own hand.
    fn wait(self, point: Point) {
        assert_eq!(self.0.wait(), libc::SIGKILL, "{point:?}");
    }

    fn kill(self) {
        self.0.kill();
        assert_eq!(self.0.wait(), libc::SIGKILL);
    }
}

/// A number that processes share.
fn shared_number(memory: &Memory) -> &AtomicU64 {
    // SAFETY: the page is mapped as long as the memory is there, and led to by such references alone.
    unsafe { &*memory.start().cast::<AtomicU64>() }
}

#[test]
fn no_change_and_no_fault_is_lost_wherever_a_handler_dies() {
    require!(FeatureFlags::EVENT_REMOVE);
    child::run_well(test_name!(), || {
        let (states, memory) = (States::new(), Memory::new(Kind::SharedAnonymous, 1));
        let fuse = shared_number(&memory);
        let mut monitor = Monitor::start(FeatureFlags::EVENT_REMOVE);
        let pid = monitor.pid();
        let mut handler = Handler::start(&states, || monitor.handoff(), Point::AfterKept, fuse);
        for place in [0, 1] {
            assert_eq!(monitor.has(READ, place), byte(place));
        }
        handler.kill();
        // Some pages were filled, others weren't.
        let steps = [
            (Point::AfterKept, REMOVE, 0),
            (Point::BeforeClear, REMOVE, 1),
            (Point::AfterKept, REMOVE, 2),
            (Point::BeforeClear, REMOVE, 3),
            (Point::AfterKept, READ, 4),
            (Point::BeforeClear, READ, 5),
            (Point::AfterRead, READ, 6),
            (Point::BeforeFill, READ, 7),
            (Point::AfterFill, READ, 8),
            // Zeros.
            (Point::AfterRead, READ, 0),
            (Point::AfterFill, READ, 2),
        ];
        for (point, command, place) in steps {
            handler = Handler::start(&states, || adopt(&states.0, pid).unwrap(), point, fuse);
            fuse.store(1, Ordering::Relaxed);
            monitor.ask(command, place);
            handler.wait(point);
            fuse.store(0, Ordering::Relaxed);
            handler = Handler::start(&states, || adopt(&states.0, pid).unwrap(), point, fuse);
            let expected = if command == REMOVE || place < 4 { 0 } else { byte(place) };
            assert_eq!(monitor.answer(), expected, "{command} of place {place} at {point:?}");
            handler.kill();
        }
        let _handler = Handler::start(&states, || adopt(&states.0, pid).unwrap(), Point::AfterKept, fuse);
        for place in 0..PLACES {
            assert_eq!(monitor.has(READ, place), if place < 4 { 0 } else { byte(place) }, "place {place}");
        }
    });
}

#[test]
fn memory_that_was_moved_or_unmapped_is_refused() {
    require!(FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP);
    let features = FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP;
    child::run_well(test_name!(), || {
        let memory = Memory::new(Kind::SharedAnonymous, 1);
        let fuse = shared_number(&memory);
        for (command, expected) in [(MOVE, "moved"), (UNMAP, "unmapped")] {
            for is_applied in [false, true] {
                let states = States::new();
                let mut monitor = Monitor::start(features);
                let handler = Handler::start(&states, || monitor.handoff(), Point::AfterKept, fuse);
                fuse.store(u64::from(!is_applied), Ordering::Relaxed);
                monitor.ask(command, 1);
                if is_applied {
                    monitor.answer();
                    handler.kill();
                } else {
                    handler.wait(Point::AfterKept);
                }
                fuse.store(0, Ordering::Relaxed);
                let refused = adopt(&states.0, monitor.pid()).unwrap_err();
                assert!(matches!(refused, AdoptError::Changed { .. }), "{refused:?}");
                assert!(refused.to_string().ends_with(expected), "{refused}");
                assert_eq!(left_behind(&states.0).unwrap(), [monitor.pid()]);
            }
        }
    });
}

#[test]
fn what_cannot_be_adopted_is_told_with_its_reason() {
    require!(FeatureFlags::EVENT_REMOVE);
    child::run_well(test_name!(), || {
        let (states, memory) = (States::new(), Memory::new(Kind::SharedAnonymous, 1));
        let mut monitor = Monitor::start(FeatureFlags::EVENT_REMOVE);
        let pid = monitor.pid();
        let refused = || adopt(&states.0, pid).unwrap_err();
        assert!(matches!(refused(), AdoptError::NotLeft { .. }));
        let fuse = shared_number(&memory);
        Handler::start(&states, || monitor.handoff(), Point::AfterKept, fuse).kill();

        // Each damaged in one place, and put right again.
        let file = File::options().read(true).write(true).open(states.file()).unwrap();
        for (place, reason) in [
            (0, "something else"),
            (8, "another version"),
            (16, "length"),
            (25, "length"),
            (32, "length"),
            (2 * page(), "expected value"),
        ] {
            let mut before = [0];
            file.read_exact_at(&mut before, place as u64).unwrap();
            file.write_all_at(&[before[0] ^ 0x55], place as u64).unwrap();
            let error = refused();
            assert!(matches!(error, AdoptError::File { .. }), "byte {place}: {error:?}");
            assert!(error.to_string().contains(reason), "byte {place}: {error}");
            file.write_all_at(&before, place as u64).unwrap();
        }
        // A mark of a later version.
        file.write_all_at(&[99], 12).unwrap();
        assert!(matches!(refused(), AdoptError::Changed { .. }));
        file.write_all_at(&[0], 12).unwrap();
        // The same process id, of a process that was started at another time.
        let mut kept = vec![0; page()];
        let len = file.read_at(&mut kept, 2 * page() as u64).unwrap();
        let started = kept[..len].windows(9).position(|bytes| bytes == b"\"started\"").unwrap() + 10;
        let digit = if kept[started] == b'1' { *b"2" } else { *b"1" };
        file.write_all_at(&digit, (2 * page() + started) as u64).unwrap();
        assert!(matches!(refused(), AdoptError::Ended { .. }));
        file.write_all_at(&kept[started..=started], (2 * page() + started) as u64).unwrap();

        // One that is adopted and not served waits for the next.
        let handoff = adopt(&states.0, pid).unwrap();
        assert!(matches!(refused(), AdoptError::Served { .. }));
        drop(handoff);
        let Parts { userfaultfd, .. } = adopt(&states.0, pid).unwrap().into_parts();
        monitor.has(CLOSE, 0);
        assert!(matches!(refused(), AdoptError::NoUserfaultfd { .. }));
        // Given, it is taken; else it is given back.
        let handoff = adopt_with(&states.0, pid, userfaultfd).unwrap();
        let pager = Pager::builder().state(&states.0).build().unwrap();
        let served = pager.serve(handoff, source).unwrap();
        assert_eq!(monitor.has(READ, 3), byte(3));
        let userfaultfd = served.detach().unwrap().into_parts().userfaultfd;
        let unadopted = adopt_with(&states.0, pid, userfaultfd).unwrap_err();
        assert!(matches!(unadopted.error, AdoptError::NotLeft { .. }));
        drop(monitor);
        assert!(matches!(refused(), AdoptError::NotLeft { .. }));
    });
}

#[test]
fn states_are_kept_in_memory_alone() {
    require!(FeatureFlags::EVENT_REMOVE);
    child::run_well(test_name!(), || {
        let on_disk = std::env::current_exe().unwrap().parent().unwrap().to_owned();
        let is_in_memory = sys::is_in_memory(File::open(&on_disk).unwrap().as_fd()).unwrap();
        let missing = on_disk.join("no such directory");
        for dir in [&on_disk, &missing].into_iter().skip(usize::from(is_in_memory)) {
            let monitor = Monitor::start(FeatureFlags::EVENT_REMOVE);
            let pager = Pager::builder().state(dir).build().unwrap();
            let unserved = pager.serve(monitor.handoff(), source).unwrap_err();
            assert!(matches!(unserved.error, crate::handoff::ServeError::State(_)), "{unserved}");
            let _alive = unserved.handoff.into_parts();
        }
    });
}
