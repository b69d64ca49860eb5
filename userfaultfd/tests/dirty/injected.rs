//! Descriptors that another process makes without knowing of it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::thread;

use userfaultfd::dirty::Options;
use userfaultfd::{CreateInRefusal, DirtyTracker, Errno, Error, FeatureFlags, Pid, Uffd, UffdBuilder};

use crate::support::memory::{Kind, Memory};
use crate::support::proc::wait_until;
use crate::support::{child, page, require, seccomp, test_name};

const ROUNDS: usize = 20;

/// Why it wasn't made.
fn refusal(made: userfaultfd::Result<Uffd>) -> (CreateInRefusal, Errno) {
    match made {
        Err(Error::NotCreatedIn { refusal, errno, .. }) => (refusal, errno),
        other => panic!("{other:?}"),
    }
}

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
fn processes_that_cannot_be_asked_have_a_reason() {
    require!(FeatureFlags::WP_ASYNC);
    child::run_well(test_name!(), || {
        let here = std::process::id() as libc::pid_t;
        assert_eq!(refusal(create_in(here)), (CreateInRefusal::ThisProcess, Errno::EBUSY));
        let (mut here, there) = UnixStream::pair().unwrap();
        let filtered = child::fork(|| {
            assert!(seccomp::refuse_userfaultfd(Errno::EPERM));
            (&there).write_all(&[1]).unwrap();
            let _until_killed = (&there).read(&mut [0]);
        });
        here.read_exact(&mut [0]).unwrap();
        let refused = create_in(filtered.pid());
        let text = refused.as_ref().unwrap_err().to_string();
        assert!(text.contains(&format!("process {}", filtered.pid())) && text.contains("seccomp"), "{text}");
        assert_eq!(refusal(refused), (CreateInRefusal::SeccompFilter, Errno::EACCES));
        let gone = filtered.pid();
        filtered.kill();
        filtered.wait();
        assert_eq!(refusal(create_in(gone)), (CreateInRefusal::Ended, Errno::ESRCH));
    });
}

/// What another thread does that waits for any child takes nothing from here, and the other way round.
#[test]
fn child_is_left_to_the_threads_that_wait_for_it() {
    require!(FeatureFlags::WP_ASYNC);
    child::run_well(test_name!(), || {
        let figures = Memory::new(Kind::Memfd, 1);
        let steps = shared(&figures);
        let process = child::fork(|| {
            loop {
                steps.fetch_add(1, Ordering::Relaxed);
            }
        });
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    // SAFETY: no status is asked for.
                    let waited = unsafe { libc::waitpid(-1, ptr::null_mut(), libc::WNOHANG) };
                    // It may be told of a stop.
                    assert!(waited == 0 || waited == process.pid(), "{waited}");
                }
            });
            for _ in 0..ROUNDS {
                drop(create_in(process.pid()).unwrap());
            }
            done.store(true, Ordering::Relaxed);
        });
        let before = steps.load(Ordering::Relaxed);
        wait_until(|| steps.load(Ordering::Relaxed) > before + 1000);
        process.kill();
        assert_eq!(process.wait(), libc::SIGKILL);
        for round in 0..10 * ROUNDS {
            // It ends at any moment.
            let process = child::fork(|| {
                for step in 0..50 * round {
                    std::hint::black_box(step);
                    // SAFETY: touches no memory.
                    unsafe { libc::syscall(libc::SYS_getppid) };
                }
            });
            if let Err(error) = create_in(process.pid()) {
                assert_eq!(error.errno(), Some(Errno::ESRCH), "round {round}");
            }
            process.succeed();
        }
    });
}

/// What rseq(2) has of a thread, for C libraries that have registered none.
#[repr(C, align(32))]
struct Registered([u64; 4]);

/// Before each place where a sequence is aborted.
const RSEQ_SIGNATURE: u32 = 0x5305_3053;

/// The thread's structure for rseq(2). `None`: the kernel has none.
fn rseq_structure() -> Option<*mut u64> {
    // SAFETY: the names end with a NUL.
    let symbol = |name: &std::ffi::CStr| unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    let (offset, size) = (symbol(c"__rseq_offset").cast::<isize>(), symbol(c"__rseq_size").cast::<u32>());
    // SAFETY: glibc's constants of these types, if it has them.
    if !offset.is_null() && !size.is_null() && unsafe { size.read() } > 0 {
        let thread: *mut u8;
        // SAFETY: reads the thread pointer.
        unsafe { std::arch::asm!("mov {}, fs:0", out(reg) thread) };
        // SAFETY: as above.
        return Some(thread.wrapping_offset(unsafe { offset.read() }).cast());
    }
    let structure = Box::leak(Box::new(Registered([u64::from(u32::MAX) << 32, 0, 0, 0])));
    let start = structure.0.as_mut_ptr();
    // SAFETY: the structure stays as long as this process, which has one thread.
    let registered = unsafe { libc::syscall(libc::SYS_rseq, start, 32, 0, RSEQ_SIGNATURE) };
    (registered == 0).then_some(start)
}

