//! Memory restored lazily from a snapshot.

use userfaultfd::pager::FaultAround;
use userfaultfd::snapshot::{Options, Snapshot, SnapshotReader, SnapshotWriter};
use userfaultfd::{FeatureFlags, LazyMemory};

use crate::file::Scratch;
use crate::image::{addresses, number};
use crate::support::memory::Memory;
use crate::support::{page, require, test_name};

const WRITE_PROTECT: FeatureFlags = FeatureFlags::PAGEFAULT_FLAG_WP;

#[test]
fn restored_lazy_memory_equals_saved_memory() {
    require!(WRITE_PROTECT);
    let memory = Memory::anonymous(40);
    let before = number(&memory, 0);
    let scratch = Scratch::new(test_name!());
    let writer = SnapshotWriter::create(&scratch.0).unwrap();
    let snapshot = Snapshot::begin(addresses(&memory), writer).unwrap();
    number(&memory, 7);
    snapshot.wait().unwrap();

    let restored = LazyMemory::new(memory.len(), SnapshotReader::open(&scratch.0).unwrap()).unwrap();
    // From the end, so that each page is a fault.
    for number in (0..40).rev() {
        assert_eq!(restored[number * page()], before[number]);
        assert_eq!(restored[number * page() + 1], 0);
    }
}

#[test]
fn restored_lazy_memory_continues_its_chain() {
    require!(WRITE_PROTECT);
    let memory = Memory::anonymous(8);
    number(&memory, 1);
    let mut series = Options::new().range(addresses(&memory)).series().unwrap();
    let scratches = [0, 1, 2].map(|number| Scratch::new(&format!("{}{number}", test_name!())));
    let mut parent = None;
    for (round, scratch) in scratches.iter().enumerate() {
        memory.write(round, 100 + round as u8);
        let mut writer = SnapshotWriter::create(&scratch.0).unwrap();
        if let Some(parent) = parent {
            writer = writer.follows(parent);
        }
        parent = Some(writer.id());
        series.begin(writer).unwrap().wait().unwrap();
    }
    let [first, second, third] =
        scratches.each_ref().map(|scratch| SnapshotReader::open(&scratch.0).unwrap());
    let chain = third.on(second.on(first).unwrap()).unwrap();
    let mut restored = LazyMemory::new(memory.len(), chain).unwrap();
    let now: Vec<u8> = (0..8).map(|number| restored[number * page()]).collect();
    assert_eq!(now, (0..8).map(|page| memory.read(page)).collect::<Vec<_>>());
    restored[3 * page()] = 77;
    assert_eq!(restored[3 * page()], 77);

    // What is saved of it begins with all, and so follows nothing.
    let [base, next] = [3, 4].map(|number| Scratch::new(&format!("{}{number}", test_name!())));
    let mut series = restored.series().unwrap();
    let writer =
        SnapshotWriter::create(&base.0).unwrap().follows(SnapshotReader::open(&scratches[2].0).unwrap().id());
    let refused = series.begin(writer).and_then(|snapshot| snapshot.wait().map(drop)).unwrap_err();
    assert!(refused.to_string().contains("a snapshot of everything follows none"), "{refused}");
    let writer = SnapshotWriter::create(&base.0).unwrap();
    let parent = writer.id();
    series.begin(writer).unwrap().wait().unwrap();
    // Its changes follow that.
    restored[5 * page()] = 78;
    let writer = SnapshotWriter::create(&next.0).unwrap().follows(parent);
    series.begin(writer).unwrap().wait().unwrap();
    let now: Vec<u8> = restored.to_vec();
    drop((series, restored));
    let [base, next] = [base, next].map(|scratch| SnapshotReader::open(&scratch.0).unwrap());
    assert_eq!(next.data_len(), page() as u64, "what has changed alone");
    let again = LazyMemory::new(now.len(), next.on(base).unwrap()).unwrap();
    assert!(again[..] == now[..]);
    assert_eq!([0, 3, 5].map(|number| again[number * page()]), [100, 77, 78]);
}

/// A snapshot is saved to the path from which memory is being restored.
#[test]
fn restored_memory_keeps_reading_replaced_file() {
    require!(WRITE_PROTECT);
    const PAGES: usize = 64;
    let memory = Memory::anonymous(PAGES);
    let scratch = Scratch::new(test_name!());
    let save = || {
        let writer = SnapshotWriter::create(&scratch.0).unwrap();
        Snapshot::begin(addresses(&memory), writer).unwrap().wait().unwrap();
    };
    let before = number(&memory, 1);
    save();
    let builder = LazyMemory::builder(SnapshotReader::open(&scratch.0).unwrap());
    let restored = builder.fault_around(FaultAround::Page).build().unwrap();
    assert_eq!(restored[3 * page()], before[3]);
    let now = number(&memory, 100);
    save();
    assert!((0..PAGES).all(|number| restored[number * page()] == before[number]));
    let later = LazyMemory::new(memory.len(), SnapshotReader::open(&scratch.0).unwrap()).unwrap();
    assert!((0..PAGES).all(|number| later[number * page()] == now[number]));
}
