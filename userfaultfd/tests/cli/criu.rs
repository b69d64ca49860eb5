//! `uffd criu-lazy-pages`, with CRIU itself: a program with threads that forks, unmaps, moves and drops memory as soon as it is restored.

use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::program::{Folder, Running, run};
use crate::support::mapping::Mapping;
use crate::support::proc::{thread_id, wait_until};
use crate::support::raw::check;
use crate::support::{child, has, is_root, page, require, test_name};

/// Where CRIU is: CI says it.
const CRIU: &str = "USERFAULTFD_TEST_CRIU";

/// The folder of the program that is checkpointed.
const FOLDER: &str = "USERFAULTFD_TEST_FOLDER";

const THREADS: usize = 4;

/// Pages of each piece of the program's memory.
const PAGES: usize = 256;

/// A piece of memory, of which each page holds a number.
struct Piece {
    mapping: Mapping,
    first: usize,
}

// SAFETY: threads access other pages each, or wait for each other.
unsafe impl Sync for Piece {}

impl Piece {
    fn new(first: usize) -> Self {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let piece = Self { mapping: Mapping::new(PAGES, rights, flags, None).unwrap(), first };
        (0..PAGES).for_each(|number| piece.write(number, first + number));
        piece
    }

    fn at(&self, number: usize) -> *mut usize {
        self.mapping.start.wrapping_byte_add(number * page()).cast()
    }

    fn write(&self, number: usize, value: usize) {
        // SAFETY: the page is mapped, and only this program's threads access it, each its own pages.
        unsafe { self.at(number).write_volatile(value) };
    }

    fn read(&self, number: usize) -> usize {
        // SAFETY: as above.
        unsafe { self.at(number).read_volatile() }
    }

    /// Checks some pages, in an order that isn't that of the addresses.
    fn check(&self, pages: std::ops::Range<usize>) {
        let len = pages.len();
        for step in 0..len {
            let number = pages.start + step * 7 % len;
            assert_eq!(self.read(number), self.first + number, "page {number}");
        }
    }
}

/// The program that is checkpointed: it waits for a signal with all its memory written, and is the one that is restored then.
fn program(folder: &Path) {
    let pieces: Vec<Piece> = (0..5).map(|number| Piece::new(1000 * (number + 1))).collect();
    let [read, dropped, unmapped, moved, forked] = &pieces[..] else { unreachable!() };
    // SAFETY: all zeros is a set of signals.
    let mut signals: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is borrowed for the call.
    unsafe { libc::sigaddset(&raw mut signals, libc::SIGUSR1) };
    // SAFETY: the set is borrowed for the call. Threads that are made later have it, too.
    check(unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut()) })
        .unwrap();
    let go = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for number in 0..THREADS {
            let go = &go;
            scope.spawn(move || {
                while go.load(Ordering::Acquire) == 0 {
                    std::thread::yield_now();
                }
                let each = PAGES / THREADS;
                read.check(number * each..(number + 1) * each);
                go.fetch_add(1, Ordering::AcqRel);
            });
        }
        let ready = folder.join("thread");
        fs::write(&ready, thread_id().to_string()).unwrap();
        fs::rename(ready, folder.join("ready")).unwrap();
        let mut signal = 0;
        // SAFETY: set and number are borrowed for the call.
        assert_eq!(unsafe { libc::sigwait(&raw const signals, &raw mut signal) }, 0);
        // Restored.
        go.store(1, Ordering::Release);
        change(dropped, unmapped, moved);
        fork(forked);
    });
    forked.check(1..PAGES);
    // Where pieces were moved away, others may be by now.
    std::mem::forget(pieces);
    fs::write(folder.join("right"), "").unwrap();
}

fn change(dropped: &Piece, unmapped: &Piece, moved: &Piece) {
    let half = PAGES / 2 * page();
    dropped.check(0..4);
    let at = |piece: &Piece| piece.mapping.start;
    // SAFETY: nothing refers to the pages, whose content is dropped.
    check(unsafe { libc::madvise(at(dropped), half, libc::MADV_DONTNEED) }).unwrap();
    assert!((0..PAGES / 2).all(|number| dropped.read(number) == 0));
    dropped.check(PAGES / 2..PAGES);
    // SAFETY: nothing refers to the second half, nor will.
    check(unsafe { libc::munmap(unmapped.at(PAGES / 2).cast(), half) }).unwrap();
    unmapped.check(0..PAGES / 2);
    // A place of its own, of which nothing else knows.
    let place = Mapping::new(PAGES, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None).unwrap();
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let len = PAGES * page();
    // SAFETY: nothing refers to either place.
    let there = unsafe { libc::mremap(at(moved), len, len, flags, place.start) };
    assert_eq!(there, place.start);
    let there = Piece { mapping: place, first: moved.first };
    there.check(0..PAGES);
}

