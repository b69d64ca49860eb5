//! ptrace(2), as far as a system call in another process needs it, and what such a call leaves behind. x86-64.

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
const GET_SIGNAL_INFO: libc::c_long = 0x4202;
const GET_RSEQ_CONFIGURATION: libc::c_long = 0x420f;
const GET_SYSCALL_USER_DISPATCH: libc::c_long = 0x4211;

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

/// The signal of a stop and its `si_code`. `ESRCH`: it isn't stopped.
pub(crate) fn stop_info(process: libc::pid_t) -> Result<(libc::c_int, libc::c_int), Errno> {
    // SAFETY: all zeros are information of no signal.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let to = &raw mut info;
    // SAFETY: the kernel writes the structure, which is alive for the call.
    match unsafe { libc::syscall(libc::SYS_ptrace, GET_SIGNAL_INFO, process, 0, to) } {
        -1 => Err(Errno::last()),
        _ => Ok((info.si_signo, info.si_code)),
    }
}

/// A request that fills words, of which the kernel says how many bytes it has. `None`: it doesn't know the request.
fn words<const N: usize>(request: libc::c_long, process: libc::pid_t) -> Result<Option<[u64; N]>, Errno> {
    let mut words = [0_u64; N];
    let to = &raw mut words;
    // SAFETY: the kernel writes to the words, alive for the call, no more bytes than it is told.
    match unsafe { libc::syscall(libc::SYS_ptrace, request, process, size_of::<[u64; N]>(), to) } {
        -1 => match Errno::last() {
            Errno::EIO | Errno::EINVAL => Ok(None),
            errno => Err(errno),
        },
        _ => Ok(Some(words)),
    }
}

/// Where a thread's structure for rseq(2) lies, and the signature before the places where sequences are aborted. `None`: it has none,
/// or the kernel doesn't tell it (before Linux 5.13).
pub(crate) fn restartable_sequences(process: libc::pid_t) -> Result<Option<(u64, u32)>, Errno> {
    // An address; two numbers of 32 bits, of which the second is the signature; flags.
    let found = words::<3>(GET_RSEQ_CONFIGURATION, process)?;
    Ok(found.filter(|[address, ..]| *address != 0).map(|[address, sizes, _]| (address, (sizes >> 32) as u32)))
}

/// Whether a thread has its own system calls be signals: `PR_SET_SYSCALL_USER_DISPATCH`. Linux before 6.4 doesn't tell it.
pub(crate) fn dispatches_system_calls(process: libc::pid_t) -> Result<bool, Errno> {
    // The mode first, of which 0 is off.
    Ok(words::<4>(GET_SYSCALL_USER_DISPATCH, process)?.is_some_and(|[mode, ..]| mode != 0))
}
