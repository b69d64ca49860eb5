//! Signals that hit readers and waiters, and faults that are signals.

use std::ffi::c_void;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use userfaultfd::{Errno, Event, EventBuffer, FeatureFlags, RegisterMode, Uffd, UffdBuilder};

use crate::support::fault::{assert_silent, during};
use crate::support::handler::{Fault, fill, kernel_write, zero};
use crate::support::memory::Memory;
use crate::support::proc::{self, wait_until, wait_until_in};
use crate::support::raw::{check, wait_for_event};
use crate::support::signal::{self, counted};
use crate::support::{self, child, require, test_name, uffd};

const SIGNAL: libc::c_int = libc::SIGUSR1;

/// Runs `read` in a thread of its own and sends a signal there each time that it sleeps in read(2), `times`
/// times; runs `end` when it sleeps there once more. Returns what `read` returns.
fn interrupt<T: Send>(read: impl FnOnce() -> T + Send, times: usize, end: impl FnOnce()) -> T {
    let (sender, threads) = mpsc::channel();
    thread::scope(|scope| {
        let reader = scope.spawn(move || {
            sender.send(proc::thread_id()).unwrap();
            read()
        });
        let thread = threads.recv().unwrap();
        let before = counted();
        for signals in 1..=times {
            wait_until_in(thread, libc::SYS_read);
            signal::send(thread, SIGNAL);
            wait_until(|| counted() == before + signals);
        }
        end();
        reader.join().unwrap()
    })
}

#[test]
fn blocking_read_goes_on_after_signals() {
    require!();
    child::run_well(test_name!(), || {
        signal::count(SIGNAL);
        let uffd = UffdBuilder::new().create().unwrap();
        let memory = Memory::anonymous(1);
        uffd.register(memory.start(), memory.len()).unwrap();

        // Such a signal interrupts a read.
        let bare = || {
            let mut message = [0u8; 32];
            // SAFETY: the kernel writes at most as many bytes as the array has.
            check(unsafe { libc::read(uffd.as_raw_fd(), message.as_mut_ptr().cast(), 32) } as i64)
        };
        assert_eq!(interrupt(bare, 1, || ()), Err(Errno::EINTR));

        thread::scope(|scope| {
            let event = interrupt(
                || uffd.read_event(),
                3,
                || {
                    scope.spawn(|| memory.read(0));
                },
            );
            assert_eq!(Fault::of(event.unwrap().unwrap()).addr, memory.start().addr());
            uffd.wake(memory.start(), memory.len()).unwrap();
            // The fault comes again.
            let mut buffer = EventBuffer::new(4);
            assert_eq!(interrupt(|| uffd.read_batch(&mut buffer).unwrap(), 0, || ()), 1);
            let mut more = EventBuffer::new(4);
            let end = || uffd.wake(memory.start(), memory.len()).unwrap();
            assert_eq!(interrupt(|| uffd.read_batch(&mut more).unwrap(), 3, end), 1);
            zero(&uffd, &memory, 0, 1);
        });
    });
}

#[test]
fn waiting_thread_faults_again_after_signal() {
    require!(FeatureFlags::THREAD_ID);
    child::run_well(test_name!(), || {
        signal::count(SIGNAL);
        let uffd = uffd(FeatureFlags::THREAD_ID);
        let memory = Memory::anonymous(1);
        uffd.register(memory.start(), memory.len()).unwrap();
        let read = during(
            &uffd,
            &memory,
            || memory.read(0),
            |faults| {
                let first = faults.next();
                for signals in 1..=3 {
                    wait_until(|| faults.undisturbed(|| ()));
                    assert!(!faults.undisturbed(|| {
                        signal::send(first.thread, SIGNAL);
                        wait_until(|| counted() == signals);
                    }));
                    // It comes out of the signal's handler.
                    assert_eq!((faults.next(), counted()), (first, signals));
                }
                fill(&uffd, &memory, 0, 7);
            },
        );
        assert_eq!(read, 7);
    });
}

