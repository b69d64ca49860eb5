//! A handler of clones: a balloon's range is zeroed in one call, over pages that are there already; and what stops a
//! fill is told by its errno, whichever variant that comes in.

use std::thread;

use libc::c_void;
use userfaultfd::{Error, Event, FeatureFlags, RegisterMode, Uffd, UffdBuilder};

use crate::mapping::{Mapping, page_size};
use crate::support::memory::{Kind, Memory};
use crate::support::{require, test_name};

/// A page is there: at the first page, or behind some that were zeroed.
fn hit_a_present_page(error: &Error) -> bool {
    matches!(
        error,
        Error::ZeropageFailed(errno) if *errno as i32 == libc::EEXIST || *errno as i32 == libc::EAGAIN
    )
}

/// Another thread was faster.
fn is_there(error: &Error) -> bool {
    matches!(error, Error::SystemError(errno) if *errno as i32 == libc::EEXIST)
}

/// An event must be read first.
fn would_block(error: &Error) -> bool {
    matches!(error, Error::SystemError(errno) if *errno as i32 == libc::EAGAIN)
}

fn errno_of(error: &Error) -> Option<i32> {
    match error {
        Error::CopyFailed(errno) | Error::ZeropageFailed(errno) => Some(*errno as i32),
        Error::SystemError(errno) => Some(*errno as i32),
        _ => None,
    }
}

fn zeropage(uffd: &Uffd, start: *mut c_void, pages: usize) -> userfaultfd::Result<usize> {
    // SAFETY: the guest has given these pages back, or never had them.
    unsafe { uffd.zeropage(start, pages * page_size(), true) }
}

#[test]
fn range_with_pages_in_it_is_zeroed_as_far_as_it_goes() {
    require!();
    let memory = Mapping::anonymous(4);
    let uffd = UffdBuilder::new().close_on_exec(true).non_blocking(true).create().unwrap();
    uffd.register(memory.ptr, memory.len).unwrap();
    zeropage(&uffd, memory.page(2), 1).unwrap();
    memory.set(2, 5);
    let error = zeropage(&uffd, memory.ptr, 4).unwrap_err();
    assert!(hit_a_present_page(&error), "{error:?}");
    assert_eq!(errno_of(&error), Some(libc::EAGAIN));
    // Two were zeroed before it.
    let error = zeropage(&uffd, memory.ptr, 4).unwrap_err();
    assert!(hit_a_present_page(&error), "{error:?}");
    assert_eq!(errno_of(&error), Some(libc::EEXIST));
    zeropage(&uffd, memory.page(3), 1).unwrap();
    assert_eq!([0, 1, 2, 3].map(|page| memory.get(page)), [0, 0, 5, 0]);
}

/// A balloon that is inflated while the handler reads its events, and zeroes what they say.
#[test]
fn returned_balloon_pages_are_zeroed_in_bulk() {
    require!(FeatureFlags::EVENT_REMOVE);
    let memory = Mapping::anonymous(8);
    let uffd = UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        .require_features(FeatureFlags::EVENT_REMOVE)
        .create()
        .unwrap();
    uffd.register(memory.ptr, memory.len).unwrap();
    zeropage(&uffd, memory.ptr, 8).unwrap();
    memory.set(3, 9);
    thread::scope(|scope| {
        let guest = scope.spawn(|| {
            memory.discard(3);
            memory.get(3)
        });
        while !guest.is_finished() {
            match uffd.read_event().unwrap() {
                Some(Event::Remove { start, end }) => {
                    let pages = (end as usize - start as usize) / page_size();
                    match zeropage(&uffd, start, pages) {
                        Ok(_) => {}
                        Err(error) if hit_a_present_page(&error) => {}
                        Err(error) => panic!("{error:?}"),
                    }
                }
                Some(Event::Pagefault { addr, .. }) => match zeropage(&uffd, addr, 1) {
                    Ok(_) => {}
                    Err(error) if hit_a_present_page(&error) => uffd.wake(addr, page_size()).unwrap(),
                    Err(error) => panic!("{error:?}"),
                },
                Some(event) => panic!("{event:?}"),
                None => thread::yield_now(),
            }
        }
        assert_eq!(guest.join().unwrap(), 0);
    });
}

#[test]
fn clone_s_page_is_continued_once() {
    require!(FeatureFlags::MINOR_SHMEM);
    let Some(memory) = Memory::try_new(test_name!(), Kind::Memfd, 2) else { return };
    let alias = memory.alias();
    alias.write(0, 3);
    let uffd = UffdBuilder::new().close_on_exec(true).non_blocking(true).create().unwrap();
    uffd.register_with_mode(memory.start(), memory.len(), RegisterMode::MINOR).unwrap();
    // The prefix that is cached counts as success.
    assert_eq!(uffd.r#continue(memory.start(), memory.len(), true).unwrap(), page_size() as u64);
    let error = uffd.r#continue(memory.start(), page_size(), true).unwrap_err();
    assert!(is_there(&error) && !would_block(&error), "{error:?}");
    let error = uffd.r#continue(memory.at(1), page_size(), true).unwrap_err();
    assert_eq!(errno_of(&error), Some(libc::EFAULT));
    assert_eq!(memory.read(0), 3);
}
