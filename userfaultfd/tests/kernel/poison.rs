//! UFFDIO_POISON. What it has in common with other fills is tested in `fill`.

use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use userfaultfd::{Errno, FeatureFlags};

use crate::support::fault;
use crate::support::fill::{Fill, Filler};
use crate::support::memory::{Kind, Memory};
use crate::support::raw::check;
use crate::support::{child, require, test_name};

/// Every kind of memory with an operation that poisons it.
fn each(test: &str, pages: usize) -> impl Iterator<Item = Filler> {
    Kind::ALL.into_iter().filter_map(move |kind| Filler::try_new(test, Fill::Poison, kind, pages))
}

/// The last SIGBUS.
static CODE: AtomicI32 = AtomicI32::new(0);
static ADDRESS: AtomicUsize = AtomicUsize::new(0);
static LSB: AtomicI32 = AtomicI32::new(0);
/// The size of the page that raises it.
static PAGE: AtomicUsize = AtomicUsize::new(0);

/// Notes what the signal says, and puts memory in the place of the page, so that the access goes on.
extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure, which nobody else uses.
    let content = unsafe { &*info };
    // SAFETY: a fault's structure has an address.
    let address = unsafe { content.si_addr() }.addr();
    CODE.store(content.si_code, Ordering::Relaxed);
    // The field follows the address, which is behind three integers.
    let lsb = (3 * size_of::<i32>()).next_multiple_of(align_of::<usize>()) + size_of::<usize>();
    #[expect(clippy::cast_ptr_alignment, reason = "a field of the kernel's structure")]
    let lsb = info.cast::<u8>().wrapping_add(lsb).cast::<i16>();
    // SAFETY: inside the structure.
    LSB.store(unsafe { lsb.read() }.into(), Ordering::Relaxed);
    ADDRESS.store(address, Ordering::Relaxed);
    let page = PAGE.load(Ordering::Relaxed);
    let start = ptr::without_provenance_mut(address / page * page);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: replaces the page that was accessed, to which nobody has a reference.
    unsafe { libc::mmap(start, page, protection, flags, -1, 0) };
}

fn catch_sigbus() {
    // SAFETY: all zeros is an action without flags and with nothing blocked.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = on_sigbus as extern "C" fn(_, _, _) as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler does but what a signal handler may.
    check(unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) }).unwrap();
}

/// Checks that the last signal was for a page.
fn assert_raised(memory: &Memory, number: usize) {
    let code = CODE.swap(0, Ordering::Relaxed);
    let page = memory.at(number).addr()..memory.at(number).addr() + memory.page();
    assert!(page.contains(&ADDRESS.load(Ordering::Relaxed)), "{memory:?}");
    match code {
        // With CONFIG_MEMORY_FAILURE.
        libc::BUS_MCEERR_AR => assert_eq!(1 << LSB.load(Ordering::Relaxed), memory.page(), "{memory:?}"),
        libc::BUS_ADRERR => {}
        other => panic!("code {other}"),
    }
}

#[test]
fn access_to_poison_raises_sigbus() {
    require!(FeatureFlags::POISON);
    child::run_well(test_name!(), || {
        catch_sigbus();
        for filler in each(test_name!(), 3) {
            let (uffd, memory) = (&filler.uffd, &filler.memory);
            PAGE.store(memory.page(), Ordering::Relaxed);
            // One that was poisoned before.
            filler.run(0, 1, true).unwrap();
            assert_eq!(memory.read(0), 0);
            assert_raised(memory, 0);
            // One that is poisoned while a thread waits for it.
            for (number, wake) in [(1, true), (2, false)] {
                fault::during(
                    uffd,
                    memory,
                    || memory.write(number, 1),
                    |faults| {
                        faults.next();
                        faults.wait_for_sleepers(1);
                        assert_eq!(filler.run(number, 1, wake).unwrap(), memory.page());
                        if !wake {
                            assert_eq!(fault::waiters(uffd), 1);
                            uffd.wake(memory.start(), memory.len()).unwrap();
                        }
                    },
                );
                assert_raised(memory, number);
            }
            fault::assert_silent(uffd);
        }
    });
}

#[test]
fn system_call_cannot_read_poison() {
    require!(FeatureFlags::POISON);
    for filler in each(test_name!(), 2) {
        let memory = &filler.memory;
        filler.run(0, 1, true).unwrap();
        filler.uffd.unregister(memory.start(), memory.len()).unwrap();
        let read = [0, 1].map(|number| memory.read_by_kernel(number));
        assert_eq!(read, [Err(Errno::EFAULT), Ok(0)], "{memory:?}");
    }
}

#[test]
fn poison_is_this_mapping_s_own() {
    require!(FeatureFlags::POISON);
    for filler in each(test_name!(), 1) {
        // The one has no alias, and that of the other would be registered, too.
        if matches!(filler.memory.kind(), Kind::Anonymous | Kind::SharedAnonymous) {
            continue;
        }
        let alias = filler.memory.alias();
        filler.run(0, 1, true).unwrap();
        alias.write(0, 3);
        assert_eq!(alias.read(0), 3);
        assert_eq!(filler.memory.read_by_kernel(0), Err(Errno::EFAULT));
    }
}

#[test]
fn dropping_the_page_ends_it() {
    require!(FeatureFlags::POISON);
    for filler in each(test_name!(), 1) {
        let memory = &filler.memory;
        filler.run(0, 1, true).unwrap();
        filler.assert_stopped(&filler.run(0, 1, true), 0, Errno::EEXIST);
        memory.advise(0, 1, libc::MADV_DONTNEED).unwrap();
        filler.uffd.unregister(memory.start(), memory.len()).unwrap();
        assert_eq!(memory.read_by_kernel(0), Ok(0), "{memory:?}");
    }
}
