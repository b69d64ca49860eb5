//! Programs of other architectures run on this machine.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::apt::{self, Apt};
use crate::tree;

const SUITE: &str = "trixie";
const LIMIT: Duration = Duration::from_secs(300);

/// Tests that open a userfaultfd, which the emulator has not: ENOSYS; of how long to spin, for which it is too slow; and
/// of advice to the kernel, which doesn't get it.
const TAKES_A_KERNEL: [&str; 7] = [
    "lazy::sigbus::",
    "pager::memory::page_state::tests::states_take_memory",
    "pager::prefetch::read_ahead::",
    "pager::races::",
    "pager::serve::delivery::",
    "pager::target::",
    "sys::tests::userfaultfd_is_recognised_by_name",
];

/// Tests that passed, and that failed.
pub(super) type Counts = (usize, usize);

/// What runs programs of one architecture.
pub(super) struct Emulator(Option<PathBuf>);

impl Emulator {
    /// None for this machine's own architecture; else QEMU's for user programs: an installed or a fetched one.
    pub(super) fn of(arch: &str) -> Result<Self, String> {
        if arch == std::env::consts::ARCH {
            return Ok(Self(None));
        }
        let names = [format!("qemu-{arch}"), format!("qemu-{arch}-static")];
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders: Vec<_> = std::env::split_paths(&path).collect();
        let paths = folders.iter().flat_map(|folder| names.iter().map(|name| folder.join(name)));
        if let Some(found) = paths.into_iter().find(|path| path.is_file()) {
            return Ok(Self(Some(found)));
        }
        let fetch = || {
            let host = apt::host()?;
            let apt = Apt::open(tree::scratch().join("cross/apt").join(SUITE).join(&host), &[SUITE], &host)?;
            let tree = apt.packages(&["qemu-user".to_owned()], &[""])?;
            let found = tree.join("usr/bin").join(&names[0]);
            if found.is_file() { Ok(found) } else { Err(format!("{} is not there", found.display())) }
        };
        let found = fetch().map_err(|reason: String| {
            format!("{} is not in PATH, and could not be fetched: install qemu-user\n{reason}", names[0])
        })?;
        Ok(Self(Some(found)))
    }

    /// Runs a test binary with its output in `log`.
    pub(super) fn test(&self, binary: &Path, log: &Path) -> Result<Counts, String> {
        let mut command = match &self.0 {
            Some(qemu) => Command::new(qemu),
            None => Command::new(binary),
        };
        if self.0.is_some() {
            command.arg(binary);
            for test in TAKES_A_KERNEL {
                command.args(["--skip", test]);
            }
        }
        let error = |e| format!("{}: {e}", log.display());
        let output = File::create(log).map_err(error)?;
        command.stdin(Stdio::null()).stderr(output.try_clone().map_err(error)?).stdout(output);
        command.current_dir(tree::root());
        let mut child = command.spawn().map_err(|e| format!("{}: {e}", binary.display()))?;
        let start = Instant::now();
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break Ok(status),
                Ok(None) if start.elapsed() < LIMIT => std::thread::sleep(Duration::from_millis(20)),
                result => {
                    let _ = child.kill();
                    let _ = child.wait();
                    break Err(match result {
                        Err(e) => e.to_string(),
                        Ok(_) => format!("no end in {} s", LIMIT.as_secs()),
                    });
                }
            }
        };
        let said = fs::read(log).map_err(error)?;
        let said = String::from_utf8_lossy(&said);
        match (status, counts(&said)) {
            (Ok(status), Some((passed, failed))) if status.success() || failed > 0 => Ok((passed, failed)),
            (Ok(status), _) => Err(format!("{}: {status}: {}", binary.display(), last(&said))),
            (Err(reason), _) => Err(format!("{}: {reason}: {}", binary.display(), last(&said))),
        }
    }
}

fn last(text: &str) -> &str {
    text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("nothing was said")
}

/// The numbers in `test result: ok. 10 passed; 0 failed; …`.
fn counts(text: &str) -> Option<Counts> {
    let line = text.lines().rfind(|line| line.starts_with("test result: "))?;
    let number = |word: &str| {
        let before = line.split_once(&format!(" {word};"))?.0;
        before.rsplit(' ').next()?.parse().ok()
    };
    Some((number("passed")?, number("failed")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_from_the_last_result() {
        let text = "test result: ok. 1 passed; 0 failed; 0 ignored\n\
                    test result: FAILED. 10 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out\n\n";
        assert_eq!(counts(text), Some((10, 2)));
        assert_eq!(counts("running 3 tests\n"), None);
        assert_eq!(last("a\nb\n\n"), "b");
    }
}
