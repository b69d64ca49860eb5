//! [`UffdBuilder::create_in`]: a userfaultfd that is made in another process.

use std::fmt;

use crate::{Errno, Error, Pid, Result, Uffd, UffdBuilder};

/// Why a process can't be made to create a userfaultfd. `Display` says it with what helps.
///
/// From [`Error::NotCreatedIn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CreateInRefusal {
    /// The process is this one: [`create`](UffdBuilder::create) makes its userfaultfd.
    ThisProcess,
    /// There is no such process, or it has ended meanwhile.
    Ended,
    /// This process may not trace the other one, or not read its files in `/proc`.
    NotPermitted,
    /// The process has a seccomp filter, which might end it for the system call. It makes none.
    SeccompFilter,
    /// The process dispatches its own system calls (`PR_SET_SYSCALL_USER_DISPATCH`), and would get the call as a signal.
    SyscallUserDispatch,
    /// The main thread of the process didn't stop within three seconds: it waits in the kernel.
    NotStopped,
    /// The process is a 32-bit one, or has no vDSO.
    NoSystemCall,
    /// This library can't do it on this architecture: only on x86-64.
    Architecture,
    /// The process itself was refused a userfaultfd, by userfaultfd(2).
    RefusedThere,
    /// Another system call failed.
    Other,
}

impl CreateInRefusal {
    fn as_str(self) -> &'static str {
        match self {
            Self::ThisProcess => "it is this process: use create",
            Self::Ended => "there is no such process, or it has ended",
            Self::NotPermitted => {
                "this process may not trace it: be its user or the superuser, with no other tracer (a debugger, strace) of \
                 it; where kernel.yama.ptrace_scope is 1 or more, CAP_SYS_PTRACE is needed"
            }
            Self::SeccompFilter => {
                "it has a filter of system calls (seccomp), which might end it: start it without the filter"
            }
            Self::SyscallUserDispatch => {
                "it dispatches its own system calls (PR_SET_SYSCALL_USER_DISPATCH), as emulators of other systems do"
            }
            Self::NotStopped => {
                "its main thread didn't stop within three seconds, since it waits in the kernel (for a disk, for example): \
                 try again"
            }
            Self::NoSystemCall => {
                "it is a 32-bit process, or has no vDSO: only 64-bit processes can be asked"
            }
            Self::Architecture => "this takes x86-64",
            Self::RefusedThere => {
                "its user may not make a userfaultfd that handles faults of the kernel: user_mode_only(true), the sysctl \
                 vm.unprivileged_userfaultfd=1, or CAP_SYS_PTRACE for the process helps"
            }
            Self::Other => "a system call failed",
        }
    }
}

impl fmt::Display for CreateInRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A refusal with its errno.
#[derive(Debug, PartialEq, Eq)]
struct Refused(CreateInRefusal, Errno);

impl From<Errno> for Refused {
    /// What the errno of most calls means: those of ptrace(2), of pidfd_open(2), and of `/proc`.
    fn from(errno: Errno) -> Self {
        let refusal = match errno {
            Errno::ESRCH | Errno::ENOENT => CreateInRefusal::Ended,
            Errno::EPERM | Errno::EACCES => CreateInRefusal::NotPermitted,
            Errno::ETIMEDOUT => CreateInRefusal::NotStopped,
            _ => CreateInRefusal::Other,
        };
        Self(refusal, errno)
    }
}

