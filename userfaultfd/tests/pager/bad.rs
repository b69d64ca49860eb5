//! What a pager refuses: at once, by name, with the descriptor, and it goes on serving others.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use userfaultfd::pager::{
    BytesSource, Error, FaultAround, FileSource, PageData, PageSource, Pager, Refused, Region, ZeroSource,
};
use userfaultfd::{FeatureFlags, LazyMemory, Uffd, UffdBuilder};

use crate::scene::{Pages, check, serve};
use crate::support::mapping::{self, Mapping};
use crate::support::memory::{Kind, Memory};
use crate::support::proc::wait_until;
use crate::support::raw::{pipe, unshaken};
use crate::support::{child, dead, features, page, require, test_name, uffd};

/// A pager that serves some memory, which it goes on to do whatever it refuses.
struct Busy {
    pager: Pager,
    memory: Memory,
    checked: std::cell::Cell<usize>,
}

impl Busy {
    fn new() -> Self {
        let (pager, memory) = (Pager::new().unwrap(), Memory::anonymous(40));
        let region = Region::new(memory.start().expose_provenance(), memory.len(), Pages::new(page()));
        serve(&pager, uffd(FeatureFlags::empty()), region.fault_around(FaultAround::Page));
        Self { pager, memory, checked: std::cell::Cell::new(0) }
    }

    /// Adds what must be refused. Returns why.
    #[track_caller]
    fn refuses(&self, uffd: Uffd, regions: impl IntoIterator<Item = Region>) -> (Error, Uffd) {
        // SAFETY: bytes are good whatever they are, and only raw pointers lead to the memory of tests.
        let refused = unsafe { self.pager.add_own(uffd, regions) };
        let Refused { uffd, error } = refused.expect_err("refused");
        let number = self.checked.get();
        check(&self.memory, number, number);
        self.checked.set(number + 1);
        assert_eq!(self.pager.descriptors().len(), 1);
        assert!(!error.to_string().is_empty());
        (error, uffd)
    }
}

/// Checks that an error tells the reason, once: causes included.
#[track_caller]
fn says((error, uffd): (Error, Uffd), reason: &str) {
    assert!(matches!(error, Error::Register { .. }), "{error:?}");
    let refused = Refused { uffd, error };
    let mut text = refused.to_string();
    let mut cause = std::error::Error::source(&refused);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    assert_eq!(text.matches(reason).count(), 1, "{text}");
}

macro_rules! refused {
    ($busy:ident, $uffd:expr, $regions:expr, $error:pat) => {{
        let (error, uffd) = $busy.refuses($uffd, $regions);
        assert!(matches!(error, $error), "{error:?}");
        uffd
    }};
}

