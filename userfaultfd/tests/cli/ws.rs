//! `uffd ws`: on files that the library writes.

use serde_json::Value;
use userfaultfd::pager::WorkingSet;

use crate::program::{Folder, run};
use crate::support::{require, test_name};

/// A file with a set of pages of 4 KiB of a region of 16.
fn file(folder: &Folder, name: &str, pages: &[usize]) -> String {
    save(folder, name, &WorkingSet::from_pages(4096, 16, pages.iter().copied()).unwrap())
}

fn save(folder: &Folder, name: &str, set: &WorkingSet) -> String {
    let path = folder.path(name);
    set.save(&path).unwrap();
    path
}

#[test]
fn info_says_what_sets_have_and_share() {
    require!();
    let folder = Folder::new(test_name!());
    let (one, other) = (file(&folder, "one", &[8, 9, 10, 0]), file(&folder, "other", &[0, 9]));
    let said = run(&["ws", "info", "--json", &one, &other]);
    assert!(said.code == Some(0) && said.err.is_empty(), "{said:?}");
    let report: Value = serde_json::from_str(&said.out).unwrap();
    let first = &report["files"][0];
    assert_eq!(first["file"], *one);
    for (name, number) in [
        ("page_size", 4096),
        ("region_pages", 16),
        ("pages", 4),
        ("bytes", 16384),
        ("runs", 2),
        ("longest_run", 3),
    ] {
        assert_eq!(first[name], number, "{name}: {report}");
    }
    assert_eq!((&report["in_all"], &report["in_any"]), (&Value::from(2), &Value::from(4)));
    let said = run(&["ws", "info", &one, &other]);
    assert!(said.out.ends_with("2 pages are in all, 50.0 % of the 4 that are in any\n"), "{said:?}");
    assert_eq!(said.out.lines().count(), 4, "{said:?}");
    let larger = save(&folder, "larger", &WorkingSet::from_pages(4096, 17, [16]).unwrap());
    let said = run(&["ws", "info", &one, &larger]);
    assert!(said.out.ends_with("they are of regions of different sizes\n"), "{said:?}");
}

#[test]
fn merge_writes_the_pages_of_any_or_all() {
    require!();
    let folder = Folder::new(test_name!());
    let (one, other) = (file(&folder, "one", &[8, 9, 3]), file(&folder, "other", &[0, 3, 8, 1]));
    let output = folder.path("output");
    let merge = |more: &[&str]| run(&[&["ws", "merge", "--output", &output], more].concat());
    let pages = || WorkingSet::load(&output).unwrap().pages().collect::<Vec<_>>();
    let said = merge(&[&one, &other]);
    assert!(said.code == Some(0) && said.out.is_empty() && said.err.is_empty(), "{said:?}");
    assert_eq!(pages(), [8, 9, 3, 0, 1]);
    assert_eq!(merge(&["--common", &one, &other]).code, Some(0));
    assert_eq!(pages(), [8, 3]);
    // The output may be one of the files.
    assert_eq!(run(&["ws", "merge", "--output", &one, &one, &other]).code, Some(0));
    assert_eq!(WorkingSet::load(&one).unwrap().pages().collect::<Vec<_>>(), [8, 9, 3, 0, 1]);
    // Pages of 8 KiB, and a longer region.
    let larger = save(&folder, "larger", &WorkingSet::from_pages(8192, 100, [1, 60]).unwrap());
    let said = merge(&[&other, &larger]);
    assert!(said.code == Some(1) && said.err.contains(&larger) && said.err.contains("--adapt"), "{said:?}");
    assert_eq!(pages(), [8, 3], "the file is unchanged");
    assert_eq!(merge(&["--adapt", &other, &larger]).code, Some(0));
    assert_eq!(pages(), [0, 3, 8, 1, 2]);
}

#[test]
fn show_draws_places_and_order() {
    require!();
    let folder = Folder::new(test_name!());
    let set = file(&folder, "set", &[12, 13, 14, 15, 0, 1, 8, 3]);
    let said = run(&["ws", "show", "--columns", "4", "--rows", "2", &set]);
    assert!(said.code == Some(0) && said.err.is_empty(), "{said:?}");
    let expected = "8 of 16 pages of 4 KiB (50.0 %): 0.0 MiB\n|   @|\n|# - |\n\
                    a letter is 4 pages wide and up to 4 accesses deep; a line is 4 accesses\n";
    assert_eq!(said.out, expected);
    let empty = file(&folder, "empty", &[]);
    assert_eq!(run(&["ws", "show", &empty]).out, "0 of 16 pages of 4 KiB (0.0 %): 0.0 MiB\n");
}

#[test]
fn file_that_is_no_working_set_is_named() {
    require!();
    let folder = Folder::new(test_name!());
    let (text, output) = (folder.file("text", b"no set"), folder.path("output"));
    for arguments in [&["info", &text][..], &["show", &text], &["merge", "--output", &output, &text]] {
        let said = run(&[&["ws"], arguments].concat());
        assert!(said.code == Some(1) && said.out.is_empty(), "{said:?}");
        assert!(said.err.contains(&*text) && said.err.contains("uffd serve --record"), "{said:?}");
    }
    for arguments in [&["info"][..], &["merge", &text], &["show", "--columns", "0", &text], &[]] {
        let said = run(&[&["ws"], arguments].concat());
        assert!(said.code == Some(2) && said.out.is_empty(), "{said:?}");
    }
}
