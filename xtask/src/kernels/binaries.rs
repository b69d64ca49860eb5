//! The programs that run in a guest: static, so that they need nothing else there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::table::Arch;

/// A program for guests.
#[derive(Clone, Debug)]
pub(super) struct Binary {
    /// What a reader calls it, and its name in the guest.
    pub(super) name: String,
    pub(super) path: PathBuf,
}

/// Everything that is built for an architecture.
#[derive(Debug)]
pub(super) struct Built {
    pub(super) init: Binary,
    pub(super) tests: Vec<Binary>,
    /// Run by tests.
    pub(super) examples: Vec<Binary>,
}

/// This package and what it is made of: not for guests.
const NOT_TESTED: [&str; 2] = ["xtask", "guest-init"];

/// Builds the tests of the workspace, its examples, and process 1. On this machine's own architecture that is done in
/// `folder`, elsewhere where the tool chain has what it needs.
pub(super) fn build(arch: &Arch, folder: &Path) -> Result<Built, String> {
    let own = arch.target.split('-').next() == Some(std::env::consts::ARCH);
    let toolchain = if own { None } else { Some(crate::cross::toolchain(&arch.target)?) };
    let build = |subcommand: &str, arguments: &[&str]| match &toolchain {
        Some(toolchain) => run(&mut toolchain.cargo(subcommand, arguments)),
        None => run(&mut own_cargo(&arch.target, folder, subcommand, arguments)),
    };
    let rest = ["--workspace", "--exclude", NOT_TESTED[0], "--exclude", NOT_TESTED[1]];
    let tests = build("test", &[&["--no-run", "--tests"], &rest[..]].concat())?;
    let examples = build("build", &[&["--examples"], &rest[..]].concat())?;
    let init = build("build", &["--bins", "--package", NOT_TESTED[1]])?;
    let init = init.into_iter().next().ok_or("cargo built no process 1")?;
    if tests.is_empty() {
        return Err("cargo built no test".to_owned());
    }
    Ok(Built { init, tests, examples })
}

/// Cargo, for static programs of this machine's architecture.
fn own_cargo(target: &str, folder: &Path, subcommand: &str, arguments: &[&str]) -> Command {
    let mut command = crate::ci::cargo(&[subcommand, "--target", target]);
    command.args(arguments).env("CARGO_TARGET_DIR", folder);
    // The flags hold for the target alone, not for build scripts, since --target is given.
    command.env_remove("CARGO_ENCODED_RUSTFLAGS").env("RUSTFLAGS", "-Ctarget-feature=+crt-static");
    command.env("CARGO_PROFILE_DEV_DEBUG", "0");
    command
}

fn run(command: &mut Command) -> Result<Vec<Binary>, String> {
    command.args(["--quiet", "--message-format=json-render-diagnostics"]);
    // Small enough to be unpacked by many guests; back-traces have the names of functions.
    command.env("CARGO_PROFILE_DEV_STRIP", "debuginfo");
    command.stdin(Stdio::null()).stderr(Stdio::inherit());
    let shown = crate::ci::display(command);
    let output = command.output().map_err(|e| format!("{shown}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{shown}: {}", output.status));
    }
    let mut binaries: Vec<_> = String::from_utf8_lossy(&output.stdout).lines().filter_map(binary).collect();
    binaries.sort_by(|a, b| a.name.cmp(&b.name));
    for pair in binaries.windows(2) {
        if pair[0].name == pair[1].name {
            return Err(format!("two binaries are called {}", pair[0].name));
        }
    }
    Ok(binaries)
}

/// The program that one of cargo's messages is about.
fn binary(message: &str) -> Option<Binary> {
    let message: Value = serde_json::from_str(message).ok()?;
    let path = message["executable"].as_str()?;
    let name = message["target"]["name"].as_str()?;
    let manifest = Path::new(message["manifest_path"].as_str()?);
    let package = manifest.parent()?.file_name()?.to_str()?;
    let name = match message["target"]["kind"][0].as_str()? {
        "test" => format!("{package}-{name}"),
        "lib" => format!("{package}-unit"),
        _ => name.to_owned(),
    };
    Some(Binary { name, path: path.into() })
}

impl Binary {
    pub(super) fn read(&self) -> Result<Vec<u8>, String> {
        fs::read(&self.path).map_err(|e| format!("{}: {e}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_cargos_messages() {
        let message = |kind: &str, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"/w/userfaultfd/Cargo.toml",
                "target":{{"kind":["{kind}"],"name":"kernel"}},"executable":{executable}}}"#
            )
        };
        let name = |kind, executable| binary(&message(kind, executable)).map(|binary| binary.name);
        assert_eq!(name("test", "\"/t/kernel-1\"").as_deref(), Some("userfaultfd-kernel"));
        assert_eq!(name("lib", "\"/t/kernel-1\"").as_deref(), Some("userfaultfd-unit"));
        assert_eq!(name("example", "\"/t/kernel\"").as_deref(), Some("kernel"));
        assert_eq!(name("lib", "null"), None);
        assert!(binary(r#"{"reason":"build-finished","success":true}"#).is_none());
        assert!(binary("nothing").is_none());
    }
}
