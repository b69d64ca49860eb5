//! What a fork's child inherits is the parent's: it can neither use it nor harm it.

use userfaultfd::snapshot::{Error, Options};
use userfaultfd::{FeatureFlags, Snapshot};

use crate::image::{Image, addresses, number};
use crate::support::memory::Memory;
use crate::support::{child, require, test_name};

/// The userfaultfds, sockets and files of /proc that this process has open.
fn open() -> Vec<String> {
    let link = |fd: i32| std::fs::read_link(format!("/proc/self/fd/{fd}")).ok();
    let links = (3..64).filter_map(link).map(|link| link.to_string_lossy().into_owned());
    links
        .filter(|link| ["anon_inode:", "socket:", "/proc/"].iter().any(|start| link.starts_with(start)))
        .collect()
}

#[test]
fn snapshot_in_child_is_refused_and_stays_parents() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    child::run_well(test_name!(), || {
        for waits in [false, true] {
            let memory = Memory::anonymous(8);
            let (before, image) = (number(&memory, 1), Image::closed());
            let snapshot = Snapshot::begin(addresses(&memory), image.clone()).unwrap();
            image.wait_for_piece();
            let mut snapshot = Some(snapshot);
            let child = child::fork(|| {
                let inherited = snapshot.take().unwrap();
                inherited.abort();
                assert!(inherited.is_finished());
                if waits {
                    let error = inherited.wait().map(drop).unwrap_err();
                    assert!(matches!(error, Error::Kernel(userfaultfd::Error::OtherProcess)), "{error:?}");
                } else {
                    drop(inherited);
                }
                // Not all numbers need be closed: the thread may be closing them itself when the process forks, as all
                // is in its buffers. Its own, of the same memory.
                let (now, own) = (number(&memory, 3), Image::new());
                Snapshot::begin(addresses(&memory), own.clone()).unwrap().wait().unwrap();
                assert_eq!(own.content(&memory), now);
            });
            let status = child.wait();
            if status == 0 {
                memory.write(5, 99);
            }
            image.open();
            assert_eq!(status, 0);
            snapshot.unwrap().wait().unwrap();
            assert_eq!(image.content(&memory), before);
        }
    });
}

#[test]
fn series_in_a_child_is_refused_and_stays_the_parents() {
    require!(FeatureFlags::PAGEFAULT_FLAG_WP);
    child::run_well(test_name!(), || {
        let (memory, none) = (Memory::anonymous(6), open());
        number(&memory, 1);
        let mut series = Options::new().range(addresses(&memory)).series().unwrap();
        series.begin(Image::new()).unwrap().wait().unwrap();
        let mut series = Some(series);
        child::fork(|| {
            let mut inherited = series.take().unwrap();
            let error = inherited.begin(Image::new()).map(drop).unwrap_err();
            assert!(matches!(error, Error::Kernel(userfaultfd::Error::OtherProcess)), "{error:?}");
            drop(inherited);
            assert_eq!(open(), none);
        })
        .succeed();
        memory.write(4, 51);
        let image = Image::new();
        series.as_mut().unwrap().begin(image.clone()).unwrap().wait().unwrap();
        assert_eq!(image.pages(), [4]);
    });
}
