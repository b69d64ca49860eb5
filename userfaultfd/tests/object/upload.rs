//! `ObjectWriter`: objects that are there as a whole or not at all, and snapshots in them.

use std::io::{ErrorKind, Write};
use std::sync::Arc;

use object_store::ObjectStore;
use userfaultfd::pager::{BytesSource, ObjectSource, PageSource, RemoteError};
use userfaultfd::snapshot::{ChunkOptions, ImageCopy, SnapshotReader, SnapshotWriter};
use userfaultfd::source::ObjectWriter;

use crate::store::{Faulty, Uploads};
use crate::support::{page, require};
use crate::{content, open, put, read, soon};

const MIB: usize = 1 << 20;

fn create(store: &Arc<Faulty>) -> ObjectWriter {
    let store: Arc<dyn ObjectStore> = Arc::<Faulty>::clone(store);
    ObjectWriter::create(store, "object").unwrap()
}

#[test]
fn object_is_seen_when_all_of_it_is_there() {
    require!();
    let store = Faulty::new();
    put(&store, content(100, 1));
    let bytes = content(20 * MIB + 5, 2);
    let mut object = create(&store);
    for part in bytes.chunks(MIB + 3) {
        object.write_all(part).unwrap();
    }
    let before = open(&store, soon()).unwrap();
    assert_eq!(read(&before, 0, 100).unwrap(), content(100, 1));
    object.commit().unwrap();
    let after = open(&store, soon()).unwrap();
    assert_eq!(after.len(), Some(bytes.len() as u64));
    assert!(read(&after, 0, bytes.len()).unwrap() == bytes);
    let parts = vec![8 * MIB, 8 * MIB, 4 * MIB + 5];
    assert_eq!(store.uploads(), Uploads { parts, completed: 1, aborted: 0, fails: None });
    // A reader of the old one is told.
    assert!(matches!(read(&before, 0, 100), Err(RemoteError::Changed { .. })));
    create(&store).commit().unwrap();
    assert_eq!(open(&store, soon()).unwrap().len(), Some(0));
}

#[test]
fn upload_that_is_not_committed_is_given_up() {
    require!();
    let store = Faulty::new();
    let mut object = create(&store);
    object.write_all(&content(9 * MIB, 0)).unwrap();
    drop(object);
    let uploads = store.uploads();
    assert_eq!((uploads.completed, uploads.aborted), (0, 1));
    let error = open(&store, soon()).unwrap_err();
    assert!(matches!(error.get_ref().unwrap().downcast_ref(), Some(RemoteError::NotFound { .. })), "{error}");
}

#[test]
fn failed_part_is_an_error_and_no_object() {
    require!();
    for number in [0, 2, 6] {
        let store = Faulty::new();
        store.fail_part(number);
        let mut object = create(&store);
        let written = (0..7).try_for_each(|_| object.write_all(&content(8 * MIB, 0)));
        let error = match written {
            // The last ones are still on their way.
            Ok(()) => object.commit().unwrap_err(),
            Err(error) => {
                assert!(object.write(b"more").is_err());
                assert!(object.commit().is_err());
                error
            }
        };
        let found = error.get_ref().unwrap().downcast_ref::<RemoteError>().unwrap();
        assert_eq!(*found, RemoteError::Forbidden { status: 403 });
        let uploads = store.uploads();
        assert_eq!((uploads.completed, uploads.aborted), (0, 1), "{number}");
    }
    // A program's runtime.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let store: Arc<dyn ObjectStore> = Faulty::new();
    let mut object = ObjectWriter::create_on(runtime.handle().clone(), Arc::clone(&store), "object").unwrap();
    object.write_all(b"some").unwrap();
    object.commit().unwrap();
    assert_eq!(ObjectSource::open(store, "object").unwrap().len(), Some(4));
}

#[test]
fn snapshot_is_written_to_and_read_from_an_object() {
    require!();
    let store = Faulty::new();
    let memory = content(300 * page(), 3);
    let writer = SnapshotWriter::new(create(&store)).unwrap().chunks(&ChunkOptions::new());
    let written = ImageCopy::new(&BytesSource::new(memory.clone())).write(writer).unwrap();
    written.into_inner().commit().unwrap();
    let source = Arc::new(open(&store, soon()).unwrap());
    let opening = source.statistics().requests;
    let reader = SnapshotReader::from_source(Arc::clone(&source)).unwrap();
    assert_eq!(source.statistics().requests, opening + 1, "one request for the end");
    reader.verify().unwrap();
    let mut found = vec![0; memory.len()];
    reader.read(0, &mut found).unwrap();
    assert!(found == memory);
    // A file that isn't whole isn't there.
    let source = BytesSource::new(memory);
    let copy = ImageCopy::new(&source).progress(|_, _| Err(ErrorKind::TimedOut.into()));
    let writer = SnapshotWriter::new(create(&store)).unwrap();
    assert_eq!(copy.write(writer).unwrap_err().kind(), ErrorKind::TimedOut);
    reader.verify().unwrap();
}
