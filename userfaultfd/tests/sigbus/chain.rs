//! A SIGBUS that isn't about a missing page goes where it would have gone.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};

use userfaultfd::pager::{
    BytesSource, Error, MappedFileSource, PageData, PageSource, SignalSafe, SourceBytes,
};
use userfaultfd::{FeatureFlags, LazyMemory};

use super::support::mapping::{self, Mapping};
use super::support::raw::check;
use super::support::{self, child, page, proc, require, signal, test_name};
use super::{byte, content, lazy};

static CALLS: AtomicUsize = AtomicUsize::new(0);
static ADDRESS: AtomicUsize = AtomicUsize::new(0);
static CODE: AtomicI32 = AtomicI32::new(0);
/// The signals that are blocked while the handler runs, a bit for each of 1 to 31.
static BLOCKED: AtomicU64 = AtomicU64::new(0);
/// Whether to make the access possible.
static REPAIR: AtomicBool = AtomicBool::new(true);

fn note() {
    CALLS.fetch_add(1, Ordering::SeqCst);
    // SAFETY: all zeros is a set without signals. A C library may fill in a part of it alone.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is borrowed for the call.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), &raw mut set) };
    // SAFETY: as above.
    let is_blocked = |signal: &i32| unsafe { libc::sigismember(&raw const set, *signal) } == 1;
    BLOCKED.store((1..32).filter(is_blocked).map(|signal| 1 << signal).sum(), Ordering::SeqCst);
}

/// Puts a page in the place of the one that was accessed.
fn repair(address: usize) {
    if REPAIR.load(Ordering::SeqCst) {
        let start = ptr::without_provenance_mut(address / page() * page());
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: replaces the page that was accessed, to which nobody has a reference.
        unsafe { libc::mmap(start, page(), libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    }
}

extern "C" fn with_information(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure.
    let information = unsafe { &*info };
    // SAFETY: a fault's structure has an address.
    let address = unsafe { information.si_addr() }.addr();
    assert!(!context.is_null());
    CODE.store(information.si_code, Ordering::SeqCst);
    ADDRESS.store(address, Ordering::SeqCst);
    note();
    // One that a process sent has no address.
    if information.si_code > 0 {
        repair(address);
    }
}

extern "C" fn plain(signal: libc::c_int) {
    assert_eq!(signal, libc::SIGBUS);
    note();
    repair(ADDRESS.load(Ordering::SeqCst));
}

/// Has SIGBUS handled, as a program does that knows nothing of this library.
fn handle(handler: usize, flags: libc::c_int, mask: &[libc::c_int]) {
    // SAFETY: all zeros is an action without flags and with nothing blocked.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    for signal in mask {
        // SAFETY: the set is borrowed for the call.
        unsafe { libc::sigaddset(&raw mut action.sa_mask, *signal) };
    }
    // SAFETY: the handlers do but what a signal handler may.
    check(unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) }).unwrap();
}

const WITH_INFORMATION: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
    with_information;

/// Raises SIGBUS in this thread, for any reason that the kernel or a process may have.
fn queue(code: libc::c_int, address: usize) {
    // SAFETY: all zeros is a valid structure.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    (info.si_signo, info.si_code) = (libc::SIGBUS, code);
    let field = (3 * size_of::<i32>()).next_multiple_of(align_of::<usize>());
    #[expect(clippy::cast_ptr_alignment, reason = "a field of the kernel's structure")]
    let field = (&raw mut info).cast::<u8>().wrapping_add(field).cast::<usize>();
    // SAFETY: inside the structure.
    unsafe { field.write(address) };
    let (process, thread) = (std::process::id(), proc::thread_id());
    // SAFETY: the structure is borrowed for the call.
    let queued = unsafe { libc::syscall(libc::SYS_rt_tgsigqueueinfo, process, thread, libc::SIGBUS, &info) };
    check(queued).unwrap();
}

/// SIGBUS that isn't about a missing page: as kill(2) and sigqueue(3) send it, and for memory that is broken.
const STRAY: [fn(); 4] = [
    || signal::send(proc::thread_id(), libc::SIGBUS),
    || queue(libc::SI_QUEUE, 0),
    || queue(libc::BUS_MCEERR_AO, 0),
    || queue(libc::BUS_MCEERR_AR, 0),
];

