//! A pool of memories for sandboxed programs: a blocking loop, which ends when the pool is unmapped.

use std::thread;

use libc::c_void;
use userfaultfd::{Event, FeatureFlags, IoctlFlags, Result, Uffd, UffdBuilder};

use crate::mapping::{Mapping, page_size};
use crate::support::{require, test_name};

/// Retries while the layout changes, before it gives up.
unsafe fn zeropage(uffd: &Uffd, start: *mut c_void, len: usize, wake: bool, tries: usize) -> Result<usize> {
    for _ in 1..tries {
        // SAFETY: the caller's promises are the same.
        match unsafe { uffd.zeropage(start, len, wake) } {
            Err(userfaultfd::Error::ZeropageFailed(nix::errno::Errno::EAGAIN)) => thread::yield_now(),
            result => return result,
        }
    }
    // SAFETY: the caller's promises are the same.
    unsafe { uffd.zeropage(start, len, wake) }
}

/// Serves the pool until it is unmapped as a whole. Returns how many pages it took.
fn serve(uffd: Uffd, start: usize, end: usize) -> usize {
    let mut pages = 0;
    loop {
        match uffd.read_event().expect("an event") {
            Some(Event::Unmap { start: from, end: to }) => {
                assert_eq!((from as usize, to as usize), (start, end), "unexpected region");
                return pages;
            }
            Some(Event::Pagefault { addr, .. }) => {
                assert!((start..end).contains(&(addr as usize)), "{addr:p} is not of the pool");
                // SAFETY: the pool is zero where nothing was written.
                unsafe { zeropage(&uffd, addr, page_size(), true, 1000) }.expect("a zero page");
                pages += 1;
            }
            Some(_) => {}
            None => panic!("no event from a blocking descriptor"),
        }
    }
}

#[test]
fn pool_is_served_until_it_is_unmapped() {
    require!(FeatureFlags::EVENT_UNMAP);
    let pool = Mapping::anonymous(8);
    let (start, end) = (pool.ptr as usize, pool.ptr as usize + pool.len);
    let uffd = UffdBuilder::new()
        .close_on_exec(true)
        .require_features(FeatureFlags::EVENT_UNMAP)
        .create()
        .expect("a userfaultfd");
    let ioctls = uffd.register(pool.ptr.cast(), pool.len).expect("a registered pool");
    assert!(
        ioctls.contains(IoctlFlags::WAKE | IoctlFlags::COPY | IoctlFlags::ZEROPAGE),
        "{} lacks operations: {ioctls:?}",
        test_name!()
    );
    let handler = thread::spawn(move || serve(uffd, start, end));
    for instance in 0..4 {
        pool.set(2 * instance, 1);
        assert_eq!((pool.get(2 * instance), pool.get(2 * instance + 1)), (1, 0));
    }
    drop(pool);
    assert_eq!(handler.join().unwrap(), 8);
}
