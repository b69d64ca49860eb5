//! `uffd doctor`: it says what is so, and ends as it says.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use serde_json::Value;
use userfaultfd::{Errno, FeatureFlags, OpenWith, UffdBuilder};

use crate::program::{PATH, Said, command, run};
use crate::support::{child, features, has, require, seccomp, test_name};

/// The user nobody.
const NOBODY: u32 = 65534;

/// The report of `doctor --json`.
fn report(said: &Said) -> Value {
    serde_json::from_str(&said.out).unwrap_or_else(|error| panic!("{error}: {said:?}"))
}

/// The check of a name.
fn check<'a>(report: &'a Value, name: &str) -> &'a Value {
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("{name}: {report}"))
}

fn is(check: &Value, state: &str) -> bool {
    check["state"] == state
}

#[test]
fn doctor_says_what_the_kernel_says() {
    require!();
    let said = run(&["doctor", "--json"]);
    assert!(said.code == Some(0) && said.err.is_empty(), "{said:?}");
    let report = report(&said);
    assert_eq!(report["page_size"], userfaultfd::page_size());
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(report["kernel"], release.trim());
    assert_eq!(report["usable"], true);
    for known in FeatureFlags::known() {
        let check = check(&report, known.name);
        assert_eq!(is(check, "yes"), features().contains(known.flag), "{check}");
        assert_eq!(check["remedies"].as_array().unwrap().is_empty(), is(check, "yes"), "{check}");
    }
    for (with, way) in [(OpenWith::Device, "/dev/userfaultfd"), (OpenWith::Syscall, "userfaultfd(2)")] {
        for (user_mode_only, scope) in [(true, "user mode"), (false, "kernel mode, too")] {
            let mut builder = UffdBuilder::new();
            builder.close_on_exec(true).open_with(with).user_mode_only(user_mode_only);
            let check = check(&report, &format!("faults from {scope}, {way}"));
            assert_eq!(is(check, "yes"), builder.create().is_ok(), "{check}");
        }
    }
    assert!(is(check(&report, "private anonymous, MISSING"), "yes"));
    let shared = is(check(&report, "shared, MISSING"), "yes");
    assert_eq!(shared, features().contains(FeatureFlags::MISSING_SHMEM));
    let kvm = File::options().read(true).write(true).open("/dev/kvm").is_ok();
    assert_eq!(is(check(&report, "/dev/kvm"), "yes"), kvm);
    let text = run(&["doctor"]);
    assert!(text.code == Some(0) && text.err.is_empty(), "{text:?}");
    for check in report["checks"].as_array().unwrap() {
        let name = check["name"].as_str().unwrap();
        assert!(text.out.contains(name), "{name}: {}", text.out);
    }
}

#[test]
fn doctor_ends_with_3_where_a_filter_refuses_userfaultfd() {
    require!(root);
    child::run_well(test_name!(), || {
        if !has(test_name!(), "seccomp", seccomp::refuse_userfaultfd(Errno::EPERM)) {
            return;
        }
        // By a descriptor, since a directory on the way may be closed to that user.
        let file = File::open(PATH).unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let run = |arguments: &[&str]| {
            let mut command = command(&path, arguments);
            Said::from(command.uid(NOBODY).gid(NOBODY).output().unwrap())
        };
        let said = run(&["doctor", "--json"]);
        assert_eq!(said.code, Some(3), "{said:?}");
        assert_eq!(said.err, "uffd: this process can't create a userfaultfd: see above\n");
        let report = report(&said);
        assert_eq!(report["usable"], false);
        let call = check(&report, "faults from user mode, userfaultfd(2)");
        assert!(is(call, "no") && call["detail"].as_str().unwrap().contains("EPERM"), "{call}");
        assert!(call["remedies"][0].as_str().unwrap().contains("seccomp"), "{call}");
        let filter = check(&report, "seccomp")["detail"].as_str().unwrap();
        assert!(filter.starts_with("a filter"), "{filter}");
        // The same for people.
        let said = run(&["doctor"]);
        assert!(
            said.code == Some(3) && said.out.contains("helps: in a container, a seccomp profile"),
            "{said:?}"
        );
        drop(file);
    });
}

#[test]
fn doctor_knows_the_limit_of_open_files() {
    require!();
    let mut shell = Command::new("sh");
    let said = shell.args(["-c", "ulimit -n 60 && exec \"$0\" doctor --json", PATH]).output().unwrap();
    let report = report(&said.into());
    let check = check(&report, "open files");
    assert!(check["detail"].as_str().unwrap().starts_with("60: enough for some 10 virtual"), "{check}");
    assert!(!check["remedies"][0].as_str().unwrap().is_empty(), "{check}");
}
