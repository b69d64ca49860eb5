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
    /// It runs tests.
    is_test: bool,
}

/// Everything that is built for an architecture.
#[derive(Debug)]
pub(super) struct Built {
    pub(super) init: Binary,
    pub(super) tests: Vec<Binary>,
    /// Run by tests.
    pub(super) examples: Vec<Binary>,
    /// No test binary was left out.
    pub(super) is_whole: bool,
}

impl Built {
    /// Whether there are test binaries of these names.
    pub(super) fn check(&self, names: &[String]) -> Result<(), String> {
        let has = |name: &&String| self.tests.iter().any(|test| test.name == **name);
        let Some(unknown) = names.iter().find(|name| !has(name)) else { return Ok(()) };
        let all: Vec<_> = self.tests.iter().map(|test| test.name.as_str()).collect();
        Err(format!("no test binary `{unknown}`; there are {}", all.join(", ")))
    }

    /// Leaves out all test binaries but the named ones, if any are named.
    pub(super) fn keep(&mut self, names: &[String]) -> Result<(), String> {
        self.check(names)?;
        if !names.is_empty() {
            self.tests.retain(|test| names.contains(&test.name));
            self.is_whole = false;
        }
        Ok(())
    }
}

/// The package of the library.
const LIBRARY: &str = "userfaultfd";

/// This package and what it is made of: not for guests.
const NOT_TESTED: [&str; 2] = ["xtask", "guest-init"];

/// Builds the tests of the workspace, its examples, and process 1. For this machine's own architecture that is done by
/// its own compiler in `folder`, for others where the tool chain has what it needs.
///
/// Without `tests` there are none, and examples alone. Where tests of the library are named, only those are built, which run
/// no example.
pub(super) fn build(arch: &Arch, folder: &Path, tests: Option<&[String]>) -> Result<Built, String> {
    let host = host()?;
    let own = arch.target.split('-').next() == host.split('-').next();
    let toolchain = if own { None } else { Some(crate::cross::toolchain(&arch.target)?) };
    let build = |subcommand: &str, arguments: &[&str]| match &toolchain {
        Some(toolchain) => run(&mut toolchain.cargo(subcommand, arguments)),
        None => run(&mut own_cargo(&host, folder, subcommand, arguments)),
    };
    let rest = ["--workspace", "--exclude", NOT_TESTED[0], "--exclude", NOT_TESTED[1]];
    let named = tests.and_then(of_library);
    let selected = match &named {
        Some(named) => {
            let package = ["--package", LIBRARY].into_iter();
            package.chain(named.iter().flat_map(|name| ["--test", *name])).collect()
        }
        None => [&["--tests"], &rest[..]].concat(),
    };
    let with_tests = tests.is_some();
    let mut tests =
        if with_tests { build("test", &[&["--no-run"], &selected[..]].concat())? } else { Vec::new() };
    // A program that the tests of its package run is built, too.
    tests.retain(|binary| binary.is_test);
    let examples = match &named {
        Some(_) => Vec::new(),
        None => build("build", &[&["--examples"], &rest[..]].concat())?,
    };
    let init = build("build", &["--bin", NOT_TESTED[1], "--package", NOT_TESTED[1]])?;
    let init = init.into_iter().next().ok_or("cargo built no process 1")?;
    if with_tests && tests.is_empty() {
        return Err("cargo built no test".to_owned());
    }
    Ok(Built { init, tests, examples, is_whole: with_tests && named.is_none() })
}

/// The test targets of the library that have these names, if there are any names, and none is another's.
fn of_library(names: &[String]) -> Option<Vec<&str>> {
    let targets: Option<Vec<_>> =
        names.iter().map(|name| name.strip_prefix(LIBRARY)?.strip_prefix('-')).collect();
    let is_one = |target: &&str| *target != "unit" && !target.contains('-');
    targets.filter(|targets| !targets.is_empty() && targets.iter().all(is_one))
}

/// The target that this machine's compiler is itself built for.
fn host() -> Result<String, String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let about = crate::command::output(Command::new(rustc).arg("-vV"))?;
    let host = about.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).ok_or_else(|| format!("rustc names no host: {about}"))
}

/// Cargo, for static programs of this machine's own.
fn own_cargo(target: &str, folder: &Path, subcommand: &str, arguments: &[&str]) -> Command {
    let mut command = crate::command::cargo(&[subcommand, "--target", target]);
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
    // What is emulated takes many times as long as it takes to be optimized. Its checks stay.
    command.env("CARGO_PROFILE_DEV_OPT_LEVEL", "1");
    command.stdin(Stdio::null()).stderr(Stdio::inherit());
    let shown = crate::command::display(command);
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
    let is_test = message["profile"]["test"].as_bool()?;
    Some(Binary { name, path: path.into(), is_test })
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
    fn tests_of_the_library_alone_are_built_alone() {
        let of = |names: &[&str]| {
            let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
            of_library(&names).map(|targets| targets.join(","))
        };
        assert_eq!(of(&["userfaultfd-kernel", "userfaultfd-drop_in"]).as_deref(), Some("kernel,drop_in"));
        for others in [&[][..], &["userfaultfd-unit"], &["userfaultfd-kernel", "userfaultfd-sys-abi"]] {
            assert_eq!(of(others), None, "{others:?}");
        }
    }

    #[test]
    fn programs_are_found_in_cargos_messages() {
        let message = |kind: &str, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"/w/userfaultfd/Cargo.toml",
                "target":{{"kind":["{kind}"],"name":"kernel"}},"profile":{{"test":{}}},
                "executable":{executable}}}"#,
                matches!(kind, "test" | "lib")
            )
        };
        let name = |kind, executable| binary(&message(kind, executable)).map(|binary| binary.name);
        assert_eq!(name("test", "\"/t/kernel-1\"").as_deref(), Some("userfaultfd-kernel"));
        assert_eq!(name("lib", "\"/t/kernel-1\"").as_deref(), Some("userfaultfd-unit"));
        assert_eq!(name("example", "\"/t/kernel\"").as_deref(), Some("kernel"));
        assert_eq!(name("lib", "null"), None);
        let is_test = |kind| binary(&message(kind, "\"/t/kernel\"")).map(|binary| binary.is_test);
        assert_eq!(["test", "lib", "bin"].map(is_test), [Some(true), Some(true), Some(false)]);
        assert!(binary(r#"{"reason":"build-finished","success":true}"#).is_none());
        assert!(binary("nothing").is_none());
    }
}