#[test]
fn regions_that_cannot_be() {
    require!();
    let (busy, memory) = (Busy::new(), Memory::anonymous(8));
    let (start, page) = (memory.start().expose_provenance(), page());
    let region = |first: usize, pages: usize| Region::new(start + first * page, pages * page, ZeroSource);
    let new = || uffd(FeatureFlags::empty());
    let uffd = refused!(busy, new(), [region(0, 3), region(2, 2)], Error::Overlap { .. });
    // What is given back is good.
    let uffd = refused!(busy, uffd, [region(0, 0)], Error::EmptyRegion { .. });
    let uffd = refused!(busy, uffd, [Region::new(start + 1, page, ZeroSource)], Error::Unaligned { .. });
    let uffd = refused!(busy, uffd, [Region::new(start, page - 1, ZeroSource)], Error::Unaligned { .. });
    let last = usize::MAX - page + 1;
    let uffd = refused!(busy, uffd, [Region::new(last, page, ZeroSource)], Error::Unaligned { .. });
    let uffd = refused!(busy, uffd, [region(0, 1).page_size(0)], Error::PageSize { .. });
    let uffd = refused!(busy, uffd, [region(0, 1).page_size(page - 1)], Error::PageSize { .. });
    let uffd = refused!(busy, uffd, [region(0, 1).page_size(page / 2)], Error::PageSize { .. });
    for block in [0, page + 1, page / 2] {
        let _uffd = refused!(busy, new(), [region(0, 1).block(block)], Error::Block { .. });
    }
    let short = || BytesSource::new(vec![1; page + 1]);
    let long = Region::new(start, 3 * page, short());
    let uffd = refused!(busy, uffd, [long], Error::BeyondSource { source_len: _, .. });
    let beyond = Region::new(start, 2 * page, short()).offset(page as u64);
    let uffd = refused!(busy, uffd, [beyond], Error::BeyondSource { .. });
    let beyond = Region::new(start, 2 * page, ZeroSource).offset(u64::MAX - page as u64);
    let uffd = refused!(busy, uffd, [beyond], Error::BeyondSource { .. });
    // Where in its file it lies.
    let file = || std::fs::File::from(mapping::memfd(0, 2));
    for offset in [u64::MAX - page as u64 + 1, i64::MAX as u64 + 1 - page as u64, 1] {
        let region = Region::new(start, 2 * page, ZeroSource).minor(file(), offset);
        let _uffd = refused!(busy, new(), [region], Error::FileRange { .. });
    }
    // All of it is good then.
    let added = serve(&busy.pager, uffd, Region::new(start, 2 * page, short()));
    assert_eq!((memory.read(1), memory.content(1)[1]), (1, 0));
    // SAFETY: only raw pointers lead to the memory of tests.
    let again = unsafe { busy.pager.add_own_region(added.descriptor, region(1, 1)) };
    assert!(matches!(again, Err(Error::Overlap { other, .. }) if other == start), "{again:?}");
    busy.pager.remove(added.descriptor).unwrap();
    // SAFETY: as above.
    let gone = unsafe { busy.pager.add_own_region(added.descriptor, region(4, 1)) };
    assert!(matches!(gone, Err(Error::NotServed)), "{gone:?}");
    for gone in [busy.pager.missing(added.regions[0]).map(drop), busy.pager.remove_region(added.regions[0])] {
        assert!(matches!(gone, Err(Error::NotServed)), "{gone:?}");
    }
}

#[test]
fn memory_that_cannot_be() {
    require!();
    let (busy, page) = (Busy::new(), page());
    let new = || uffd(FeatureFlags::empty());
    // Nothing is mapped there.
    let nothing = Region::new(crate::support::nowhere().addr(), page, ZeroSource);
    says(busy.refuses(new(), [nothing]), "nothing is mapped at");
    // A file that isn't in memory.
    if let Some(file) = mapping::regular_file(test_name!(), 1) {
        let mapping = Mapping::shared(1, std::os::fd::AsFd::as_fd(&file)).unwrap();
        let region = Region::new(mapping.start.addr(), page, ZeroSource);
        says(busy.refuses(new(), [region]), "is a file");
    }
    // Registered with another.
    let (memory, other) = (Memory::anonymous(8), new());
    other.register(memory.start(), page).unwrap();
    let region = || Region::new(memory.start().addr(), 2 * page, ZeroSource);
    says(busy.refuses(new(), [region()]), "is registered with another userfaultfd, for MISSING");
    // Served by the same pager already, with another descriptor.
    let served = Region::new(busy.memory.start().addr(), page, ZeroSource);
    refused!(busy, new(), [served], Error::Register { .. });
    // Small pages said to be larger ones.
    let region = Region::new(memory.at(2).addr().next_multiple_of(2 * page), 2 * page, ZeroSource);
    refused!(busy, new(), [region.page_size(2 * page)], Error::PageSize { .. });
    // Memory without minor faults.
    let file = std::fs::File::from(mapping::memfd(0, 8));
    let region = Region::new(memory.at(4).addr(), page, ZeroSource).minor(file, 0);
    if features().contains(FeatureFlags::MINOR_SHMEM) {
        says(busy.refuses(new(), [region]), "is private anonymous memory");
    } else {
        says(busy.refuses(new(), [region]), "MINOR_SHMEM");
    }
}

#[test]
fn minor_regions_are_filled_protected_since_linux_6_4() {
    require!(FeatureFlags::MINOR_SHMEM | FeatureFlags::WP_HUGETLBFS_SHMEM);
    let busy = Busy::new();
    let memory = Memory::new(Kind::Memfd, 2);
    let file = std::fs::File::from(memory.file().try_clone().unwrap());
    let region = Region::new(memory.start().expose_provenance(), memory.len(), Pages::new(page()));
    let region = region.minor(file, 0).write_protected();
    if features().contains(FeatureFlags::WP_UNPOPULATED) {
        serve(&busy.pager, uffd(FeatureFlags::empty()), region);
        check(&memory, 1, 1);
    } else {
        refused!(busy, uffd(FeatureFlags::empty()), [region], Error::Register { .. });
    }
}

