//! `uffd image`: on images of each kind, checked with the library.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use serde_json::Value;
use userfaultfd::pager::{PageData, PageSource, WorkingSet};
use userfaultfd::snapshot::{Chain, SnapshotReader};

use crate::program::{Folder, Said, run};
use crate::support::{page, require, test_name};
use crate::web::Web;

const PAGES: usize = 64;

/// Memory whose pages are zeros, and different from each other.
fn memory(seed: usize) -> Vec<u8> {
    let page_of = |number: usize| {
        let byte = if number % 5 == 0 { 0 } else { (number + seed) as u8 | 1 };
        std::iter::repeat_n(byte, page())
    };
    (0..PAGES).flat_map(page_of).collect()
}

fn image(arguments: &[&str]) -> Said {
    run(&[&["image"], arguments].concat())
}

/// Does what is asked, without a word.
#[track_caller]
fn quiet(arguments: &[&str]) {
    let said = image(arguments);
    assert!(said.code == Some(0) && said.out.is_empty() && said.err.is_empty(), "{said:?}");
}

#[track_caller]
fn fails(arguments: &[&str], code: i32, named: &[&str]) {
    let said = image(arguments);
    assert!(said.code == Some(code) && said.out.is_empty(), "{said:?}");
    assert!(named.iter().all(|named| said.err.contains(named)), "{named:?} {said:?}");
}

fn content(reader: &SnapshotReader) -> Vec<u8> {
    let mut all = vec![0xee; reader.len().unwrap() as usize];
    if reader.read(0, &mut all).unwrap() == PageData::Zero {
        all.fill(0);
    }
    all
}

/// What was there is there still, and nothing beside it.
#[test]
fn conversion_that_fails_half_way_leaves_the_old_file() {
    require!();
    let folder = Folder::new(test_name!());
    let (raw, good) = (folder.file("raw", &memory(0)), folder.path("good"));
    quiet(&["convert", &raw, "-o", &good, "--compression", "none", "--chunk", "64K"]);
    // A byte of the last chunk.
    let mut bytes = fs::read(&good).unwrap();
    let index = u64::from_le_bytes(*bytes[bytes.len() - 48..].first_chunk().unwrap()) as usize;
    bytes[index - 1] ^= 1;
    let (bad, old) = (folder.file("bad", &bytes), folder.file("old", b"old"));
    let names = || fs::read_dir(folder.path(".")).unwrap().count();
    let before = names();
    for to in ["raw", "snapshot"] {
        fails(&["convert", &bad, "-o", &old, "--to", to], 1, &["checksum"]);
        assert_eq!(fs::read(&old).unwrap(), b"old");
        fails(&["convert", &bad, "-o", &folder.path("new"), "--to", to], 1, &["checksum"]);
        assert_eq!(names(), before, "{to}");
    }
    fails(&["merge", &bad, "-o", &old], 1, &["checksum"]);
    assert_eq!((fs::read(&old).unwrap(), names()), (b"old".to_vec(), before));
}

#[test]
fn images_are_converted_there_and_back() {
    require!();
    let folder = Folder::new(test_name!());
    let mut memory = memory(0);
    let raw = folder.file("raw", &memory);
    let vm = folder.path("vm");
    fs::create_dir(&vm).unwrap();
    fs::write(format!("{vm}/memory-ranges"), &memory).unwrap();
    let web = Web::new(memory.clone());
    let (output, back) = (folder.path("output"), folder.path("back"));
    for (input, more) in [
        (&raw, &[][..]),
        (&raw, &["--from", "firecracker", "--compression", "none"]),
        (&vm, &["--compression", "lz4", "--chunk", "64K"]),
        (&web.url(), &["--level", "9", "--chunk", "2M"]),
    ] {
        quiet(&[&["convert", input, "--output", &output], more].concat());
        let reader = SnapshotReader::open(&output).unwrap();
        assert_eq!(reader.version(), 2);
        assert!(content(&reader) == memory, "{input}");
        quiet(&["verify", &output]);
        quiet(&["convert", &output, "--to", "raw", "-o", &back]);
        assert!(fs::read(&back).unwrap() == memory);
    }
    // A diff on top; the image may be replaced by its own copy.
    let layer = folder.path("layer");
    let diff = File::create(&layer).unwrap();
    diff.set_len(memory.len() as u64).unwrap();
    diff.write_all_at(&vec![77; page()], 3 * page() as u64).unwrap();
    memory[3 * page()..4 * page()].fill(77);
    quiet(&["convert", &raw, "--layer", &layer, "-o", &raw]);
    assert!(content(&SnapshotReader::open(&raw).unwrap()) == memory);
}

#[test]
fn working_set_is_put_first_and_kept() {
    require!();
    let folder = Folder::new(test_name!());
    let raw = folder.file("raw", &memory(0));
    let set = WorkingSet::from_pages(page(), PAGES, [63, 7]).unwrap();
    let file = folder.path("set");
    set.save(&file).unwrap();
    let (one, other) = (folder.path("one"), folder.path("other"));
    quiet(&["convert", &raw, "-o", &one, "--working-set", &file, "--compression", "none"]);
    let bytes = fs::read(&one).unwrap();
    assert_eq!([bytes[64], bytes[64 + page()]], [63, 7]);
    quiet(&["convert", &one, "-o", &other]);
    assert_eq!(SnapshotReader::open(&other).unwrap().working_set().unwrap(), Some(set));
    fails(&["convert", &raw, "-o", &one, "--to", "raw", "--working-set", &file], 2, &["--working-set"]);
    let short = folder.path("short");
    WorkingSet::from_pages(page(), PAGES - 1, [1]).unwrap().save(&short).unwrap();
    fails(&["convert", &raw, "-o", &one, "--working-set", &short], 1, &[&raw, "a working set of"]);
    assert_eq!(fs::read(&one).unwrap(), bytes, "the file is unchanged");
}

