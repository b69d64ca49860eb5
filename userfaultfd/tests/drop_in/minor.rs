//! A guest whose pages are in the page cache: minor faults, resolved by `continue`.

use std::os::unix::io::AsRawFd;
use std::thread;

use libc::c_void;
use userfaultfd::{Event, FaultKind, FeatureFlags, RegisterMode, Uffd, UffdBuilder};

use crate::mapping::{Mapping, memfd, page_size};
use crate::support::require;

/// How trying to map a range went.
#[derive(Debug, PartialEq)]
enum Outcome {
    Mapped,
    Retry,
    Gone,
    Failed(i32),
}

/// Maps a range, over as many calls as it takes.
fn map(uffd: &Uffd, start: usize, len: usize) -> Outcome {
    let mut done = 0;
    while done < len {
        let addr = (start + done) as *mut c_void;
        match uffd.r#continue(addr, len - done, true) {
            Ok(mapped) => {
                let mapped = usize::try_from(mapped).expect("a count");
                assert!(mapped > 0 && mapped <= len - done, "{mapped}");
                done += mapped;
            }
            Err(userfaultfd::Error::SystemError(errno)) => match errno as i32 {
                libc::EEXIST => {
                    uffd.wake(addr, page_size()).expect("a wake");
                    done += page_size();
                }
                libc::EAGAIN => return Outcome::Retry,
                libc::ESRCH => return Outcome::Gone,
                errno => return Outcome::Failed(errno),
            },
            Err(error) => panic!("{error}"),
        }
    }
    Outcome::Mapped
}

#[test]
fn cached_pages_are_mapped_in_parts() {
    require!(FeatureFlags::MINOR_SHMEM);
    let file = memfd(4);
    let (guest, source) = (Mapping::shared(4, file.as_raw_fd()), Mapping::shared(4, file.as_raw_fd()));
    for page in 0..3 {
        source.set(page, 10 + page as u8);
    }
    let uffd =
        UffdBuilder::new().close_on_exec(true).require_features(FeatureFlags::MINOR_SHMEM).create().unwrap();
    uffd.register_with_mode(guest.ptr, guest.len, RegisterMode::MINOR).unwrap();

    thread::scope(|scope| {
        let reader = scope.spawn(|| guest.get(1));
        let Some(Event::Pagefault { kind, addr, .. }) = uffd.read_event().unwrap() else {
            panic!("no fault")
        };
        assert_eq!((kind, addr), (FaultKind::Minor, guest.page(1)));
        assert_eq!(map(&uffd, addr as usize, page_size()), Outcome::Mapped);
        assert_eq!(reader.join().unwrap(), 11);
    });

    // The second page is mapped already, and the fourth isn't in the cache.
    assert_eq!(uffd.r#continue(guest.ptr, guest.len, true).unwrap(), page_size() as u64);
    assert_eq!(map(&uffd, guest.ptr as usize, guest.len), Outcome::Failed(libc::EFAULT));
    assert_eq!((guest.get(0), guest.get(2)), (10, 12));
}