/// What is done on SIGBUS.
fn handler() -> usize {
    // SAFETY: all zeros is an action.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is borrowed for the call.
    check(unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut action) }).unwrap();
    action.sa_sigaction
}

/// A mapping beyond the end of its file.
fn beyond_the_end() -> Mapping {
    Mapping::shared(1, mapping::memfd(0, 0).as_fd()).unwrap()
}

fn read(address: *const libc::c_void) -> u8 {
    // SAFETY: mapped, or a handler makes it so, or the process ends.
    unsafe { address.cast::<u8>().read_volatile() }
}

/// Memory with a page that the source has lost.
fn truncated() -> LazyMemory {
    let file = File::from(mapping::memfd(0, 4));
    file.write_all_at(&content(4 * page()), 0).unwrap();
    let source = MappedFileSource::new(file.try_clone().unwrap()).unwrap();
    let memory = LazyMemory::sigbus(source).block(4 * page()).build().unwrap();
    file.set_len(2 * page() as u64).unwrap();
    memory
}

fn bits(signals: &[libc::c_int]) -> u64 {
    signals.iter().map(|signal| 1 << signal).sum()
}

/// Runs `body` in a process of its own, which must end by SIGBUS.
#[track_caller]
fn dies(test: &'static str, body: impl FnOnce()) {
    if let Some(output) = child::run(test, body) {
        assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{output:?}");
    }
}

#[test]
fn former_handler_gets_foreign_sigbus() {
    require!();
    child::run_well(test_name!(), || {
        handle(WITH_INFORMATION as usize, libc::SA_SIGINFO, &[libc::SIGUSR1]);
        let memory = lazy(4);
        assert_eq!(memory[0], byte(0));
        assert_eq!(CALLS.load(Ordering::SeqCst), 0, "a missing page is none of its business");
        let foreign = beyond_the_end();
        assert_eq!(read(foreign.start), 0);
        assert_eq!(CALLS.load(Ordering::SeqCst), 1);
        assert_eq!(ADDRESS.load(Ordering::SeqCst), foreign.start.addr());
        assert_eq!(CODE.load(Ordering::SeqCst), libc::BUS_ADRERR);
        let blocked = BLOCKED.load(Ordering::SeqCst);
        if cfg!(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "s390x")) {
            assert_eq!(blocked, bits(&[libc::SIGUSR1, libc::SIGBUS]));
        }
        // Nothing of that is left.
        note();
        assert_eq!(BLOCKED.load(Ordering::SeqCst), 0);
        signal::send(proc::thread_id(), libc::SIGBUS);
        assert_eq!((CALLS.load(Ordering::SeqCst), CODE.load(Ordering::SeqCst)), (3, libc::SI_TKILL));
        assert_eq!(memory[page()], byte(page()));
    });
}

#[test]
fn handler_is_called_as_its_flags_say() {
    require!();
    child::run_well(test_name!(), || {
        handle(plain as extern "C" fn(_) as usize, libc::SA_NODEFER, &[]);
        let memory = lazy(4);
        let foreign = beyond_the_end();
        ADDRESS.store(foreign.start.addr(), Ordering::SeqCst);
        assert_eq!((read(foreign.start), memory[0]), (0, byte(0)));
        assert_eq!(CALLS.load(Ordering::SeqCst), 1);
        if cfg!(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "s390x")) {
            assert_eq!(BLOCKED.load(Ordering::SeqCst), 0);
        }
    });
}

#[test]
fn resethand_handler_is_called_once() {
    require!();
    dies(test_name!(), || {
        handle(WITH_INFORMATION as usize, libc::SA_SIGINFO | libc::SA_RESETHAND, &[]);
        let memory = lazy(4);
        let (first, second) = (beyond_the_end(), beyond_the_end());
        assert_eq!((read(first.start), memory[0], CALLS.load(Ordering::SeqCst)), (0, byte(0), 1));
        read(second.start);
        unreachable!("the second is deadly");
    });
}

#[test]
fn sigbus_without_handler_ends_process() {
    require!();
    dies(test_name!(), || {
        handle(libc::SIG_DFL, 0, &[]);
        assert_eq!(lazy(4)[0], byte(0));
        read(beyond_the_end().start);
    });
}

#[test]
fn handler_of_rusts_runtime_lets_the_process_end() {
    require!();
    dies(test_name!(), || {
        assert_eq!(lazy(4)[0], byte(0));
        read(beyond_the_end().start);
    });
}