#[test]
fn increments_are_made_verified_and_merged() {
    require!();
    let folder = Folder::new(test_name!());
    let (base, first, second) = (folder.path("1"), folder.path("2"), folder.path("3"));
    let raws = [0, 2, 4].map(|seed| folder.file(&format!(".raw{seed}"), &memory(seed)));
    quiet(&["convert", &raws[0], "-o", &base]);
    quiet(&["diff", &base, &raws[1], "-o", &first]);
    let all = folder.path(".all");
    quiet(&["merge", &base, &first, "-o", &all]);
    assert!(content(&SnapshotReader::open(&all).unwrap()) == memory(2));
    // The merged file is the newest snapshot.
    quiet(&["diff", &all, &raws[2], "-o", &second]);
    let chain = Chain::open(std::path::Path::new(&base).parent().unwrap()).unwrap().into_reader().unwrap();
    assert!(content(&chain) == memory(4));
    quiet(&["verify", &base, &first, &second]);
    fails(&["verify", &first], 1, &[&first, "which is needed"]);
    fails(&["merge", &base, &second, "-o", &all], 1, &[&second, "follows"]);
    fails(&["diff", &first, &raws[0], "-o", &all], 1, &[&first, "uffd image merge"]);
    // The same once more: nothing has changed.
    let none = folder.path(".none");
    quiet(&["diff", &all, &raws[1], "-o", &none]);
    assert_eq!(SnapshotReader::open(&none).unwrap().extents().count(), 0);
}

#[test]
fn info_says_what_images_are() {
    require!();
    let folder = Folder::new(test_name!());
    let raw = folder.file("raw", &memory(0));
    let output = folder.path("output");
    quiet(&["convert", &raw, "-o", &output, "--compression", "lz4"]);
    let web = Web::new(fs::read(&output).unwrap());
    let said = image(&["info", "--json", &raw, &output, &web.url()]);
    assert!(said.code == Some(0) && said.err.is_empty(), "{said:?}");
    let report: Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((&report[0]["image"], &report[0]["format"]), (&Value::from(raw.clone()), &"raw".into()));
    assert_eq!(report[0]["bytes"], PAGES * page());
    assert_eq!(report[0]["snapshot"], Value::Null);
    let reader = SnapshotReader::open(&output).unwrap();
    let snapshot = &report[1]["snapshot"];
    for (name, number) in [
        ("version", 2),
        ("data", reader.data_len()),
        ("stored", reader.stored_len()),
        ("gone", 0),
        ("chunk", 128 << 10),
    ] {
        assert_eq!(snapshot[name], number, "{name}: {report}");
    }
    assert_eq!((&snapshot["id"], &snapshot["parent"]), (&reader.id().to_string().into(), &Value::Null));
    assert_eq!(&report[2]["snapshot"], snapshot);
    let said = image(&["info", &output]);
    assert!(said.out.starts_with(&format!("{output}: snapshot, 0.2 MiB in 1 region\n")), "{said:?}");
    assert!(said.out.contains("  follows      nothing\n"), "{said:?}");
}

#[test]
fn damaged_and_foreign_images_are_named() {
    require!();
    let folder = Folder::new(test_name!());
    let raw = folder.file("raw", &memory(0));
    let (output, missing) = (folder.path("output"), folder.path("missing"));
    quiet(&["convert", &raw, "-o", &output, "--compression", "none"]);
    let mut bytes = fs::read(&output).unwrap();
    bytes[5000] ^= 1;
    let damaged = folder.file("damaged", &bytes);
    let back = folder.path("back");
    fails(&["verify", &output, &damaged], 1, &[&damaged, "checksum"]);
    fails(&["convert", &damaged, "--to", "raw", "-o", &back], 1, &[&damaged, &back, "checksum"]);
    assert!(!fs::exists(&back).unwrap(), "nothing half done");
    let cut = folder.file("cut", &bytes[..3000]);
    fails(&["info", &cut], 1, &[&cut, "cut short"]);
    let foreign = folder.file("foreign", &[1; 5000]);
    fails(&["verify", &foreign], 1, &[&foreign, "uffd image convert"]);
    for arguments in [&["info", &missing][..], &["verify", &missing], &["convert", &missing, "-o", &back]] {
        fails(arguments, 1, &[&missing, "No such file"]);
    }
    fails(&["convert", &raw, "-o", &back, "--from", "mapped-ram"], 1, &[&raw, "no migration of QEMU"]);
    fails(&["convert", &raw, "-o", &back, "--chunk", "96K"], 2, &["--chunk"]);
    for arguments in [&["convert", &raw][..], &["merge", "-o", &back], &["diff", &raw], &[]] {
        fails(arguments, 2, &["--help"]);
    }
}
