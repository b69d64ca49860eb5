//! Directories and files that aren't as they should be.

#![expect(unsafe_code, reason = "a file system that is full soon")]

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};

use super::*;
use crate::support::{child, is_root, mounts};

fn named(error: &io::Error) -> &CacheError {
    error.get_ref().and_then(|error| error.downcast_ref()).unwrap_or_else(|| panic!("no name: {error:?}"))
}

fn refused(directory: impl AsRef<Path>) -> io::Error {
    ChunkCache::open(directory, 1 << 30).unwrap_err()
}

/// Mounts a file system in memory that has room for `bytes`, in mounts of this thread's own.
fn mount_small(at: &CStr, bytes: usize) {
    let options = CString::new(format!("size={bytes}")).unwrap();
    let name = c"tmpfs".as_ptr();
    // SAFETY: the strings are NUL-terminated.
    let mounted = unsafe { libc::mount(name, at.as_ptr(), name, 0, options.as_ptr().cast()) };
    assert_eq!(mounted, 0, "{}", io::Error::last_os_error());
}

#[test]
fn unusable_directory_is_refused_by_name() {
    require!();
    let scratch = Scratch::new("directories");
    let error = refused(scratch.0.join("nowhere"));
    assert!(matches!(named(&error), CacheError::Io { .. }), "{error}");
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    fs::write(scratch.0.join("file"), "").unwrap();
    assert_eq!(refused(scratch.0.join("file")).kind(), io::ErrorKind::NotADirectory);
    let public = scratch.0.join("public");
    fs::create_dir(&public).unwrap();
    fs::set_permissions(&public, fs::Permissions::from_mode(0o777)).unwrap();
    let error = refused(&public);
    assert!(matches!(named(&error), CacheError::WritableByAll { .. }), "{error}");

    let foreign = scratch.0.join("foreign");
    fs::create_dir(&foreign).unwrap();
    for content in [&b"short"[..], &[7; 4096], &[7; 5000]] {
        fs::write(foreign.join("userfaultfd-cache"), content).unwrap();
        let error = refused(&foreign);
        assert!(matches!(named(&error), CacheError::Foreign { .. }), "{error}");
        assert_eq!(fs::read(foreign.join("userfaultfd-cache")).unwrap(), content);
    }
    let mut newer = [0; 4096];
    newer[..8].copy_from_slice(b"uffdcach");
    newer[8..12].copy_from_slice(&2u32.to_ne_bytes());
    fs::write(foreign.join("userfaultfd-cache"), newer).unwrap();
    let error = refused(&foreign);
    assert!(matches!(named(&error), CacheError::OtherVersion { found: 2, known: 1, .. }), "{error}");
}

#[test]
fn directory_that_may_not_be_written_is_refused_by_name() {
    require!();
    child::run_well(crate::support::test_name!(), || {
        let scratch = Scratch::new("read-only");
        let read_only = scratch.0.join("cache");
        fs::create_dir(&read_only).unwrap();
        fs::set_permissions(&read_only, fs::Permissions::from_mode(0o555)).unwrap();
        let look = || {
            let error = refused(&read_only);
            assert!(matches!(named(&error), CacheError::Io { .. }), "{error}");
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
        };
        if is_root() {
            // In a child, so that the directory can be removed.
            fs::set_permissions(&scratch.0, fs::Permissions::from_mode(0o755)).unwrap();
            child::fork(|| {
                child::drop_rights();
                look();
            })
            .succeed();
        } else {
            look();
        }
    });
}

