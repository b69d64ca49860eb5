//! Descriptors that another process makes without knowing of it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::thread;

use userfaultfd::dirty::Options;
use userfaultfd::{DirtyTracker, Errno, FeatureFlags, Pid, Uffd, UffdBuilder};

use crate::support::memory::{Kind, Memory};
use crate::support::proc::wait_until;
use crate::support::{child, errno, page, require, seccomp, test_name};

const ROUNDS: usize = 20;

fn create_in(process: libc::pid_t) -> userfaultfd::Result<Uffd> {
    let mut builder = UffdBuilder::new();
    builder.close_on_exec(true).require_features(FeatureFlags::WP_ASYNC).create_in(Pid::from_raw(process))
}

/// A number that processes share.
fn shared(memory: &Memory) -> &AtomicU64 {
    // SAFETY: the page is mapped as long as the memory lives, is aligned, and is accessed as this alone.
    unsafe { &*memory.start().cast::<AtomicU64>() }
}

/// Where the handler counts. Set before the handler is.
static SIGNALS: AtomicPtr<AtomicU64> = AtomicPtr::new(ptr::null_mut());

extern "C" fn count(_: libc::c_int) {
    // SAFETY: it leads to a page that is mapped as long as this process lives.
    unsafe { &*SIGNALS.load(Ordering::Relaxed) }.fetch_add(1, Ordering::Relaxed);
}

/// Counts in its registers, and in memory, with a system call and signals now and then: what doesn't come back as it was ends it.
fn count_for_ever(memory: &Memory, steps: &AtomicU64) -> ! {
    let mut sum = 0.0_f64;
    for step in 0_u64.. {
        let page = (step % memory.pages() as u64) as usize;
        memory.write(page, step as u8);
        // SAFETY: touches no memory.
        let own = unsafe { libc::syscall(libc::SYS_getppid) };
        sum += 0.5;
        if own <= 0 || memory.read(page) != step as u8 || sum != (step + 1) as f64 / 2.0 {
            break;
        }
        steps.fetch_add(1, Ordering::Relaxed);
    }
    panic!("something was changed");
}

#[test]
fn process_at_work_goes_on_with_registers_and_signals() {
    require!(FeatureFlags::WP_ASYNC);
    child::run_well(test_name!(), || {
        let (memory, figures) = (Memory::anonymous(4), Memory::new(Kind::Memfd, 1));
        let signals_memory = Memory::new(Kind::Memfd, 1);
        let (steps, signals) = (shared(&figures), shared(&signals_memory));
        let process = child::fork(|| {
            SIGNALS.store(ptr::from_ref(signals).cast_mut(), Ordering::Relaxed);
            // SAFETY: the handler counts, and does nothing else.
            unsafe { libc::signal(libc::SIGUSR1, count as *const () as libc::sighandler_t) };
            count_for_ever(&memory, steps);
        });
        wait_until(|| steps.load(Ordering::Relaxed) > 0);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                for sent in 1.. {
                    // SAFETY: touches no memory; the child isn't waited for yet.
                    unsafe { libc::kill(process.pid(), libc::SIGUSR1) };
                    // One that is lost is waited for until the watchdog ends this.
                    wait_until(|| signals.load(Ordering::Relaxed) == sent);
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            for _ in 0..ROUNDS {
                let uffd = create_in(process.pid()).unwrap();
                let options = Options::new().descriptor(uffd).process(Pid::from_raw(process.pid()));
                let mut tracker = DirtyTracker::with(options).unwrap();
                let range = memory.start().addr()..memory.start().addr() + memory.len();
                tracker.track(range.clone()).unwrap();
                let before = steps.load(Ordering::Relaxed);
                wait_until(|| steps.load(Ordering::Relaxed) > before + 4);
                let written = tracker.take().map(|range| range.unwrap().len()).sum::<usize>();
                assert_eq!(written, 4 * page());
            }
            done.store(true, Ordering::Relaxed);
        });
        let before = steps.load(Ordering::Relaxed);
        wait_until(|| steps.load(Ordering::Relaxed) > before + 1000);
        process.kill();
    });
}

#[test]
fn process_that_waits_in_a_system_call_goes_on_waiting() {
    require!(FeatureFlags::WP_ASYNC);
    child::run_well(test_name!(), || {
        let (mut here, there) = UnixStream::pair().unwrap();
        let process = child::fork(|| {
            let mut byte = [0];
            loop {
                // Not `read_exact`, which would hide an interruption.
                // SAFETY: the kernel writes a byte, which is alive for the call.
                let read = unsafe {
                    libc::read(std::os::fd::AsRawFd::as_raw_fd(&there), byte.as_mut_ptr().cast(), 1)
                };
                assert_eq!(read, 1, "{}", std::io::Error::last_os_error());
                (&there).write_all(&byte).unwrap();
            }
        });
        let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", process.pid())).unwrap().count();
        let before = descriptors();
        for round in 0..ROUNDS as u8 {
            drop(create_in(process.pid()).unwrap());
            here.write_all(&[round]).unwrap();
            let mut byte = [0];
            here.read_exact(&mut byte).unwrap();
            assert_eq!(byte, [round]);
        }
        assert_eq!(descriptors(), before);
        process.kill();
    });
}

#[test]
fn processes_that_cannot_be_asked_have_an_errno() {
    require!(FeatureFlags::WP_ASYNC);
    child::run_well(test_name!(), || {
        assert_eq!(errno(create_in(std::process::id() as libc::pid_t)), Errno::EBUSY);
        let (mut here, there) = UnixStream::pair().unwrap();
        let filtered = child::fork(|| {
            assert!(seccomp::refuse_userfaultfd(Errno::EPERM));
            (&there).write_all(&[1]).unwrap();
            let _until_killed = (&there).read(&mut [0]);
        });
        here.read_exact(&mut [0]).unwrap();
        assert_eq!(errno(create_in(filtered.pid())), Errno::EACCES);
        let gone = filtered.pid();
        filtered.kill();
        filtered.wait();
        assert_eq!(errno(create_in(gone)), Errno::ESRCH);
    });
}