impl UffdBuilder {
    /// Creates a userfaultfd for the memory of another process, which need not know of it: for a
    /// [`DirtyTracker`](crate::DirtyTracker) or a [`Snapshot`](crate::Snapshot) of its memory, for example.
    ///
    /// A userfaultfd belongs to the process that makes it. So this stops the process's main thread by ptrace(2), has it make the two
    /// system calls userfaultfd(2) and close(2), takes the descriptor with pidfd_getfd(2), and lets the thread go on where it was. No
    /// byte of the process's memory is changed: the calls are made by an instruction of its vDSO. The process is stopped for
    /// less than a millisecond.
    ///
    /// A system call that the thread waits in goes on afterwards, but for those that a stop always ends with `EINTR`, such as
    /// epoll_wait(2): signal(7) lists them. A restartable sequence (rseq(2)) begins anew. If this process is killed while the other one
    /// is stopped, that goes on in the middle of a call, and will crash.
    ///
    /// For a child of this process, no other thread should be in wait(2) for it meanwhile: it may be told of the stop.
    ///
    /// Closing the descriptor ends what was done with it. A child that the process forks, and a program that it executes, aren't
    /// part of it.
    ///
    /// Since Linux 5.6; on x86-64, for 64-bit processes.
    ///
    /// # Errors
    ///
    /// [`NotCreatedIn`](Error::NotCreatedIn), with the reason and one of these errnos:
    ///
    /// - `EPERM`: this process may not trace the other one (another user's, without `CAP_SYS_PTRACE`; `kernel.yama.ptrace_scope`;
    ///   another tracer), or the other one may not make a userfaultfd.
    /// - `ESRCH`: there is no such process, or it has ended meanwhile.
    /// - `EACCES`: the process has a seccomp filter, or dispatches its own system calls (`PR_SET_SYSCALL_USER_DISPATCH`), which might
    ///   end it for the system call. It makes none. Or its files in `/proc` can't be read.
    /// - `EBUSY`: this is the process itself.
    /// - `ETIMEDOUT`: its main thread didn't stop within three seconds: it waits in the kernel, for a disk for example.
    /// - `ENOSYS`: not on this architecture, or the process is a 32-bit one, or has no vDSO.
    ///
    /// Otherwise those of [`create`](Self::create) about features.
    #[doc(alias = "ptrace")]
    pub fn create_in(&self, process: Pid) -> Result<Uffd> {
        let refused = |Refused(refusal, errno)| Error::NotCreatedIn { process, errno, refusal };
        if process == Pid::this() {
            return Err(refused(Refused(CreateInRefusal::ThisProcess, Errno::EBUSY)));
        }
        let flags = self.creation_flags();
        // A thread of its own: whatever it traces still when it ends, the kernel lets go.
        let made = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("create userfaultfd".into());
            let made = thread
                .spawn_scoped(scope, || make(process.as_raw(), flags))
                .map_err(|_| Refused::from(Errno::EAGAIN))?;
            made.join().unwrap_or(Err(Errno::EIO.into()))
        });
        let made = made.map_err(refused)?;
        let mut uffd = self.handshake(made)?;
        uffd.set_process(process);
        Ok(uffd)
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn make(_: i32, _: libc::c_int) -> Result<std::os::fd::OwnedFd, Refused> {
    Err(Refused(CreateInRefusal::Architecture, Errno::ENOSYS))
}