#[test]
fn full_disk_keeps_no_content_from_its_readers() {
    require!();
    child::run_well(crate::support::test_name!(), || {
        if !crate::support::has(crate::support::test_name!(), "mounts of its own", mounts::own()) {
            return;
        }
        let scratch = Scratch::new("full");
        let at = CString::new(scratch.0.as_os_str().as_bytes()).unwrap();
        mount_small(&at, 20 * CHUNK);
        fs::set_permissions(&scratch.0, fs::Permissions::from_mode(0o755)).unwrap();
        let cache = scratch.cache(1 << 40);
        let bytes = content(1, 64 * CHUNK);
        let image = open(&cache, "image", BytesSource::new(bytes.clone()));
        // The disk is full before the limit is reached: older chunks go.
        for chunk in 0..64 {
            check(&image, &bytes, chunk * CHUNK..(chunk + 1) * CHUNK);
        }
        assert!(image.cached() > 8 * CHUNK as u64 && cache.used() < 20 * CHUNK as u64, "{image:?}");
        // Nothing can go that another program has.
        fs::write(scratch.0.join("big"), vec![1; 20 * CHUNK]).unwrap_err();
        assert!(cache.0.make_room(cache.used()));
        fs::write(scratch.0.join("big"), vec![1; 20 * CHUNK]).unwrap_err();
        check(&image, &bytes, 0..bytes.len());
        let problem = image.take_problem().expect("the disk is full");
        assert_eq!(problem.raw_os_error(), Some(libc::ENOSPC));
        assert!(image.statistics().not_stored > 0);
        // And a new image, for whose table there is no room.
        let error = cache.image("other").chunk_size(CHUNK).open(unread(1 << 30)).unwrap_err();
        assert!(matches!(named(&error), CacheError::Io { .. }), "{error}");
        assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
        fs::remove_file(scratch.0.join("big")).unwrap();
        check(&image, &bytes, 0..bytes.len());
        check(&image, &bytes, 60 * CHUNK..61 * CHUNK);
        assert!(image.cached() > 8 * CHUNK as u64, "{image:?}");
        drop((image, cache));
        // So that its directory can be removed.
        // SAFETY: the path ends with a NUL, and this process has mounts of its own.
        assert_eq!(unsafe { libc::umount2(at.as_ptr(), libc::MNT_DETACH) }, 0);
    });
}

