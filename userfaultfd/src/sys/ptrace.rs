//! ptrace(2), as far as a system call in another process needs it, and what such a call leaves behind. x86-64.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::own;
use crate::Errno;

/// `PTRACE_O_TRACESYSGOOD`: stops at system calls are told from signals.
const TELL_SYSTEM_CALLS: libc::c_long = 1;

/// The kernel's numbers, of which some C libraries have not all.
const SYSCALL: libc::c_long = 24;
const CONT: libc::c_long = 7;
const GET_REGISTERS: libc::c_long = 12;
const SET_REGISTERS: libc::c_long = 13;
const DETACH: libc::c_long = 17;
const SEIZE: libc::c_long = 0x4206;
const INTERRUPT: libc::c_long = 0x4207;
const GET_SIGNAL_MASK: libc::c_long = 0x420a;
const SET_SIGNAL_MASK: libc::c_long = 0x420b;

/// Bytes of the kernel's set of signals.
const MASK_BYTES: libc::c_long = 8;

/// A request that touches no memory of this process.
fn request(request: libc::c_long, process: libc::pid_t, data: libc::c_long) -> Result<(), Errno> {
    // SAFETY: callers pass requests of which `data` is a number.
    match unsafe { libc::syscall(libc::SYS_ptrace, request, process, 0, data) } {
        -1 => Err(Errno::last()),
        _ => Ok(()),
    }
}

pub(crate) fn seize(process: libc::pid_t) -> Result<(), Errno> {
    request(SEIZE, process, TELL_SYSTEM_CALLS)
}

pub(crate) fn interrupt(process: libc::pid_t) -> Result<(), Errno> {
    request(INTERRUPT, process, 0)
}

/// Lets it go on, with a signal unless that is 0.
pub(crate) fn go_on(process: libc::pid_t, signal: libc::c_int) -> Result<(), Errno> {
    request(CONT, process, signal.into())
}

/// The same, until it begins or ends a system call.
pub(crate) fn go_on_to_system_call(process: libc::pid_t, signal: libc::c_int) -> Result<(), Errno> {
    request(SYSCALL, process, signal.into())
}

pub(crate) fn detach(process: libc::pid_t) -> Result<(), Errno> {
    request(DETACH, process, 0)
}

pub(crate) fn registers(process: libc::pid_t) -> Result<libc::user_regs_struct, Errno> {
    // SAFETY: all zeros are registers.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    let to = &raw mut registers;
    // SAFETY: the kernel writes the structure, which is alive for the call.
    match unsafe { libc::syscall(libc::SYS_ptrace, GET_REGISTERS, process, 0, to) } {
        -1 => Err(Errno::last()),
        _ => Ok(registers),
    }
}

pub(crate) fn set_registers(process: libc::pid_t, registers: &libc::user_regs_struct) -> Result<(), Errno> {
    let from = std::ptr::from_ref(registers);
    // SAFETY: the kernel reads the structure, which is borrowed for the call.
    match unsafe { libc::syscall(libc::SYS_ptrace, SET_REGISTERS, process, 0, from) } {
        -1 => Err(Errno::last()),
        _ => Ok(()),
    }
}

pub(crate) fn signal_mask(process: libc::pid_t) -> Result<u64, Errno> {
    let mut mask = 0_u64;
    let to = &raw mut mask;
    // SAFETY: the kernel writes eight bytes, as it is told, to what is alive for the call.
    match unsafe { libc::syscall(libc::SYS_ptrace, GET_SIGNAL_MASK, process, MASK_BYTES, to) } {
        -1 => Err(Errno::last()),
        _ => Ok(mask),
    }
}

pub(crate) fn set_signal_mask(process: libc::pid_t, mask: u64) -> Result<(), Errno> {
    let from = &raw const mask;
    // SAFETY: the kernel reads eight bytes, as it is told, of what is alive for the call.
    match unsafe { libc::syscall(libc::SYS_ptrace, SET_SIGNAL_MASK, process, MASK_BYTES, from) } {
        -1 => Err(Errno::last()),
        _ => Ok(()),
    }
}

/// How a process stopped or ended, as wait(2) says it, or `None`: it runs.
pub(crate) fn stopped(process: libc::pid_t) -> Result<Option<libc::c_int>, Errno> {
    let mut status = 0;
    // SAFETY: the kernel writes the status, which is alive for the call.
    match unsafe { libc::waitpid(process, &mut status, libc::__WALL | libc::WNOHANG) } {
        -1 => Err(Errno::last()),
        0 => Ok(None),
        _ => Ok(Some(status)),
    }
}

/// pidfd_open(2).
pub(crate) fn open_pidfd(process: libc::pid_t) -> Result<OwnedFd, Errno> {
    // SAFETY: the system call takes two integers.
    match unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) } {
        -1 => Err(Errno::last()),
        // SAFETY: the kernel has opened it for this call, so nothing else owns it.
        fd => Ok(unsafe { own(fd as RawFd) }),
    }
}

/// pidfd_getfd(2): a duplicate of a descriptor of another process.
pub(crate) fn take_descriptor(pidfd: BorrowedFd<'_>, number: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: the system call takes three integers.
    match unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) } {
        -1 => Err(Errno::last()),
        // SAFETY: the kernel has opened it for this call, so nothing else owns it.
        fd => Ok(unsafe { own(fd as RawFd) }),
    }
}
