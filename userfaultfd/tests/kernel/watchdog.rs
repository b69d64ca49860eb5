//! The tests' own time limit.

use std::fs::File;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::Duration;

use super::support::lock::Lock;
use super::support::{self, child, require, test_name};

fn limit(command: &mut Command) -> &mut Command {
    command.env(support::SECONDS, "1")
}

#[test]
fn hang_names_its_test_past_the_harness() {
    require!();
    let output = child::run_with(test_name!(), limit, || {
        // As a thread that hangs while it prints.
        let _lock = io::stderr().lock();
        loop {
            std::thread::park();
        }
    });
    let Some(output) = output else { return };
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.lines().any(|line| line == format!("{} hangs", test_name!())), "{output:?}");
}

/// Here it is the clock that is tested, so it has to run.
#[test]
fn waiting_for_another_process_is_no_hang() {
    require!();
    let output = child::run_with(test_name!(), limit, || {
        let path = std::env::temp_dir().join(format!("userfaultfd-watchdog-{}", std::process::id()));
        let held = Lock::wait(File::create(&path).unwrap());
        let other = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(1500));
            drop(held);
        });
        drop(Lock::wait(other));
    });
    let Some(output) = output else { return };
    assert!(output.status.success(), "{output:?}");
}