/// Runs a restartable sequence for ever. Returns if it goes on within it after the kernel has forgotten it.
fn restart_for_ever(structure: *mut u64, steps: &AtomicU64, aborts: &AtomicU64) {
    // Version and flags, where it begins, its length, where it is aborted.
    #[repr(C, align(32))]
    struct Sequence([u64; 4]);
    let mut sequence = Sequence([0; 4]);
    // SAFETY: writes to the sequence, the pointer to it, and the two numbers; uses no stack.
    unsafe {
        std::arch::asm!(
            "lea {one}, [rip + 2f]",
            "mov [{sequence} + 8], {one}",
            "lea {other}, [rip + 3f]",
            "sub {other}, {one}",
            "mov [{sequence} + 16], {other}",
            "lea {one}, [rip + 4f]",
            "mov [{sequence} + 24], {one}",
            "6:",
            "mov [{structure} + 8], {sequence}",
            "2:",
            "inc qword ptr [{steps}]",
            "cmp qword ptr [{structure} + 8], 0",
            "jne 2b",
            "3:",
            "jmp 5f",
            ".long 0x53053053",
            "4:",
            "inc qword ptr [{aborts}]",
            "jmp 6b",
            "5:",
            one = out(reg) _,
            other = out(reg) _,
            sequence = in(reg) sequence.0.as_mut_ptr(),
            structure = in(reg) structure,
            steps = in(reg) steps.as_ptr(),
            aborts = in(reg) aborts.as_ptr(),
            options(nostack),
        );
    }
}

#[test]
fn restartable_sequence_begins_anew() {
    require!(FeatureFlags::WP_ASYNC);
    child::run_well(test_name!(), || {
        let numbers = [(); 2].map(|()| Memory::new(Kind::Memfd, 1));
        let [steps, aborts] = numbers.each_ref().map(shared);
        let process = child::fork(|| {
            let structure = rseq_structure().expect("the kernel has WP_ASYNC, and so rseq(2)");
            restart_for_ever(structure, steps, aborts);
            panic!("the sequence went on");
        });
        for _ in 0..ROUNDS {
            let before = steps.load(Ordering::Relaxed);
            wait_until(|| steps.load(Ordering::Relaxed) > before + 1000);
            let before = aborts.load(Ordering::Relaxed);
            drop(create_in(process.pid()).unwrap());
            wait_until(|| aborts.load(Ordering::Relaxed) > before);
        }
        process.kill();
        assert_eq!(process.wait(), libc::SIGKILL);
    });
}

#[test]
fn process_that_dispatches_its_system_calls_is_left_alone() {
    require!(FeatureFlags::WP_ASYNC);
    const SET_SYSCALL_USER_DISPATCH: libc::c_int = 59;
    child::run_well(test_name!(), || {
        let figures = Memory::new(Kind::Memfd, 1);
        let steps = shared(&figures);
        let process = child::fork(|| {
            // Whether system calls are signals.
            let selector = AtomicBool::new(false);
            let (on, none): (libc::c_ulong, libc::c_ulong) = (1, 0);
            // SAFETY: the kernel reads the selector, alive as long as this process.
            let set = unsafe { libc::prctl(SET_SYSCALL_USER_DISPATCH, on, none, none, selector.as_ptr()) };
            assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
            selector.store(true, Ordering::Relaxed);
            loop {
                steps.fetch_add(1, Ordering::Relaxed);
            }
        });
        wait_until(|| steps.load(Ordering::Relaxed) > 0);
        assert_eq!(refusal(create_in(process.pid())), (CreateInRefusal::SyscallUserDispatch, Errno::EACCES));
        let before = steps.load(Ordering::Relaxed);
        wait_until(|| steps.load(Ordering::Relaxed) > before + 1000);
        process.kill();
        assert_eq!(process.wait(), libc::SIGKILL);
    });
}

/// Names are bytes that the process chooses: its own, and those of what it maps.
#[test]
fn process_with_misleading_names_is_asked_like_any_other() {
    require!(FeatureFlags::WP_ASYNC);
    child::run_well(test_name!(), || {
        let folder = std::env::temp_dir().join(format!("userfaultfd-injected-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        let path = folder.join("no [vdso]");
        let (file, len) = (File::create_new(&path).unwrap(), 1 << 40);
        file.set_len(len).unwrap();
        let file = File::open(&path).unwrap();
        let figures = Memory::new(Kind::Memfd, 1);
        let steps = shared(&figures);
        let process = child::fork(|| {
            // SAFETY: the kernel copies the name, which ends with a NUL.
            unsafe { libc::prctl(libc::PR_SET_NAME, c"\xff\xfe".as_ptr()) };
            // SAFETY: a mapping of its own, of a file that nothing writes to.
            let map = unsafe { memmap2::MmapOptions::new().len(len as usize).map(&file) }.unwrap();
            loop {
                steps.fetch_add(1 + u64::from(map[0]), Ordering::Relaxed);
            }
        });
        wait_until(|| steps.load(Ordering::Relaxed) > 0);
        let made = create_in(process.pid());
        fs::remove_dir_all(&folder).unwrap();
        drop(made.unwrap());
        process.kill();
        assert_eq!(process.wait(), libc::SIGKILL);
    });
}

#[test]
fn process_that_executes_programs_survives_being_asked() {
    require!(FeatureFlags::WP_ASYNC);
    child::run_well(test_name!(), || {
        let script = std::env::temp_dir().join(format!("userfaultfd-again-{}", std::process::id()));
        fs::write(&script, "#!/bin/sh\nexec \"$0\"\n").unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
        let mut command = Command::new(&script);
        let mut process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let made = (0..20 * ROUNDS).map(|_| create_in(process.id() as libc::pid_t));
        let errors: Vec<_> = made.filter_map(Result::err).collect();
        let ended = process.try_wait().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
        fs::remove_file(&script).unwrap();
        assert!(ended.is_none() && errors.is_empty(), "{ended:?} {errors:?}");
    });
}
