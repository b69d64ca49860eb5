//! Waiting: for other threads, for descriptors, for a time.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use super::{check, own};
use crate::Errno;

/// Waits until a number isn't this one, or a wake; or for no reason. Async-signal-safe.
pub(crate) fn futex_wait(number: &AtomicU32, expected: u32) {
    let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    let forever = std::ptr::null::<libc::timespec>();
    // SAFETY: the kernel reads the number, which is borrowed for the call.
    unsafe { libc::syscall(libc::SYS_futex, number.as_ptr(), operation, expected, forever) };
}

/// Wakes one thread that waits for a number to change. Async-signal-safe.
pub(crate) fn futex_wake(number: &AtomicU32) {
    let operation = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the address is a key; no memory is touched.
    unsafe { libc::syscall(libc::SYS_futex, number.as_ptr(), operation, 1) };
}

/// Waits until a number isn't this one, a wake, or the end of `timeout`, which is less than a second; or for no reason.
/// The number may lie in a file that other processes have mapped.
pub(crate) fn futex_wait_shared(number: &AtomicU32, expected: u32, timeout: Duration) {
    // What this system call takes, whatever the C library's structure is.
    let time: [libc::c_long; 2] = [0, timeout.subsec_nanos() as libc::c_long];
    // SAFETY: the kernel reads the number and the time, which are borrowed for the call.
    unsafe { libc::syscall(libc::SYS_futex, number.as_ptr(), libc::FUTEX_WAIT, expected, time.as_ptr()) };
}

/// Wakes all threads, of all processes, that wait for a number by [`futex_wait_shared`].
pub(crate) fn futex_wake_shared(number: &AtomicU32) {
    // SAFETY: the address is a key; no memory is touched.
    unsafe { libc::syscall(libc::SYS_futex, number.as_ptr(), libc::FUTEX_WAKE, libc::c_int::MAX) };
}

/// Waiting for another thread by looking again and again: at once at first, then after sleeping for ever longer, so that
/// a thread with a lower priority gets the CPU.
#[derive(Debug)]
pub(crate) struct Pause(u32);

impl Pause {
    /// Number of looks before the first rest.
    const SPINS: u32 = 100;
    /// Then it sleeps for 20 µs, twice as long each time, up to 1.28 ms.
    const SHORTEST: libc::c_long = 20_000;
    const DOUBLINGS: u32 = 6;

    pub(crate) fn new() -> Self {
        Self(0)
    }

    /// Lets some time pass. Async-signal-safe, and no point at which a thread is cancelled.
    pub(crate) fn rest(&mut self) {
        match self.0.checked_sub(Self::SPINS) {
            None => std::hint::spin_loop(),
            Some(sleeps) => sleep(Self::SHORTEST << sleeps.min(Self::DOUBLINGS)),
        }
        self.0 = self.0.saturating_add(1);
    }

    /// Sleeps for as long as [`rest`](Self::rest) does in the end. Async-signal-safe.
    pub(crate) fn long() {
        sleep(Self::SHORTEST << Self::DOUBLINGS);
    }
}

/// Sleeps for `nanos` nanoseconds, less than a second, or until a signal comes. Not by the C library's function, where
/// a thread may be cancelled.
fn sleep(nanos: libc::c_long) {
    // What this system call takes, whatever the C library's structure is.
    let time: [libc::c_long; 2] = [0, nanos];
    // SAFETY: the kernel reads the two numbers, which are borrowed for the call.
    unsafe { libc::syscall(libc::SYS_nanosleep, time.as_ptr(), std::ptr::null_mut::<libc::c_long>()) };
}

/// Waits until one of the descriptors can be read, through signals, or until `timeout` milliseconds are over; -1 is without end.
/// Tells which can be.
pub(crate) fn wait_readable<const N: usize>(
    fds: [BorrowedFd<'_>; N],
    timeout: libc::c_int,
) -> Result<[bool; N], Errno> {
    let mut polled = fds.map(|fd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 });
    loop {
        // SAFETY: the kernel writes to as many structures as are borrowed for the call.
        match check(unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout) }) {
            Ok(_) => return Ok(polled.map(|polled| polled.revents != 0)),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Whether something can be read. Of an epoll instance: whether it has events, none of which is taken.
pub(crate) fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut polled = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: the kernel writes to the structure, which is borrowed for the call.
    let ready = unsafe { libc::poll(&raw mut polled, 1, 0) };
    ready == 1 && polled.revents & libc::POLLIN != 0
}