#[test]
fn signal_that_is_sent_ends_the_process_as_before() {
    require!();
    dies(test_name!(), || {
        handle(libc::SIG_DFL, 0, &[]);
        assert_eq!(lazy(4)[0], byte(0));
        signal::send(proc::thread_id(), libc::SIGBUS);
    });
}

#[test]
fn sent_sigbus_is_ignored_where_it_was_ignored() {
    require!();
    dies(test_name!(), || {
        handle(libc::SIG_IGN, 0, &[]);
        let memory = lazy(4);
        signal::send(proc::thread_id(), libc::SIGBUS);
        assert_eq!(memory[0], byte(0));
        // The kernel doesn't let that be ignored.
        read(beyond_the_end().start);
    });
}

#[test]
fn lost_page_raises_sigbus() {
    require!();
    child::run_well(test_name!(), || {
        handle(WITH_INFORMATION as usize, libc::SA_SIGINFO, &[]);
        let memory = truncated();
        assert_eq!(memory[page()], byte(page()), "what is left is there, in spite of its block");
        assert_eq!(CALLS.load(Ordering::SeqCst), 0);
        let lost = memory[3 * page()..].as_ptr().cast();
        let _repaired = read(lost);
        assert_eq!((CALLS.load(Ordering::SeqCst), ADDRESS.load(Ordering::SeqCst)), (1, lost.addr()));
        let statistics = memory.statistics();
        assert_eq!(statistics.source_errors, 1);
        if support::features().contains(FeatureFlags::POISON) {
            assert_eq!((statistics.poisoned, statistics.present_pages), (1, 2));
        } else {
            assert_eq!((statistics.poisoned, statistics.present_pages), (0, 2));
        }
    });
}

#[test]
fn fill_names_lost_content() {
    require!();
    let memory = truncated();
    let (poisoned, pages, failed) = match memory.fill(|_| {}).unwrap_err() {
        Error::Poisoned { pages, failed } => (true, pages, failed),
        Error::Unfilled { pages, failed } => (false, pages, failed),
        error => panic!("{error}"),
    };
    assert_eq!(poisoned, support::features().contains(FeatureFlags::POISON));
    assert_eq!((pages, failed.len(), failed[0].range.clone()), (2, 1, 2 * page()..4 * page()));
    assert_eq!(memory[page()], byte(page()));
}

#[test]
fn lost_page_ends_process() {
    require!();
    dies(test_name!(), || {
        let memory = truncated();
        assert_eq!(memory[page()], byte(page()));
        std::hint::black_box(memory[3 * page()]);
    });
}

#[test]
fn source_without_bytes_raises_sigbus() {
    require!();
    struct Half;
    impl PageSource for Half {
        fn read(&self, _: u64, _: &mut [u8]) -> std::io::Result<PageData> {
            unreachable!("it has no borders")
        }
        fn bytes(&self, offset: u64, len: usize) -> Option<SourceBytes<'_>> {
            static ONES: [u8; 1 << 16] = [1; 1 << 16];
            ONES.get(..len).filter(|_| offset == 0).map(SourceBytes::from)
        }
    }
    // SAFETY: it computes. What it doesn't answer for is what this test is about.
    unsafe impl SignalSafe for Half {}
    dies(test_name!(), || {
        let memory = LazyMemory::sigbus(Half).len(8 * page()).block(2 * page()).build().unwrap();
        assert_eq!(memory[5], 1);
        std::hint::black_box(memory[6 * page()]);
    });
}

#[test]
fn hopeless_fault_is_passed_on() {
    require!();
    child::run_well(test_name!(), || {
        handle(WITH_INFORMATION as usize, libc::SA_SIGINFO, &[]);
        REPAIR.store(false, Ordering::SeqCst);
        let memory = lazy(1);
        assert_eq!(memory[0], byte(0));
        // What the kernel would say if the page faulted again and again though it is there.
        let mut sent = 0_u32;
        while CALLS.load(Ordering::SeqCst) == 0 {
            queue(libc::BUS_ADRERR, memory.as_ptr().addr());
            sent += 1;
        }
        assert!(sent > 10_000, "{sent} times isn't for ever");
        assert_eq!(ADDRESS.load(Ordering::SeqCst), memory.as_ptr().addr());
    });
}