#[test]
fn image_of_another_length_or_identity_is_refused_by_name() {
    require!();
    let scratch = Scratch::new("other");
    let cache = scratch.cache(1 << 30);
    let image = cache.image("image").identity("one").chunk_size(CHUNK);
    let image = image.open(BytesSource::new(content(1, 3 * CHUNK))).unwrap();
    let error = cache.image("image").identity("two").open(unread(3 * CHUNK)).unwrap_err();
    let text = "the image image is \"one\" in the cache, and \"two\" was asked for";
    assert_eq!((named(&error).to_string(), error.kind()), (text.into(), io::ErrorKind::InvalidInput));
    let error = cache.image("image").identity("one").open(unread(3 * CHUNK + 1)).unwrap_err();
    assert!(matches!(named(&error), CacheError::OtherLength { .. }), "{error}");
    let error = cache.remove("image").unwrap_err();
    assert!(matches!(named(&error), CacheError::InUse { .. }), "{error}");
    drop(image);
    assert!(cache.remove("image").unwrap());
    let image = cache.image("image").identity("two").open(BytesSource::new(content(2, 10))).unwrap();
    check(&image, &content(2, 10), 0..10);
    for size in [0, 1, 4095, 5000, 128 << 20] {
        let error = cache.image("new").chunk_size(size).open(unread(10)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{size}: {error}");
    }
    let endless = |_: u64, _: &mut [u8]| Ok(PageData::Zero);
    assert_eq!(cache.image("new").open(endless).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    let error = cache.image("new").chunk_size(CHUNK).open(unread(usize::MAX)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
    let error = cache.image("new").identity("x".repeat(5000)).open(unread(1)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
}

#[test]
fn foreign_files_are_refused_by_name_and_left_alone() {
    require!();
    let scratch = Scratch::new("foreign");
    let cache = scratch.cache(4 * CHUNK as u64);
    fs::write(scratch.0.join("mine.table"), "a table of mine").unwrap();
    fs::write(scratch.0.join("notes.txt"), "mine, too").unwrap();
    fs::create_dir(scratch.0.join("folder.table")).unwrap();
    for name in ["mine", "folder"] {
        let error = cache.image(name).open(unread(10)).unwrap_err();
        assert!(matches!(named(&error), CacheError::Foreign { .. } | CacheError::Io { .. }), "{error}");
        assert!(cache.remove(name).is_err());
    }
    let bytes = content(1, 20 * CHUNK);
    check(&open(&cache, "image", BytesSource::new(bytes.clone())), &bytes, 0..bytes.len());
    assert_eq!(fs::read(scratch.0.join("mine.table")).unwrap(), b"a table of mine");
    assert_eq!(fs::read(scratch.0.join("notes.txt")).unwrap(), b"mine, too");
    // No way out of the directory.
    std::os::unix::fs::symlink("/etc/passwd", scratch.0.join("link.chunks")).unwrap();
    assert!(cache.image("link").open(unread(10)).is_err());
}

#[test]
fn hostile_tables_and_chunks_never_show_wrong_bytes() {
    require!();
    let scratch = Scratch::new("hostile");
    let bytes = content(1, 12 * CHUNK + 500);
    let limit = 1 << 30;
    let fill = || {
        let cache = scratch.cache(limit);
        drop(cache.remove("image"));
        let image = open(&cache, "image", BytesSource::new(bytes.clone()));
        check(&image, &bytes, 0..10 * CHUNK);
    };
    let (table, chunks) = (scratch.0.join("image.table"), scratch.0.join("image.chunks"));
    let mut random = Random::new(17);
    let (mut opened, mut damaged) = (0, 0);
    for round in 0..20 {
        fill();
        let file = fs::File::options().read(true).write(true).open(&table).unwrap();
        let len = file.metadata().unwrap().len() as usize;
        let junk: Vec<u8> = (0..1 + random.below(64)).map(|_| random.below(256) as u8).collect();
        match round % 5 {
            0 => file.write_all_at(&junk, random.below(len - 64) as u64).unwrap(),
            // Entries alone: states, checksums and uses at random, or those of other chunks.
            1 => file.write_all_at(&junk, (4096 + random.below(len - 4096)) as u64).unwrap(),
            2 => {
                let mut entries = vec![0; len - 4096];
                file.read_exact_at(&mut entries, 4096).unwrap();
                let by = 16 * random.below(entries.len() / 16);
                entries.rotate_left(by);
                file.write_all_at(&entries, 4096).unwrap();
            }
            3 => file.set_len(random.below(len + 10_000) as u64).unwrap(),
            _ => {
                let file = fs::File::options().write(true).open(&chunks).unwrap();
                file.write_all_at(&junk, random.below(10 * CHUNK) as u64).unwrap();
                if random.below(4) == 0 {
                    file.set_len(random.below(14 * CHUNK) as u64).unwrap();
                }
            }
        }
        // An entry beyond the end is none.
        drop(file);
        let cache = scratch.cache(limit);
        match cache.image("image").open(BytesSource::new(bytes.clone())) {
            Ok(image) => {
                opened += 1;
                check(&image, &bytes, 0..bytes.len());
                damaged += image.statistics().damaged;
            }
            Err(error) => {
                assert!(
                    matches!(
                        named(&error),
                        CacheError::Damaged { .. }
                            | CacheError::Foreign { .. }
                            | CacheError::OtherVersion { .. }
                    ),
                    "{error}"
                );
                if matches!(named(&error), CacheError::Foreign { .. }) {
                    fs::remove_file(&table).unwrap();
                }
            }
        }
    }
    assert!(opened > 7 && damaged > 1, "{opened} opened, {damaged} chunks were damaged");
}

#[test]
fn chunks_that_change_in_an_open_image_are_fetched_again() {
    require!();
    let scratch = Scratch::new("cut-off");
    let cache = scratch.cache(1 << 30);
    let bytes = content(1, 4 * CHUNK);
    let image = open(&cache, "image", BytesSource::new(bytes.clone()));
    check(&image, &bytes, 0..bytes.len());
    let chunks = fs::File::options().write(true).open(scratch.0.join("image.chunks")).unwrap();
    chunks.set_len(CHUNK as u64).unwrap();
    let mut page = vec![0; CHUNK];
    assert_eq!(image.read(2 * CHUNK as u64, &mut page).unwrap(), PageData::Data);
    assert!(page == bytes[2 * CHUNK..3 * CHUNK]);
    assert!(image.take_problem().is_some());
    // Memory by faults: the kernel finds nothing in the mapping, and the page is read.
    let memory = LazyMemory::builder(image).build().unwrap();
    assert!(*memory == bytes[..]);
}

#[test]
fn blocks_that_the_table_does_not_know_are_given_back() {
    require!();
    let scratch = Scratch::new("unknown");
    let bytes = content(1, 64 * CHUNK);
    drop(open(&scratch.cache(1 << 30), "image", BytesSource::new(bytes.clone())));
    let chunks = fs::File::options().write(true).open(scratch.0.join("image.chunks")).unwrap();
    // As after a loss of power: chunks were written, and the table wasn't.
    chunks.write_all_at(&vec![0xaa; 60 * CHUNK], 0).unwrap();
    let cache = scratch.cache(1 << 30);
    let image = open(&cache, "image", BytesSource::new(bytes.clone()));
    let allocated = crate::sys::file_stamp(std::os::fd::AsFd::as_fd(&chunks)).unwrap().allocated;
    assert!(allocated < 2 * CHUNK as u64, "{allocated} bytes of blocks");
    check(&image, &bytes, 0..bytes.len());
    // And the other way round: the table says what isn't there.
    drop(image);
    chunks.set_len(0).unwrap();
    chunks.set_len(bytes.len() as u64).unwrap();
    let image = open(&scratch.cache(1 << 30), "image", BytesSource::new(bytes.clone()));
    check(&image, &bytes, 0..bytes.len());
    assert_eq!(image.statistics().damaged, 64);
}

#[test]
fn damaged_chunk_in_use_elsewhere_bypasses_the_cache() {
    require!();
    let scratch = Scratch::new("damaged-in-use");
    let bytes = content(1, 4 * CHUNK);
    let user = open(&scratch.cache(1 << 30), "image", BytesSource::new(bytes.clone()));
    check(&user, &bytes, 0..bytes.len());
    let chunks = fs::File::options().write(true).open(scratch.0.join("image.chunks")).unwrap();
    chunks.write_all_at(&[0xaa; 100], CHUNK as u64 + 10).unwrap();
    let other = open(&scratch.cache(1 << 30), "image", BytesSource::new(bytes.clone()));
    check(&other, &bytes, 0..bytes.len());
    // It is looked at once.
    let CacheStatistics { fetches, damaged, not_stored, .. } = other.statistics();
    assert_eq!((fetches, damaged, not_stored), (0, 1, 1));
    drop(user);
    check(&other, &bytes, CHUNK..CHUNK + 100);
    assert_eq!(other.statistics().fetches, 1);
}

#[test]
fn many_images_are_counted_with_few_descriptors() {
    require!();
    child::run_well(crate::support::test_name!(), || {
        let scratch = Scratch::new("few-descriptors");
        let limit = 40 * CHUNK as u64;
        let cache = scratch.cache(limit);
        for number in 0..30 {
            let bytes = content(number, CHUNK);
            read_all(&open(&cache, &number.to_string(), BytesSource::new(bytes.clone())), &bytes);
        }
        let bytes = content(40, 30 * CHUNK);
        let image = open(&cache, "image", BytesSource::new(bytes.clone()));
        let few: Vec<_> = (0..3).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let full = child::use_up_descriptors();
        drop(few);
        for chunk in 0..30 {
            check(&image, &bytes, chunk * CHUNK..(chunk + 1) * CHUNK);
            assert!(cache.used() <= limit, "{cache:?}");
        }
        assert_eq!(image.statistics().not_stored, 0);
        drop(full);
        let used = cache.used();
        assert_eq!(scratch.cache(limit).used(), used);
        // Without any descriptor nothing is given back, and the number stays.
        let full = child::use_up_descriptors();
        cache.0.make_room(CHUNK as u64);
        drop(full);
        assert_eq!(cache.used(), used);
    });
}

#[test]
fn files_are_for_the_users_of_the_directory_alone() {
    require!();
    let scratch = Scratch::new("permissions");
    for (number, (directory, expected)) in
        [(0o700, 0o600), (0o755, 0o640), (0o750, 0o640), (0o770, 0o660), (0o300, 0o600)]
            .into_iter()
            .enumerate()
    {
        let path = scratch.0.join(number.to_string());
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(directory)).unwrap();
        let names = ["userfaultfd-cache", "image.table", "image.chunks"].map(|name| path.join(name));
        for _ in 0..2 {
            let cache = ChunkCache::open(&path, 1 << 30);
            // A directory that may not be read.
            let Ok(cache) = cache else { break };
            drop(open(&cache, "image", BytesSource::new(content(1, CHUNK))));
            for name in &names {
                let mode = fs::metadata(name).unwrap().permissions().mode() & 0o777;
                assert_eq!(mode, expected, "{} in {directory:o}: {mode:o}", name.display());
                // As a former version made it.
                fs::set_permissions(name, fs::Permissions::from_mode(0o644)).unwrap();
            }
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    }
}
