//! Workers that are added, or can't be.

#![expect(unsafe_code, reason = "the memory is the test's")]

use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::thread;

use crate::pager::{Error, FaultAround, PageData, Pager, Region};
use crate::support::mapping::Mapping;
use crate::support::memory::Memory;
use crate::support::{child, require, test_name, uffd};
use crate::sync_point::Point;
use crate::sync_point::tests::at;
use crate::{Errno, FeatureFlags};

/// With any number of mappings left, which are lacking for the stack of a thread, for its guard, or for its heap.
#[test]
fn a_worker_is_not_added_where_memory_is_out() {
    require!();
    child::run_well(test_name!(), || {
        // Whether each try to add a worker succeeded, since the source was asked first.
        let tries = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
        let tell = Arc::clone(&tries);
        let _armed = at(Point::AfterAdd, 0..2, move |added| {
            tell.0.lock().unwrap().push(added == 1);
            tell.1.notify_all();
        });
        let mut refused = false;
        for pairs in 0..12 {
            let pager = Pager::new().unwrap();
            let memory = Memory::anonymous(2);
            let tries_of_source = Arc::clone(&tries);
            let source = move |_: u64, bytes: &mut [u8]| {
                let (tries, changed) = &*tries_of_source;
                drop(changed.wait_while(tries.lock().unwrap(), |tries| tries.is_empty()).unwrap());
                bytes.fill(7);
                Ok(PageData::Data)
            };
            let region =
                Region::new(memory.at(0).addr(), memory.len(), source).fault_around(FaultAround::Page);
            // SAFETY: bytes are good whatever they are, and only raw pointers lead to them.
            let added = unsafe { pager.add_own(uffd(FeatureFlags::empty()), [region]) };
            drop(added.unwrap());
            let room = tries.0.lock().unwrap().capacity();
            tries.0.lock().unwrap().reserve(64_usize.saturating_sub(room));
            tries.0.lock().unwrap().clear();
            // Threads that are there before the memory is out.
            let (memory, go) = (&memory, Barrier::new(3));
            let seen = thread::scope(|scope| {
                let readers = [0, 1].map(|page| {
                    let go = &go;
                    scope.spawn(move || {
                        go.wait();
                        memory.read(page)
                    })
                });
                let used_up = Mapping::use_up(test_name!(), pairs);
                go.wait();
                let seen = readers.map(|reader| reader.join().unwrap());
                used_up.map(|_| seen)
            });
            let Some(seen) = seen else { return };
            refused |= tries.0.lock().unwrap().contains(&false);
            assert_eq!(seen, [7; 2], "{pairs} pairs of mappings left");
        }
        assert!(refused, "every worker was added");
    });
}

/// What `add` needs of the system is refused, whatever it is.
#[test]
fn a_region_is_refused_where_memory_is_out() {
    require!();
    child::run_well(test_name!(), || {
        let pager = Pager::new().unwrap();
        let mut added = false;
        for pairs in 0..12 {
            let memory = Memory::anonymous(1);
            let source = |_: u64, _: &mut [u8]| Ok(PageData::Zero);
            let region = Region::new(memory.at(0).addr(), memory.len(), source);
            let uffd = uffd(FeatureFlags::empty());
            let Some(used_up) = Mapping::use_up(test_name!(), pairs) else { return };
            // SAFETY: bytes are good whatever they are, and only raw pointers lead to them.
            let answer = unsafe { pager.add_own(uffd, [region]) };
            drop(used_up);
            match answer {
                Ok(answer) => {
                    drop(pager.remove(answer.descriptor).unwrap());
                    added = true;
                }
                Err(refused) => {
                    let errno = match &refused.error {
                        Error::System(error) => error.raw_os_error(),
                        Error::Uffd(error) | Error::Register { error, .. } => {
                            error.errno().map(|errno| errno as i32)
                        }
                        other => panic!("{pairs} pairs left: {other:?}"),
                    };
                    assert_eq!(errno, Some(Errno::ENOMEM as i32), "{pairs} pairs left");
                }
            }
        }
        assert!(added, "nothing could be added");
    });
}