#[test]
fn bytes_of_every_type_are_sources() {
    require!();
    fn first(source: impl SignalSafe + 'static) -> u8 {
        LazyMemory::sigbus(source).build().unwrap()[0]
    }
    assert_eq!(first(BytesSource::new("x")), b'x');
    assert_eq!(first(BytesSource::new(String::from("x"))), b'x');
    assert_eq!(first(BytesSource::new(&b"xy"[..])), b'x');
    assert_eq!(first(BytesSource::new(b"xy")), b'x');
    assert_eq!(first(BytesSource::new(*b"xy")), b'x');
    assert_eq!(first(BytesSource::new(vec![b'x'])), b'x');
    assert_eq!(first(BytesSource::new(Box::<[u8]>::from(*b"xy"))), b'x');
    let mut mapping = memmap2::MmapMut::map_anon(2 * page()).unwrap();
    mapping[0] = b'x';
    assert_eq!(first(BytesSource::new(mapping.make_read_only().unwrap())), b'x');
    let mut mapping = memmap2::MmapMut::map_anon(2 * page()).unwrap();
    mapping[0] = b'x';
    assert_eq!(first(BytesSource::new(mapping)), b'x');
}

/// A stray signal through the handler of Rust's runtime, which puts the default action in place of whatever is
/// installed.
#[test]
fn rusts_handler_leaves_ours_installed() {
    require!();
    child::run_well(test_name!(), || {
        for stray in STRAY {
            for second in [false, true] {
                let child = child::fork(|| {
                    let memory = lazy(4);
                    stray();
                    assert_eq!((memory[0], memory[3 * page()]), (byte(0), byte(3 * page())));
                    if second {
                        stray();
                        unreachable!("the second is deadly");
                    }
                });
                let status = ExitStatus::from_raw(child.wait());
                assert_eq!(status.signal(), second.then_some(libc::SIGBUS), "{status:?}");
                assert!(second || status.success());
            }
        }
    });
}

/// The page beyond the end of a file that is accessed. Zero: a signal is sent.
static FOREIGN: AtomicUsize = AtomicUsize::new(0);

/// Notes the call of a handler, and makes the access possible if there is one.
fn note_and_repair() {
    CALLS.fetch_add(1, Ordering::SeqCst);
    let foreign = FOREIGN.load(Ordering::SeqCst);
    if foreign != 0 {
        repair(foreign);
    }
}

fn set_default() {
    note_and_repair();
    handle(libc::SIG_DFL, 0, &[]);
}

extern "C" fn sets_default(_: libc::c_int) {
    set_default();
}

extern "C" fn sets_default_with_information(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    set_default();
}

extern "C" fn sets_itself(_: libc::c_int) {
    note_and_repair();
    handle(sets_itself as extern "C" fn(_) as usize, libc::SA_RESETHAND, &[]);
}

extern "C" fn sets_itself_with_information(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    note_and_repair();
    let flags = libc::SA_RESETHAND | libc::SA_SIGINFO;
    handle(sets_itself_with_information as extern "C" fn(_, _, _) as usize, flags, &[]);
}

/// Handlers that install the default action or themselves, with their flags, and whether they are called once.
fn installing_handlers() -> [(usize, libc::c_int, bool); 4] {
    let default_with = sets_default_with_information as extern "C" fn(_, _, _) as usize;
    let itself_with = sets_itself_with_information as extern "C" fn(_, _, _) as usize;
    [
        (sets_default as extern "C" fn(_) as usize, 0, true),
        (sets_itself as extern "C" fn(_) as usize, libc::SA_RESETHAND, false),
        (default_with, libc::SA_SIGINFO, true),
        (itself_with, libc::SA_SIGINFO | libc::SA_RESETHAND, false),
    ]
}

/// Has each such handler called three times by `stray`, in a child: ours stays installed, and goes on filling.
fn ours_stays_installed(stray: impl Fn()) {
    for (number, flags, once) in installing_handlers() {
        let child = child::fork(|| {
            handle(number, flags, &[]);
            let memory = lazy(8);
            let ours = handler();
            for calls in 1..=3 {
                stray();
                assert_eq!((CALLS.load(Ordering::SeqCst), handler()), (calls, ours));
                let at = calls * page();
                assert_eq!(memory[at], byte(at));
                if once && calls == 2 {
                    unreachable!("the second is deadly");
                }
            }
        });
        let status = ExitStatus::from_raw(child.wait());
        assert_eq!(status.signal(), once.then_some(libc::SIGBUS), "{status:?}");
        assert!(once || status.success(), "{status:?}");
    }
}