#[cfg(target_arch = "x86_64")]
use x86_64::make;

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::fs::{self, File};
    use std::io;
    use std::os::fd::{AsFd, OwnedFd, RawFd};
    use std::os::unix::fs::FileExt;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::{CreateInRefusal, Refused};
    use crate::Errno;
    use crate::error::errno_of;
    use crate::sys::{self, ptrace};

    /// How long a thread may take to stop.
    const PATIENCE: Duration = Duration::from_secs(3);

    /// How often it is looked.
    const LOOK_INTERVAL: Duration = Duration::from_micros(50);

    /// The instruction `syscall`.
    const SYSTEM_CALL: [u8; 2] = [0x0f, 0x05];

    /// The code segment of 64-bit programs.
    const SEGMENT_64: u64 = 0x33;

    /// The entry of a process's auxiliary vector that has the address of its vDSO, and bytes of that to look at: more than it has.
    const AT_SYSINFO_EHDR: u64 = 33;
    const VDSO_BYTES: usize = 16 << 10;

    /// What the `si_code` of a stop is: of a system call, and of a stop by [`ptrace::interrupt`], in its upper bits.
    const AT_SYSTEM_CALL: i32 = libc::SIGTRAP | 0x80;
    const STOP_EVENT: i32 = 128;

    pub(super) fn make(process: libc::pid_t, flags: libc::c_int) -> Result<OwnedFd, Refused> {
        // First: as long as its process lives, the number is that process's.
        let pidfd = sys::process::open_pidfd(process)?;
        check_filter(process)?;
        if let Err(errno) = ptrace::seize(process) {
            return Err(if sys::is_readable(pidfd.as_fd()) { Errno::ESRCH } else { errno }.into());
        }
        let stopped = Stopped::new(process, pidfd)?;
        // A program that it executes at this moment doesn't get the descriptor.
        let made = stopped.call(libc::SYS_userfaultfd, (flags | libc::O_CLOEXEC) as u64);
        let made = made.map_err(|errno| match errno {
            Errno::EPERM | Errno::ENOSYS => Refused(CreateInRefusal::RefusedThere, errno),
            errno => errno.into(),
        });
        let made = made.and_then(|number| {
            let taken = sys::process::take_descriptor(stopped.traced.pidfd.as_fd(), number as RawFd);
            let closed = stopped.call(libc::SYS_close, number);
            Ok(taken.and_then(|taken| closed.map(|_| taken))?)
        });
        let resumed = stopped.resume();
        made.and_then(|made| Ok(resumed.map(|()| made)?))
    }

    /// Whether no filter of system calls may end its main thread.
    fn check_filter(process: libc::pid_t) -> Result<(), Refused> {
        // Its name may be any bytes.
        let status = fs::read(format!("/proc/{process}/status"));
        let status = status.map_err(|error| match errno_of(&error) {
            Errno::ENOENT => Errno::ESRCH,
            errno => errno,
        })?;
        let filters = status.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"Seccomp:"));
        let is_filtered = filters.is_some_and(|mode| mode.trim_ascii() != b"0");
        if is_filtered { Err(Refused(CreateInRefusal::SeccompFilter, Errno::EACCES)) } else { Ok(()) }
    }

    /// The address of an instruction in a stopped process's vDSO that makes a system call. A 32-bit process has one, too, without such
    /// an instruction.
    fn find_system_call(process: libc::pid_t, memory: &File) -> Option<u64> {
        let vector = fs::read(format!("/proc/{process}/auxv")).ok()?;
        let number = |bytes: &[u8]| bytes.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes));
        let is_vdso = |entry: &&[u8]| number(entry) == Some(AT_SYSINFO_EHDR);
        let vdso = number(vector.chunks_exact(16).find(is_vdso)?.get(8..)?)?;
        let mut code = vec![0; VDSO_BYTES];
        let len = memory.read_at(&mut code, vdso).ok()?;
        let at = code[..len].windows(SYSTEM_CALL.len()).position(|bytes| bytes == SYSTEM_CALL)?;
        vdso.checked_add(at as u64)
    }

    /// How a process stopped.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Stop {
        SystemCall,
        /// By [`ptrace::interrupt`], or with its whole group.
        Event,
        /// Before a signal is delivered.
        Signal(i32),
    }

    /// A process whose main thread is traced.
    struct Traced {
        process: libc::pid_t,
        pidfd: OwnedFd,
    }

    impl Traced {
        /// How it is stopped, or `None`: it runs.
        ///
        /// Not by wait(2): that would take from the program what its other threads wait for, the end of a child for one, and they
        /// would take the stop from here.
        fn stop(&self) -> Result<Option<Stop>, Errno> {
            match ptrace::stop_info(self.process) {
                Ok((_, code)) if code >> 8 == STOP_EVENT => Ok(Some(Stop::Event)),
                Ok((libc::SIGTRAP, AT_SYSTEM_CALL)) => Ok(Some(Stop::SystemCall)),
                Ok((signal, _)) => Ok(Some(Stop::Signal(signal))),
                Err(Errno::ESRCH) if !sys::is_readable(self.pidfd.as_fd()) => Ok(None),
                Err(errno) => Err(errno),
            }
        }

        fn wait(&self) -> Result<Stop, Errno> {
            let until = Instant::now() + PATIENCE;
            loop {
                match self.stop()? {
                    Some(stop) => return Ok(stop),
                    None if Instant::now() > until => return Err(Errno::ETIMEDOUT),
                    None => thread::sleep(LOOK_INTERVAL),
                }
            }
        }

        /// Stops it where nothing of its own program runs, and a system call that it was in is begun again once it goes on.
        fn interrupt(&self) -> Result<(), Errno> {
            ptrace::interrupt(self.process)?;
            loop {
                match self.wait()? {
                    Stop::Event => return Ok(()),
                    Stop::SystemCall => ptrace::go_on(self.process, 0)?,
                    Stop::Signal(signal) => ptrace::go_on(self.process, signal)?,
                }
            }
        }
    }

    /// A process whose main thread is stopped. It goes on where it was when this is dropped, whatever was done with it.
    struct Stopped {
        traced: Traced,
        /// Of a system call.
        instruction: u64,
        registers: libc::user_regs_struct,
        signal_mask: u64,
        is_resumed: bool,
    }

    impl Stopped {
        /// Stops it. No signal is delivered until it is resumed.
        fn new(process: libc::pid_t, pidfd: OwnedFd) -> Result<Self, Refused> {
            let traced = Traced { process, pidfd };
            // Nothing was changed yet: the kernel lets it go with this thread.
            traced.interrupt()?;
            let (registers, signal_mask) = (ptrace::registers(process)?, ptrace::signal_mask(process)?);
            let mut stopped = Self { traced, instruction: 0, registers, signal_mask, is_resumed: false };
            stopped.prepare()?;
            Ok(stopped)
        }

        /// Looks whether it can make a system call, and where it goes on.
        fn prepare(&mut self) -> Result<(), Refused> {
            let process = self.traced.process;
            // Once more, now that it doesn't change.
            check_filter(process)?;
            if ptrace::dispatches_system_calls(process)? {
                return Err(Refused(CreateInRefusal::SyscallUserDispatch, Errno::EACCES));
            }
            let memory = File::open(format!("/proc/{process}/mem")).map_err(|error| errno_of(&error))?;
            let instruction = find_system_call(process, &memory);
            // An error: it was killed meanwhile.
            let is_64 = ptrace::registers(process)?.cs == SEGMENT_64;
            let none = Refused(CreateInRefusal::NoSystemCall, Errno::ENOSYS);
            self.instruction = instruction.filter(|_| is_64).ok_or(none)?;
            if let Some(abort) = abort_of_sequence(process, &memory, self.registers.rip)? {
                self.registers.rip = abort;
            }
            Ok(ptrace::set_signal_mask(process, u64::MAX)?)
        }

        /// Makes a system call with one argument.
        fn call(&self, number: libc::c_long, argument: u64) -> Result<u64, Errno> {
            let mut registers = self.registers;
            registers.rip = self.instruction;
            registers.rax = number as u64;
            registers.rdi = argument;
            // No system call that must be begun again.
            registers.orig_rax = u64::MAX;
            ptrace::set_registers(self.traced.process, &registers)?;
            // Its beginning, and its end.
            for _ in 0..2 {
                ptrace::go_on_to_system_call(self.traced.process, 0)?;
                loop {
                    match self.traced.wait()? {
                        Stop::SystemCall => break,
                        Stop::Event => ptrace::go_on_to_system_call(self.traced.process, 0)?,
                        Stop::Signal(libc::SIGSTOP) => {
                            ptrace::go_on_to_system_call(self.traced.process, libc::SIGSTOP)?;
                        }
                        // All others are kept from it: this is because of the call.
                        Stop::Signal(_) => return Err(Errno::EFAULT),
                    }
                }
            }
            let returned = ptrace::registers(self.traced.process)?.rax;
            match returned as i64 {
                -4095..0 => {
                    Err(errno_of(&io::Error::from_raw_os_error((returned as i64).unsigned_abs() as i32)))
                }
                _ => Ok(returned),
            }
        }

        /// Has it go on where it was.
        fn resume(mut self) -> Result<(), Errno> {
            self.restore()
        }

        /// Wherever it is by now, it is stopped as at first: there the kernel looks whether a system call must be begun again, with
        /// the registers as they were. Waits as long as it takes, since it would crash otherwise.
        fn restore(&mut self) -> Result<(), Errno> {
            if std::mem::replace(&mut self.is_resumed, true) {
                return Ok(());
            }
            loop {
                // An error: it is traced no more, since it has ended, or executes another program.
                ptrace::interrupt(self.traced.process)?;
                match self.traced.stop()? {
                    Some(Stop::Event) => break,
                    Some(Stop::Signal(libc::SIGSTOP)) => ptrace::go_on(self.traced.process, libc::SIGSTOP)?,
                    Some(_) => ptrace::go_on(self.traced.process, 0)?,
                    None => thread::sleep(LOOK_INTERVAL),
                }
            }
            ptrace::set_registers(self.traced.process, &self.registers)?;
            ptrace::set_signal_mask(self.traced.process, self.signal_mask)?;
            ptrace::detach(self.traced.process)
        }
    }

    impl Drop for Stopped {
        fn drop(&mut self) {
            // What is lost is lost with the process.
            let _ended = self.restore();
        }
    }

    /// Where a thread goes on that was stopped within a restartable sequence (rseq(2)): the kernel ends the sequence then, but only if
    /// the thread is still within it when it goes on.
    fn abort_of_sequence(process: libc::pid_t, memory: &File, at: u64) -> Result<Option<u64>, Errno> {
        /// Where the structure of a thread points to the sequence.
        const SEQUENCE: u64 = 8;
        let Some((structure, signature)) = ptrace::restartable_sequences(process)? else { return Ok(None) };
        let number = |address: u64| {
            let mut bytes = [0; 8];
            memory.read_exact_at(&mut bytes, address).ok()?;
            Some(u64::from_ne_bytes(bytes))
        };
        let sequence = || {
            let sequence = number(structure.checked_add(SEQUENCE)?).filter(|sequence| *sequence != 0)?;
            // Behind a version and flags.
            let [start, len, abort] = [8, 16, 24].map(|field| number(sequence.checked_add(field)?));
            let (start, len, abort) = (start?, len?, abort?);
            let found = number(abort.checked_sub(4)?)? as u32;
            (at.checked_sub(start)? < len && found == signature).then_some(abort)
        };
        Ok(sequence())
    }

    #[cfg(test)]
    #[expect(unsafe_code, reason = "a process that makes system calls and counts in shared memory")]
    mod tests {
        use std::sync::atomic::{AtomicU64, Ordering};

        use super::*;
        use crate::support::memory::{Kind, Memory};
        use crate::support::proc::wait_until;
        use crate::support::{child, require, test_name};

        /// Counts in its registers for ever.
        fn count_for_ever(steps: &AtomicU64) -> ! {
            for step in 1_u64.. {
                // SAFETY: touches no memory.
                let own = unsafe { libc::syscall(libc::SYS_getppid) };
                if own <= 0 || steps.fetch_add(1, Ordering::Relaxed) + 1 != step {
                    break;
                }
            }
            panic!("something was changed");
        }

        /// Whatever it was doing when something failed.
        #[test]
        fn process_goes_on_where_it_was_after_a_failure_half_way() {
            require!();
            child::run_well(test_name!(), || {
                let figures = Memory::new(Kind::Memfd, 1);
                // SAFETY: the page is mapped as long as the memory lives, is aligned, and is accessed as this alone.
                let steps = unsafe { &*figures.start().cast::<AtomicU64>() };
                let process = child::fork(|| count_for_ever(steps));
                let wait_for_step = || {
                    let before = steps.load(Ordering::Relaxed);
                    wait_until(|| steps.load(Ordering::Relaxed) > before + 10);
                };
                for halves in 0..4 {
                    wait_for_step();
                    let pid = process.pid();
                    ptrace::seize(pid).unwrap();
                    let stopped = Stopped::new(pid, sys::process::open_pidfd(pid).unwrap()).unwrap();
                    // A call that doesn't return: with its registers alone, at its start, within it.
                    let mut registers = stopped.registers;
                    (registers.rip, registers.rax) = (stopped.instruction, libc::SYS_pause as u64);
                    (registers.rbx, registers.rsp, registers.orig_rax) = (7, 7, u64::MAX);
                    if halves > 0 {
                        ptrace::set_registers(pid, &registers).unwrap();
                    }
                    if halves > 1 {
                        ptrace::go_on_to_system_call(pid, 0).unwrap();
                        assert_eq!(stopped.traced.wait(), Ok(Stop::SystemCall));
                    }
                    if halves > 2 {
                        ptrace::go_on_to_system_call(pid, 0).unwrap();
                        assert_eq!(stopped.traced.stop(), Ok(None));
                    }
                    drop(stopped);
                }
                wait_for_step();
                process.kill();
                assert_eq!(process.wait(), libc::SIGKILL);
            });
        }
    }
}
