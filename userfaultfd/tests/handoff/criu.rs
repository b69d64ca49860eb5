//! Restores that fail, with a process that plays CRIU.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};

use userfaultfd::handoff::{CriuError, CriuImages, Dialect, Listener, Offer, send};
use userfaultfd::pager::Pager;

use crate::monitor::path;
use crate::peers::registered;
use crate::support::child;
use crate::support::memory::Memory;
use crate::support::{require, test_name};

#[test]
fn criu_is_killed_when_images_fail() {
    require!();
    child::run_well(test_name!(), || {
        for panics in [false, true] {
            let path = path();
            let mut listener = Listener::bind(&path).unwrap().dialects([Dialect::Criu]);
            let criu = child::fork(|| {
                let stream = UnixStream::connect(&path).unwrap();
                let memory = Memory::anonymous(1);
                let uffd = registered(&memory);
                send(Dialect::Criu, &stream, &Offer::new(&uffd, [])).unwrap();
                drop(uffd);
                // As the process that it restores does.
                panic!("its memory shows {}", memory.read(0));
            });
            let handoff = listener.accept().unwrap();
            let images = CriuImages::with(move |_| {
                assert!(!panics, "as a program's function may");
                Err(ErrorKind::NotFound.into())
            });
            let pager = Pager::new().unwrap();
            let served = catch_unwind(AssertUnwindSafe(|| pager.serve_criu(handoff, &images, |_| {})));
            match served {
                Ok(served) => assert!(!panics && matches!(served, Err(CriuError::Image { .. }))),
                Err(_) => assert!(panics),
            }
            assert_eq!(criu.wait(), libc::SIGKILL, "{panics}");
        }
    });
}