#[test]
fn system_call_waiting_for_page_survives_signal() {
    require!(FeatureFlags::THREAD_ID, root);
    if !support::has(test_name!(), "CAP_SYS_PTRACE", support::may_watch_forks()) {
        return;
    }
    child::run_well(test_name!(), || {
        signal::count(SIGNAL);
        let mut builder = UffdBuilder::new();
        builder.user_mode_only(false).non_blocking(true).require_features(FeatureFlags::THREAD_ID);
        let uffd = builder.create().unwrap();
        let memory = Memory::anonymous(1);
        uffd.register(memory.start(), memory.len()).unwrap();
        let written = during(
            &uffd,
            &memory,
            || kernel_write(&memory, 0, 7),
            |faults| {
                let first = faults.next();
                signal::send(first.thread, SIGNAL);
                // It spins, and tells again and again; the handler runs when the system call is done.
                assert_eq!((faults.next(), counted()), (first, 0));
                zero(&uffd, &memory, 0, 1);
            },
        );
        assert_eq!((written, counted(), memory.read(0)), (Ok(()), 1, 7));
    });
}

/// What the handler of SIGBUS resolves faults with.
static UFFD: OnceLock<Uffd> = OnceLock::new();
/// Where the last fault was, and its code.
static FAULT: (AtomicUsize, AtomicI32) = (AtomicUsize::new(0), AtomicI32::new(0));

/// Resolves a missing or a write-protect fault in the thread that runs into it.
extern "C" fn resolve(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a pointer to what is valid while the handler runs.
    let info = unsafe { &*info };
    // SAFETY: a SIGBUS of a fault has the address.
    let addr = unsafe { info.si_addr() };
    FAULT.0.store(addr.addr(), Ordering::SeqCst);
    FAULT.1.store(info.si_code, Ordering::SeqCst);
    let uffd = UFFD.get().expect("set before any fault");
    let page = addr.map_addr(|addr| addr & !(support::page() - 1));
    // SAFETY: the memory is only accessed by raw pointers.
    if unsafe { uffd.zeropage(page, support::page(), false) }.is_err() {
        uffd.remove_write_protection(page, support::page(), false).unwrap();
    }
}

/// Where the processor says that an access was.
fn told(address: *mut u8) -> usize {
    // s390x tells the page only.
    if cfg!(target_arch = "s390x") { address.addr() & !(support::page() - 1) } else { address.addr() }
}

#[test]
fn sigbus_feature_raises_sigbus_with_address() {
    require!(FeatureFlags::SIGBUS);
    child::run_well(test_name!(), || {
        signal::handle(libc::SIGBUS, resolve);
        let memory = Memory::anonymous(2);
        let uffd = UFFD.get_or_init(|| uffd(FeatureFlags::SIGBUS));
        let protects = support::features().contains(FeatureFlags::PAGEFAULT_FLAG_WP);
        let modes = if protects { RegisterMode::WRITE_PROTECT } else { RegisterMode::empty() };
        uffd.register_with_mode(memory.start(), memory.len(), RegisterMode::MISSING | modes).unwrap();

        let byte = memory.at(0).cast::<u8>().wrapping_add(100);
        // SAFETY: inside the mapping, which is only accessed by raw pointers.
        assert_eq!(unsafe { byte.read_volatile() }, 0);
        assert_eq!(FAULT.0.swap(0, Ordering::SeqCst), told(byte));
        assert_eq!(FAULT.1.load(Ordering::SeqCst), libc::BUS_ADRERR);

        if protects {
            uffd.write_protect(memory.start(), memory.page()).unwrap();
            // SAFETY: as above.
            unsafe { byte.write_volatile(7) };
            assert_eq!(FAULT.0.swap(0, Ordering::SeqCst), told(byte));
            assert_eq!(memory.read(0), 0);
        }

        // A system call fails instead.
        assert_eq!(memory.read_by_kernel(1), Err(Errno::EFAULT));
        assert_eq!(FAULT.0.load(Ordering::SeqCst), 0);
        assert_silent(uffd);
    });
}

#[test]
fn sigbus_feature_still_reports_changes() {
    require!(FeatureFlags::SIGBUS | FeatureFlags::EVENT_REMOVE);
    let memory = Memory::anonymous(1);
    let uffd = uffd(FeatureFlags::SIGBUS | FeatureFlags::EVENT_REMOVE);
    uffd.register(memory.start(), memory.len()).unwrap();
    fill(&uffd, &memory, 0, 7);
    thread::scope(|scope| {
        let remover = scope.spawn(|| memory.advise(0, 1, libc::MADV_DONTNEED));
        wait_for_event(&uffd);
        assert!(matches!(uffd.read_event(), Ok(Some(Event::Remove { .. }))));
        remover.join().unwrap().unwrap();
    });
}
