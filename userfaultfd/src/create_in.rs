//! [`UffdBuilder::create_in`]: a userfaultfd that is made in another process.

use crate::{Errno, Pid, Result, Uffd, UffdBuilder};

impl UffdBuilder {
    /// Creates a userfaultfd for the memory of another process, which need not know of it: for a
    /// [`DirtyTracker`](crate::DirtyTracker) or a [`Snapshot`](crate::Snapshot) of its memory, for example.
    ///
    /// A userfaultfd belongs to the process that makes it. So this stops the process's main thread by ptrace(2), has it make the two
    /// system calls userfaultfd(2) and close(2), takes the descriptor with pidfd_getfd(2), and lets the thread go on where it was. No
    /// byte of the process's memory is changed: the calls are made by an instruction of its vDSO. The process is stopped for
    /// less than a millisecond.
    ///
    /// If this process is killed in that time, the other one goes on in the middle of such a call, and will crash.
    ///
    /// Closing the descriptor ends what was done with it. A child that the process forks, and a program that it executes, aren't
    /// part of it.
    ///
    /// Since Linux 5.6; on x86-64, for 64-bit processes.
    ///
    /// # Errors
    ///
    /// [`SystemError`](crate::Error::SystemError) with
    ///
    /// - `EPERM`: this process may not trace the other one (another user's, without `CAP_SYS_PTRACE`; `kernel.yama.ptrace_scope`;
    ///   another tracer), or the other one may not make a userfaultfd.
    /// - `ESRCH`: there is no such process, or it has ended meanwhile.
    /// - `EACCES`: the process has a seccomp filter, which might end it for the system call. It wasn't touched.
    /// - `EBUSY`: this is the process itself.
    /// - `ETIMEDOUT`: its main thread didn't stop within three seconds: it waits in the kernel, for a disk for example.
    /// - `ENOSYS`: not on this architecture, or the process is a 32-bit one.
    ///
    /// Otherwise those of [`create`](Self::create).
    #[doc(alias = "ptrace")]
    pub fn create_in(&self, process: Pid) -> Result<Uffd> {
        if process == Pid::this() {
            return Err(Errno::EBUSY.into());
        }
        let flags = self.creation_flags();
        // A thread of its own: whatever it traces still when it ends, the kernel lets go.
        let made = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("create userfaultfd".into());
            let made =
                thread.spawn_scoped(scope, || make(process.as_raw(), flags)).map_err(|_| Errno::EAGAIN)?;
            made.join().unwrap_or(Err(Errno::EIO))
        })?;
        let mut uffd = self.handshake(made)?;
        uffd.set_process(process);
        Ok(uffd)
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn make(_: i32, _: libc::c_int) -> Result<std::os::fd::OwnedFd, Errno> {
    Err(Errno::ENOSYS)
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

    use crate::Errno;
    use crate::error::errno_of;
    use crate::sys::ptrace;

    /// How long a thread may take to stop.
    const PATIENCE: Duration = Duration::from_secs(3);

    /// How often it is looked.
    const LOOK_INTERVAL: Duration = Duration::from_micros(50);

    /// The instruction `syscall`.
    const SYSTEM_CALL: [u8; 2] = [0x0f, 0x05];

    /// The code segment of 64-bit programs.
    const SEGMENT_64: u64 = 0x33;

    /// What wait(2) has of a stop: `SIGTRAP` of a system call, and the event of a stop by [`ptrace::interrupt`].
    const AT_SYSTEM_CALL: i32 = libc::SIGTRAP | 0x80;
    const STOP_EVENT: i32 = 128;

    pub(super) fn make(process: libc::pid_t, flags: libc::c_int) -> Result<OwnedFd, Errno> {
        let status = fs::read_to_string(format!("/proc/{process}/status")).map_err(no_process)?;
        let filters = status.lines().find_map(|line| line.strip_prefix("Seccomp:"));
        if filters.is_some_and(|mode| mode.trim() != "0") {
            return Err(Errno::EACCES);
        }
        let instruction = find_system_call(process)?;
        let pidfd = ptrace::open_pidfd(process)?;
        ptrace::seize(process)?;
        let stopped = Stopped::new(process, instruction)?;
        let made = stopped.call(libc::SYS_userfaultfd, flags as u64).and_then(|number| {
            let taken = ptrace::take_descriptor(pidfd.as_fd(), number as RawFd);
            let closed = stopped.call(libc::SYS_close, number);
            taken.and_then(|taken| closed.map(|_| taken))
        });
        let resumed = stopped.resume();
        made.and_then(|made| resumed.map(|()| made))
    }

    fn no_process(error: std::io::Error) -> Errno {
        match errno_of(&error) {
            Errno::ENOENT => Errno::ESRCH,
            errno => errno,
        }
    }

    /// The address of an instruction in a process's vDSO that makes a system call.
    fn find_system_call(process: libc::pid_t) -> Result<u64, Errno> {
        let maps = fs::read(format!("/proc/{process}/maps")).map_err(no_process)?;
        let maps = String::from_utf8_lossy(&maps);
        // A 32-bit process has one, too, without such an instruction; its registers tell it apart.
        let line = maps.lines().find(|line| line.ends_with("[vdso]")).ok_or(Errno::ENOSYS)?;
        let addresses = line.split(' ').next().and_then(|addresses| addresses.split_once('-'));
        let number = |text| u64::from_str_radix(text, 16).ok();
        let (start, end) =
            addresses.and_then(|(start, end)| Some((number(start)?, number(end)?))).ok_or(Errno::ENOSYS)?;
        let mut code = vec![0; (end - start) as usize];
        let memory = File::open(format!("/proc/{process}/mem")).map_err(no_process)?;
        memory.read_exact_at(&mut code, start).map_err(|error| errno_of(&error))?;
        let at = code.windows(2).position(|bytes| bytes == SYSTEM_CALL).ok_or(Errno::ENOSYS)?;
        Ok(start + at as u64)
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

    fn wait(process: libc::pid_t) -> Result<Stop, Errno> {
        let until = Instant::now() + PATIENCE;
        loop {
            match ptrace::stopped(process)? {
                Some(status) if status & 0xff == 0x7f => {
                    return Ok(match (status >> 8 & 0xff, status >> 16) {
                        (AT_SYSTEM_CALL, 0) => Stop::SystemCall,
                        (_, STOP_EVENT) => Stop::Event,
                        (signal, _) => Stop::Signal(signal),
                    });
                }
                Some(_) => return Err(Errno::ESRCH),
                None if Instant::now() > until => return Err(Errno::ETIMEDOUT),
                None => thread::sleep(LOOK_INTERVAL),
            }
        }
    }

    /// Waits until an interrupt has stopped it: where nothing of its own program runs, and a system call that it was in is begun
    /// again once it goes on.
    fn wait_for_interrupt(process: libc::pid_t) -> Result<(), Errno> {
        loop {
            match wait(process)? {
                Stop::Event => return Ok(()),
                Stop::SystemCall => ptrace::go_on(process, 0)?,
                Stop::Signal(signal) => ptrace::go_on(process, signal)?,
            }
        }
    }

    /// A process whose main thread is stopped.
    struct Stopped {
        process: libc::pid_t,
        /// Of a system call.
        instruction: u64,
        registers: libc::user_regs_struct,
        signal_mask: u64,
    }

    impl Stopped {
        /// Stops it. No signal is delivered until it is resumed.
        fn new(process: libc::pid_t, instruction: u64) -> Result<Self, Errno> {
            ptrace::interrupt(process)?;
            wait_for_interrupt(process)?;
            let (registers, signal_mask) = (ptrace::registers(process)?, ptrace::signal_mask(process)?);
            if registers.cs != SEGMENT_64 {
                return ptrace::detach(process).and(Err(Errno::ENOSYS));
            }
            ptrace::set_signal_mask(process, u64::MAX)?;
            Ok(Self { process, instruction, registers, signal_mask })
        }

        /// Makes a system call with one argument.
        fn call(&self, number: libc::c_long, argument: u64) -> Result<u64, Errno> {
            let mut registers = self.registers;
            registers.rip = self.instruction;
            registers.rax = number as u64;
            registers.rdi = argument;
            // No system call that must be begun again.
            registers.orig_rax = u64::MAX;
            ptrace::set_registers(self.process, &registers)?;
            // Its beginning, and its end.
            for _ in 0..2 {
                ptrace::go_on_to_system_call(self.process, 0)?;
                loop {
                    match wait(self.process)? {
                        Stop::SystemCall => break,
                        Stop::Event => ptrace::go_on_to_system_call(self.process, 0)?,
                        Stop::Signal(signal) => ptrace::go_on_to_system_call(self.process, signal)?,
                    }
                }
            }
            let returned = ptrace::registers(self.process)?.rax;
            match returned as i64 {
                -4095..0 => {
                    Err(errno_of(&io::Error::from_raw_os_error((returned as i64).unsigned_abs() as i32)))
                }
                _ => Ok(returned),
            }
        }

        /// Has it go on where it was.
        fn resume(self) -> Result<(), Errno> {
            // At such a stop the kernel looks whether a system call must be begun again, with the registers as they were.
            ptrace::interrupt(self.process)?;
            ptrace::go_on(self.process, 0)?;
            wait_for_interrupt(self.process)?;
            ptrace::set_registers(self.process, &self.registers)?;
            ptrace::set_signal_mask(self.process, self.signal_mask)?;
            ptrace::detach(self.process)
        }
    }
}
