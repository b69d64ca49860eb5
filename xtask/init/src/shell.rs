//! A shell on the console.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use guest_init::Plan;

use crate::guest::Guest;

const BUSYBOX: &str = "/bin/busybox";

/// Runs a shell until it exits.
pub(crate) fn run(_guest: &Guest, plan: &Plan) -> Result<(), String> {
    let installed = Command::new(BUSYBOX).args(["--install", "-s", "/bin"]).status();
    installed.map_err(|e| format!("{BUSYBOX}: {e}"))?;
    let binaries = plan.passes.first().map(|pass| pass.binaries.join(" ")).unwrap_or_default();
    println!("\nTest binaries: {binaries}");
    println!("`exit` powers off.\n");

    let path = format!("/dev/{}", plan.console);
    let open = || File::options().read(true).write(true).open(&path).map_err(|e| format!("{path}: {e}"));
    let mut command = Command::new(BUSYBOX);
    command.args(["sh", "-l"]).current_dir("/tests").env_clear();
    command.env("PATH", "/bin:/tests").env("HOME", "/").env("TERM", "vt100").env("TMPDIR", "/tmp");
    let environment = plan.passes.first().map(|pass| pass.environment.as_slice()).unwrap_or_default();
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    command.stdin(open()?).stdout(open()?).stderr(open()?);
    // SAFETY: the closure makes two system calls and touches no memory.
    unsafe { command.pre_exec(take_terminal) };
    command.status().map(|_| ()).map_err(|e| format!("{BUSYBOX}: {e}"))
}

/// Makes standard input the terminal of a session of its own, so that the shell has job control.
fn take_terminal() -> io::Result<()> {
    // SAFETY: touches no memory.
    if unsafe { libc::setsid() } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes a number, no memory.
    if unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
