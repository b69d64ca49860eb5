//! UFFDIO_COPY.

use userfaultfd::{Event, FaultKind, ReadWrite, UffdBuilder};

use crate::support::memory::{Kind, Memory};
use crate::support::{self, require, test_name};

#[test]
fn missing_fault_is_resolved_by_copy() {
    require!();
    for kind in Kind::ALL {
        if !support::has_features(test_name!(), kind.features()[0]) {
            continue;
        }
        let Some(memory) = Memory::try_new(test_name!(), kind, 2) else { continue };
        let uffd = UffdBuilder::new().create().unwrap();
        uffd.register(memory.start(), memory.len()).unwrap();
        let content = vec![7u8; memory.page()];
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| memory.read(1));
            let event = uffd.read_event().unwrap();
            let Some(Event::Pagefault { kind: FaultKind::Missing, rw: ReadWrite::Read, addr, .. }) = event
            else {
                panic!("{event:?}")
            };
            assert_eq!(addr, memory.at(1), "{memory:?}");
            // SAFETY: the content lives on, and the memory is only read by raw pointers.
            let copied = unsafe { uffd.copy(content.as_ptr().cast(), addr, memory.page(), true) };
            assert_eq!(copied.unwrap(), memory.page());
            assert_eq!(reader.join().unwrap(), 7);
        });
    }
}