/// Repeats an access beyond the end of a file, which the handler makes possible before it installs another action.
#[test]
fn handler_that_repairs_and_installs_leaves_ours_installed() {
    require!();
    child::run_well(test_name!(), || {
        ours_stays_installed(|| {
            let foreign = beyond_the_end();
            FOREIGN.store(foreign.start.addr(), Ordering::SeqCst);
            assert_eq!(read(foreign.start), 0);
        });
    });
}

#[test]
fn handler_installing_default_leaves_ours_installed() {
    require!();
    child::run_well(test_name!(), || STRAY.iter().for_each(ours_stays_installed));
}

/// What a handler that was installed after ours calls.
static OURS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn later(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    CALLS.fetch_add(1, Ordering::SeqCst);
    let ours = ptr::with_exposed_provenance::<()>(OURS.load(Ordering::SeqCst));
    // SAFETY: it is the handler that was installed with SA_SIGINFO.
    let ours: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
        unsafe { std::mem::transmute(ours) };
    ours(signal, info, context);
}

#[test]
fn later_handler_that_calls_ours_stays() {
    require!();
    child::run_well(test_name!(), || {
        let memory = lazy(8);
        OURS.store(handler(), Ordering::SeqCst);
        let later = later as extern "C" fn(_, _, _) as usize;
        handle(later, libc::SA_SIGINFO, &[]);
        assert_eq!((memory[0], CALLS.load(Ordering::SeqCst)), (byte(0), 1));
        // To the handler of Rust's runtime, in the end.
        STRAY[0]();
        assert_eq!((CALLS.load(Ordering::SeqCst), handler()), (2, later));
        assert_eq!((memory[page()], CALLS.load(Ordering::SeqCst)), (byte(page()), 3));
    });
}

/// Where the last handler that was called had its variables.
static STACK: AtomicUsize = AtomicUsize::new(0);

extern "C" fn tells_its_stack(_: libc::c_int) {
    let here = 0_u8;
    STACK.store((&raw const here).addr(), Ordering::SeqCst);
}

/// Gives this thread an alternate stack, of which nothing is mapped below.
fn alternate_stack(len: usize) -> std::ops::Range<usize> {
    let len = len.next_multiple_of(16);
    let pages = len.div_ceil(page()) + 1;
    let mapping =
        Mapping::new(pages, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None).unwrap();
    let start = mapping.start.wrapping_byte_add(page());
    // SAFETY: nobody refers to the mapping.
    check(unsafe { libc::mprotect(start, (pages - 1) * page(), libc::PROT_READ | libc::PROT_WRITE) })
        .unwrap();
    let stack = libc::stack_t { ss_sp: start, ss_flags: 0, ss_size: len };
    // SAFETY: the structure is borrowed for the call; the mapping stays.
    check(unsafe { libc::sigaltstack(&raw const stack, ptr::null_mut()) }).unwrap();
    std::mem::forget(mapping);
    start.addr()..start.addr() + len
}

/// Threads of Rust's library have an alternate stack that is little longer than what the kernel puts there where the CPU
/// has many registers.
#[test]
fn fault_takes_no_room_of_the_alternate_stack() {
    require!();
    child::run_well(test_name!(), || {
        let memory = lazy(8);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: touches no memory.
                let least = unsafe { libc::getauxval(libc::AT_MINSIGSTKSZ) } as usize;
                let least = least.max(libc::MINSIGSTKSZ);
                let _stack = alternate_stack(least + 256);
                assert_eq!(memory[page()], byte(page()));
            });
            thread.join().unwrap();
        });
    });
}

#[test]
fn older_handler_runs_on_its_alternate_stack() {
    require!();
    child::run_well(test_name!(), || {
        handle(tells_its_stack as extern "C" fn(_) as usize, 0, &[]);
        let memory = lazy(8);
        let stack = alternate_stack(1 << 20);
        STRAY[0]();
        let here = STACK.load(Ordering::SeqCst);
        assert!(here != 0 && !stack.contains(&here), "{here:#x}");
        assert_eq!(memory[0], byte(0));
    });
}