/// A child has the memory of the moment, and a life of its own.
fn fork(piece: &Piece) {
    piece.write(0, 99);
    let child = child::fork(|| {
        assert_eq!(piece.read(0), 99);
        piece.check(1..PAGES);
        (0..PAGES).for_each(|number| piece.write(number, 7));
        assert!((0..PAGES).all(|number| piece.read(number) == 7));
    });
    child.succeed();
    assert_eq!(piece.read(0), 99);
}

fn criu(program: &str, arguments: &[&str], folder: &str) {
    let log = format!("{}.log", arguments[0]);
    let mut command = Command::new(program);
    command.args(arguments).args(["-D", folder, "-v4", "-o", &log]).stdin(Stdio::null());
    let output = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    let log = || fs::read_to_string(Path::new(folder).join(&log)).unwrap_or_default();
    assert!(output.success(), "criu {arguments:?}: {output}\n{}", log());
}

#[test]
fn restored_program_finds_its_memory_whatever_it_does() {
    require!();
    if child::stage().as_deref() == Some("criu") {
        return program(Path::new(&std::env::var_os(FOLDER).unwrap()));
    }
    let program = std::env::var(CRIU);
    if !has(test_name!(), "CRIU as root", program.is_ok() && is_root()) {
        return;
    }
    let program = program.unwrap();
    let folder = Folder::new(test_name!());
    let images = folder.path("images");
    fs::create_dir(&images).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test_name!(), "--exact", "--test-threads=1"]).env(FOLDER, folder.path(""));
    command
        .env("USERFAULTFD_TEST_STAGE", "criu")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let begin_session = || {
        // SAFETY: touches no memory.
        let session = unsafe { libc::setsid() };
        check(session).map(drop).map_err(Into::into)
    };
    // SAFETY: the closure makes a system call, and neither allocates nor locks.
    unsafe { command.pre_exec(begin_session) };
    let mut checkpointed = command.spawn().unwrap();
    let pid = checkpointed.id();
    wait_until(|| Path::new(&folder.path("ready")).exists());
    criu(&program, &["dump", "-t", &pid.to_string()], &images);
    // CRIU has ended it.
    assert_eq!(checkpointed.wait().unwrap().signal(), Some(libc::SIGKILL));
    let mut server = Running::start(&["criu-lazy-pages", "-D", &images]);
    assert!(server.line().starts_with("waiting for criu restore"));
    criu(&program, &["restore", "--lazy-pages", "-d"], &images);
    // The thread that waits for it: others would end the process.
    let thread: libc::pid_t = fs::read_to_string(folder.path("ready")).unwrap().parse().unwrap();
    // SAFETY: touches no memory. The process was restored with these numbers.
    check(unsafe { libc::syscall(libc::SYS_tgkill, pid, thread, libc::SIGUSR1) }).unwrap();
    let said = server.end();
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(
        said.err.contains(&format!("process {pid}: served")) && said.err.contains("complete: "),
        "{said:?}"
    );
    wait_until(|| !Path::new(&format!("/proc/{pid}/exe")).exists());
    assert!(Path::new(&folder.path("right")).exists(), "the program has failed: {said:?}");
}

#[test]
fn program_ends_at_a_signal_while_nothing_has_come() {
    require!();
    let folder = Folder::new(test_name!());
    let server = {
        let mut server = Running::start(&["criu-lazy-pages", "-D", &folder.path("")]);
        server.line();
        server
    };
    server.signal(libc::SIGTERM);
    let said = server.end();
    assert!(said.code == Some(0) && said.out.is_empty(), "{said:?}");
    assert!(!Path::new(&folder.path("lazy-pages.socket")).exists());
    let said = run(&["criu-lazy-pages", "-D", &folder.path("nothing")]);
    assert!(said.code == Some(1) && said.err.contains("lazy-pages.socket"), "{said:?}");
}
