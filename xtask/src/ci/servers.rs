//! Servers that tests start, where the machine hasn't got them.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::command::execute;
use crate::tree;

/// A server of S3, with its dependencies as they come.
const MOTO: &str = "moto[server]==5.2.1";

/// Where the server of S3 is, in an environment of Python's of its own. `None`: it can't be had here.
pub(super) fn moto() -> Option<PathBuf> {
    let folder = tree::scratch().join("moto");
    let program = folder.join("bin/moto_server");
    if !program.exists() {
        execute(Command::new("python3").args(["-m", "venv"]).arg(&folder).stdin(Stdio::null())).ok()?;
        let mut install = Command::new(folder.join("bin/pip"));
        install.args(["install", "--quiet", "--disable-pip-version-check", MOTO]).stdin(Stdio::null());
        execute(&mut install).inspect_err(|error| eprintln!("{error}")).ok()?;
    }
    Some(program)
}