#[test]
fn huge_pages_said_to_be_small_ones() {
    require!(FeatureFlags::MISSING_HUGETLBFS);
    let Some(memory) = Memory::try_new(test_name!(), Kind::PrivateHugetlb, 2) else { return };
    let busy = Busy::new();
    let region = Region::new(memory.start().addr(), memory.len(), ZeroSource);
    refused!(busy, uffd(FeatureFlags::empty()), [region], Error::PageSize { .. });
    let half = Region::new(memory.start().addr(), page(), ZeroSource);
    refused!(busy, uffd(FeatureFlags::empty()), [half], Error::Register { .. } | Error::PageSize { .. });
    let region = || Region::new(memory.start().expose_provenance(), memory.len(), Pages::new(memory.page()));
    serve(&busy.pager, uffd(FeatureFlags::empty()), region().page_size(memory.page()));
    check(&memory, 1, 1);
}

#[test]
fn descriptors_that_cannot_be() {
    require!();
    let busy = Busy::new();
    let memory = Memory::anonymous(1);
    let region = || Region::new(memory.start().addr(), page(), ZeroSource);
    let (reader, _writer) = pipe();
    refused!(busy, Uffd::from(OwnedFd::from(reader)), [region()], Error::Register { .. });
    // No handshake.
    refused!(busy, Uffd::from(unshaken(0)), [region()], Error::Register { .. });
    if features().contains(FeatureFlags::SIGBUS) {
        let signals = uffd(FeatureFlags::SIGBUS);
        let signals = refused!(busy, signals, [region()], Error::NoMessages);
        // One that was handed over is known by what /proc tells.
        let adopted = Uffd::from(OwnedFd::from(signals));
        refused!(busy, adopted, [region()], Error::NoMessages);
    }
}

#[test]
fn memory_of_this_process_takes_the_unsafe_way() {
    require!();
    let busy = Busy::new();
    for kind in [Kind::Anonymous, Kind::Memfd] {
        let memory = Memory::new(kind, 2);
        let region = || Region::new(memory.start().expose_provenance(), memory.len(), Pages::new(page()));
        let Refused { uffd, error } = busy.pager.add(uffd(FeatureFlags::empty()), [region()]).unwrap_err();
        assert!(
            matches!(error, Error::OwnMemory { address } if address == memory.start().addr()),
            "{error:?}"
        );
        let added = serve(&busy.pager, uffd, region());
        check(&memory, 1, 1);
        let own = busy.pager.add_region(added.descriptor, region());
        assert!(matches!(own, Err(Error::Overlap { .. })), "{own:?}");
        busy.pager.remove(added.descriptor).unwrap();
    }
    check(&busy.memory, 0, 0);
}

#[test]
fn ended_process_is_reported() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(1);
        let gone = dead::uffd(&memory);
        let busy = Busy::new();
        let region = || Region::new(memory.start().addr(), page(), ZeroSource);
        let gone = refused!(busy, gone, [region()], Error::TargetGone);
        let Refused { error, .. } = busy.pager.add(gone, [region()]).unwrap_err();
        assert!(matches!(error, Error::TargetGone), "{error:?}");
    });
}

#[test]
fn missing_parts_that_cannot_be() {
    require!();
    let (busy, memory, page) = (Busy::new(), Memory::anonymous(4), page());
    let start = memory.start().expose_provenance();
    let region = |address, len, offset| {
        let part =
            userfaultfd::pager::MissingRange::new(userfaultfd::pager::RegionId::new(7), address, len, offset);
        Region::new(start, 4 * page, BytesSource::new(vec![1; 4 * page])).missing([part])
    };
    let uffd = uffd(FeatureFlags::empty());
    let uffd = refused!(busy, uffd, [region(start + 1, page, None)], Error::Unaligned { .. });
    let uffd = refused!(busy, uffd, [region(start, page - 1, None)], Error::Unaligned { .. });
    let beyond = region(start, 2 * page, Some(3 * page as u64));
    let uffd = refused!(busy, uffd, [beyond], Error::BeyondSource { .. });
    let beyond = region(start, page, Some(u64::MAX - 1));
    let uffd = refused!(busy, uffd, [beyond], Error::BeyondSource { .. });
    serve(&busy.pager, uffd, region(start, usize::MAX / page * page, None));
    assert_eq!(memory.read(3), 0);
}