/// An epoll(7) instance.
pub(crate) fn epoll() -> Result<OwnedFd, Errno> {
    // SAFETY: touches no memory.
    let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
    // SAFETY: the kernel made the descriptor for this call, so nothing else owns it.
    Ok(unsafe { own(fd) })
}

/// epoll_ctl(2). `operation`: EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL.
pub(crate) fn epoll_control(
    epoll: BorrowedFd<'_>,
    operation: libc::c_int,
    fd: BorrowedFd<'_>,
    events: libc::c_int,
    token: u64,
) -> Result<(), Errno> {
    let mut event = libc::epoll_event { events: events as u32, u64: token };
    // SAFETY: the kernel reads the structure, which is borrowed for the call.
    check(unsafe { libc::epoll_ctl(epoll.as_raw_fd(), operation, fd.as_raw_fd(), &raw mut event) }).map(drop)
}

/// epoll_wait(2), for `timeout` milliseconds at most, or for ever with -1. Returns how many events there are; none if a
/// signal came.
pub(crate) fn epoll_wait(
    epoll: BorrowedFd<'_>,
    events: &mut [libc::epoll_event],
    timeout: libc::c_int,
) -> Result<usize, Errno> {
    let room = libc::c_int::try_from(events.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: the kernel writes at most `room` structures, of which `events`, borrowed for the call, has that many.
    let ready = unsafe { libc::epoll_wait(epoll.as_raw_fd(), events.as_mut_ptr(), room, timeout) };
    match check(ready) {
        Err(Errno::EINTR) => Ok(0),
        ready => ready.map(|ready| ready as usize),
    }
}

/// An eventfd(2) whose counter is 0, or 1 from the start.
pub(crate) fn eventfd(initially: bool) -> Result<OwnedFd, Errno> {
    // SAFETY: touches no memory.
    let fd = unsafe { libc::eventfd(initially.into(), libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    let fd = check(fd)?;
    // SAFETY: the kernel made the descriptor for this call, so nothing else owns it.
    Ok(unsafe { own(fd) })
}

/// A timerfd(2) that isn't armed.
pub(crate) fn timer() -> Result<OwnedFd, Errno> {
    // SAFETY: touches no memory.
    let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) };
    let fd = check(fd)?;
    // SAFETY: the kernel made the descriptor for this call, so nothing else owns it.
    Ok(unsafe { own(fd) })
}

/// Arms a timerfd(2) to expire once, in so much time; with `None` it is disarmed.
pub(crate) fn set_timer(timer: BorrowedFd<'_>, rest: Option<Duration>) {
    let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // Zero would disarm it.
    let rest = rest.map(|rest| rest.max(Duration::from_nanos(1)));
    let value = rest.map_or(zero, |rest| libc::timespec {
        tv_sec: libc::time_t::try_from(rest.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: rest.subsec_nanos() as _,
    });
    let new = libc::itimerspec { it_interval: zero, it_value: value };
    // SAFETY: the kernel reads the structure, which is borrowed for the call.
    let set =
        check(unsafe { libc::timerfd_settime(timer.as_raw_fd(), 0, &raw const new, std::ptr::null_mut()) });
    debug_assert!(set.is_ok(), "{set:?}");
}

/// Makes an eventfd readable.
pub(crate) fn ring(eventfd: BorrowedFd<'_>) {
    let one = 1_u64;
    // SAFETY: the kernel reads the number, which is borrowed for the call.
    let written = unsafe { libc::write(eventfd.as_raw_fd(), (&raw const one).cast(), size_of::<u64>()) };
    // It is full, and so readable, after 2^64 - 2 of them.
    debug_assert!(written == 8 || Errno::last() == Errno::EAGAIN);
}
