//! Started on a machine that people use, it changes nothing.

use std::fs;
use std::io::Write;
use std::process::Command;

const PROGRAM: &str = env!("CARGO_BIN_EXE_guest-init");

/// What it would change first.
fn state() -> [Option<String>; 3] {
    let files = ["self/mountinfo", "swaps", "sys/kernel/printk"];
    files.map(|file| fs::read_to_string(format!("/proc/{file}")).ok())
}

#[test]
fn init_refuses_unless_process_1() {
    let before = state();
    for arguments in [&[][..], &["i-am-a-guest"]] {
        let output = Command::new(PROGRAM).args(arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(errors.contains("does nothing here") && errors.contains("process 1"), "{errors}");
        assert!(output.stdout.is_empty(), "{output:?}");
    }
    assert_eq!(state(), before);
}

/// In a container there is a process 1, too.
#[test]
fn init_refuses_in_container() {
    let before = state();
    let in_namespace = |program: &[&str]| {
        Command::new("unshare").args(["--pid", "--fork", "--mount"]).args(program).output()
    };
    if !in_namespace(&["true"]).is_ok_and(|output| output.status.success()) {
        // Past the harness, which captures what a passing test prints.
        let skip = "SKIP init_refuses_in_container: needs the right to make PID namespaces";
        writeln!(std::io::stderr(), "{skip}").unwrap();
        return;
    }
    for (arguments, reason) in [(&[][..], "not started with"), (&["i-am-a-guest"], "initramfs")] {
        let program: Vec<&str> = [PROGRAM].into_iter().chain(arguments.iter().copied()).collect();
        let output = in_namespace(&program).unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{output:?}");
        assert!(errors.contains("does nothing here") && errors.contains(reason), "{errors}");
    }
    assert_eq!(state(), before);
}
