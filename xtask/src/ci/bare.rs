//! A build on a machine that has Rust and a linker, and nothing else: as far as this machine can look like one.

use std::env;
use std::ffi::OsStr;
use std::process::Command;

use super::step::Outcome;
use crate::command::{cargo, execute, output};
use crate::tree;

/// Packages that a build from committed bindings has no use for. Not cc, which the build script of blake3 names and doesn't
/// need: below, every compiler fails.
const UNWANTED: &[&str] = &["bindgen", "clang-sys", "cmake", "pkg-config"];

/// What cargo, rustc and the linker can't do without.
const KEPT: &[&str] = &["PATH", "HOME", "CARGO_HOME", "RUSTUP_HOME", "RUSTUP_TOOLCHAIN", "TMPDIR"];

/// Ways to give a command an empty /usr/include of its own: without privilege, and with.
const NAMESPACES: &[&[&str]] = &[&["unshare", "--map-root-user", "--mount"], &["unshare", "--mount"]];
const VISIBLE: &str = "it builds, but /usr/include can't be hidden: there are no mount namespaces here";
const HIDE: &str = "mount -t tmpfs none /usr/include && exec \"$@\"";

pub(super) fn run() -> Result<Outcome, String> {
    let arguments =
        ["tree", "--package=userfaultfd", "--edges=normal,build", "--prefix=none", "--format={p}"];
    let tree = output(&mut cargo(&arguments))?;
    let packages = tree.lines().filter_map(|line| line.split(' ').next());
    if let Some(unwanted) = packages.into_iter().find(|package| UNWANTED.contains(package)) {
        return Err(format!("userfaultfd depends on {unwanted}"));
    }

    let target = tree::scratch().join("bare");
    tree::remove(&target)?;
    let build = cargo(&["build", "--package=userfaultfd-sys", "--package=userfaultfd"]);
    let namespace = NAMESPACES.iter().find(|namespace| {
        let arguments = hide(namespace, OsStr::new("true"));
        output(Command::new(namespace[0]).args(arguments)).is_ok()
    });
    let mut command = match namespace {
        Some(namespace) => {
            let mut command = Command::new(namespace[0]);
            command.args(hide(namespace, build.get_program()));
            command
        }
        None => Command::new(build.get_program()),
    };
    command.args(build.get_args()).current_dir(tree::root()).env_clear();
    command.envs(KEPT.iter().filter_map(|name| Some((name, env::var_os(name)?))));
    command.env("CARGO_TARGET_DIR", target);
    for compiler in ["CC", "CXX", "CLANG_PATH", "LLVM_CONFIG_PATH"] {
        command.env(compiler, "/bin/false");
    }
    command.env("LIBCLANG_PATH", "/nonexistent");
    execute(&mut command)?;
    // It wasn't shown that the build needs no headers.
    Ok(if namespace.is_some() { Outcome::Passed } else { Outcome::Skipped(VISIBLE) })
}

/// The arguments of `namespace` that run `program` there.
fn hide<'a>(namespace: &'a [&'a str], program: &'a OsStr) -> impl Iterator<Item = &'a OsStr> {
    let shell = ["sh", "-c", HIDE, "sh"];
    namespace[1..].iter().copied().chain(shell).map(OsStr::new).chain([program])
}
