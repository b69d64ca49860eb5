//! What a fork's child inherits is the parent's.

use std::panic::{AssertUnwindSafe, catch_unwind};

use userfaultfd::Error;

use crate::support::{child, page, require, test_name};
use crate::{image, methods, pristine};

#[test]
fn memory_in_child_is_refused_and_stays_parents() {
    require!();
    child::run_well(test_name!(), || {
        for method in methods(test_name!()) {
            let image = image(8);
            let mut memory = pristine(&image, method);
            memory[3 * page()] = 0;
            let mut memory = Some(memory);
            child::fork(|| {
                let mut inherited = memory.take().unwrap();
                assert!(matches!(inherited.reset(), Err(Error::OtherProcess)));
                assert!(matches!(inherited.release(), Err(Error::OtherProcess)));
                assert!(matches!(inherited.set_always_dirty(0..page(), true), Err(Error::OtherProcess)));
                assert!(catch_unwind(AssertUnwindSafe(|| inherited[0])).is_err());
                assert!(catch_unwind(AssertUnwindSafe(|| inherited[0] = 1)).is_err());
                drop(inherited);
                // Its own works.
                let mut own = pristine(&image, method);
                own[5] = 0;
                own.reset().unwrap();
                assert!(own[..] == image);
            })
            .succeed();
            let mut memory = memory.unwrap();
            memory[7 * page()] = 0;
            memory.reset().unwrap();
            assert!(memory[..] == image, "{method:?}");
        }
    });
}