#[test]
fn panicking_length_of_source_is_an_error() {
    require!();
    struct Panics;
    impl userfaultfd::pager::PageSource for Panics {
        fn read(&self, _: u64, _: &mut [u8]) -> std::io::Result<userfaultfd::pager::PageData> {
            Ok(userfaultfd::pager::PageData::Zero)
        }
        fn len(&self) -> Option<u64> {
            panic!("asked")
        }
    }
    let (busy, memory) = (Busy::new(), Memory::anonymous(1));
    let region = Region::new(memory.start().addr(), page(), Panics);
    let (error, _uffd) = busy.refuses(uffd(FeatureFlags::empty()), [region]);
    assert!(matches!(error, Error::Source { .. }) && error.to_string().contains("asked"), "{error}");
}

#[test]
fn no_memory_for_states_is_an_error() {
    require!();
    // More pages than any address space has states for: the length is a multiple of a page, and ends before the last.
    let busy = Busy::new();
    let region = Region::new(page(), usize::MAX / 2 / page() * page(), ZeroSource);
    let (error, _) = busy.refuses(uffd(FeatureFlags::empty()), [region]);
    assert!(matches!(error, Error::Register { .. } | Error::System(_)), "{error:?}");
}

#[test]
fn sources_that_are_refused_are_so_when_they_are_made() {
    require!();
    let (reader, _writer) = pipe();
    assert!(FileSource::new(reader).is_err());
}

fn is_nonblocking(uffd: &Uffd) -> bool {
    // SAFETY: asks for the flags of an open descriptor.
    unsafe { libc::fcntl(uffd.as_raw_fd(), libc::F_GETFL) & libc::O_NONBLOCK != 0 }
}

/// Has memory of the pager that it is a source of, and tells when it is dropped.
struct Overlay {
    base: LazyMemory,
    dropped: Arc<AtomicBool>,
}

impl PageSource for Overlay {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        page.copy_from_slice(&self.base[offset as usize..][..page.len()]);
        Ok(PageData::Data)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        self.dropped.store(true, Ordering::SeqCst);
    }
}

#[test]
fn refused_regions_are_freed_and_change_nothing() {
    require!();
    let pager = Arc::new(Pager::new().unwrap());
    let overlay = |dropped: &Arc<AtomicBool>| {
        let base = LazyMemory::builder(Pages::new(page())).len(4 * page()).pager(&pager).build().unwrap();
        Overlay { base, dropped: Arc::clone(dropped) }
    };
    let memory = Memory::anonymous(4);
    let start = memory.start().expose_provenance();
    for one_is_good in [false, true] {
        let dropped = [false, false].map(|_| Arc::new(AtomicBool::new(false)));
        let blocking = UffdBuilder::new().close_on_exec(true).create().unwrap();
        let first = if one_is_good { start } else { 12345 };
        let regions = [
            Region::new(first, 2 * page(), overlay(&dropped[0])),
            Region::new(start, page(), overlay(&dropped[1])),
        ];
        // SAFETY: bytes are good whatever they are, and only raw pointers lead to the memory of tests.
        let Refused { uffd, error } = unsafe { pager.add_own(blocking, regions) }.unwrap_err();
        assert_eq!(matches!(error, Error::Overlap { .. }), one_is_good, "{error}");
        wait_until(|| dropped.iter().all(|dropped| dropped.load(Ordering::SeqCst)));
        assert!(!is_nonblocking(&uffd));
    }
    wait_until(|| pager.statistics().missing_pages == 16);
    let dropped = Arc::new(AtomicBool::new(false));
    let refused = pager.add(uffd(FeatureFlags::empty()), [Region::new(start, page(), overlay(&dropped))]);
    assert!(matches!(refused.unwrap_err().error, Error::OwnMemory { .. }));
    wait_until(|| dropped.load(Ordering::SeqCst));
}

#[test]
fn no_limit_of_threads_is_a_limit() {
    require!();
    let memory = Memory::anonymous(2);
    let pager = Pager::builder().max_threads(usize::MAX).build().unwrap();
    serve(&pager, uffd(FeatureFlags::empty()), crate::scene::region(&memory, Pages::new(page())));
    check(&memory, 1, 1);
}
