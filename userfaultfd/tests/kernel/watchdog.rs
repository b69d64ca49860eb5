//! The tests' own time limit.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use super::support::{self, child, require, test_name};

#[test]
fn a_hang_names_its_test_past_the_harness() {
    require!();
    fn limit(command: &mut Command) -> &mut Command {
        command.env(support::SECONDS, "1")
    }
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
