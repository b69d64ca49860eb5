//! Programs and libraries that are published as Python packages, unpacked into a folder of ours.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// Unpacks wheels of `packages` into `folder`. The error is a line for everything that was tried.
pub(crate) fn install(folder: &Path, packages: &[&str]) -> Result<(), String> {
    eprintln!("fetching {} into {}", packages.join(" and "), folder.display());
    let mut failures = String::new();
    for pip in [&["pip3"][..], &["pip"], &["python3", "-m", "pip"]] {
        let mut command = Command::new(pip[0]);
        command.args(&pip[1..]).args(["install", "--quiet", "--disable-pip-version-check", "--no-deps"]);
        command.args(["--only-binary", ":all:", "--target"]).arg(folder).args(packages);
        match command.stdin(Stdio::null()).output() {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => {
                failures += &format!("\n{}: {}", pip.join(" "), String::from_utf8_lossy(&output.stderr));
            }
            Err(e) => failures += &format!("\n{}: {e}", pip.join(" ")),
        }
        // What a failed attempt leaves must not be taken for the packages.
        let _ = fs::remove_dir_all(folder);
    }
    Err(failures)
}
