//! Programs that tests start, where the machine hasn't got them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::apt::{self, Apt};
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

/// The first release of Debian whose CRIU restores lazily on new kernels.
const CRIU_SUITE: &str = "trixie";

/// A script that runs CRIU, which is unpacked with all that it needs: the machine may have older libraries. `None`: it can't be had
/// here.
pub(super) fn criu() -> Option<PathBuf> {
    fetch_criu().inspect_err(|reason| println!("without CRIU: {reason}")).ok()
}

fn fetch_criu() -> Result<PathBuf, String> {
    let folder = tree::scratch().join("criu");
    let apt = Apt::open(folder.join("apt"), &[CRIU_SUITE], &apt::host()?)?;
    let unpacked = apt.with_dependencies(&["criu"])?;
    let is_loader =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ld-linux"));
    let loader = apt::files(&unpacked).into_iter().find(is_loader).ok_or("it came without a loader")?;
    let libraries = loader.parent().unwrap_or(&unpacked).display();
    let script = folder.join("criu.sh");
    let text = format!(
        "#!/bin/sh\nexec {} --library-path {libraries} {} \"$@\"\n",
        loader.display(),
        unpacked.join("usr/sbin/criu").display()
    );
    let error = |error| format!("{}: {error}", script.display());
    fs::write(&script, text).map_err(error)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).map_err(error)?;
    Ok(script)
}
