//! The workspace, and trees of files.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// The workspace.
pub(crate) fn root() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

/// Where what this program makes, and may lose, lies.
pub(crate) fn scratch() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from).join("xtask")
}

pub(crate) fn remove(folder: &Path) -> Result<(), String> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(format!("{}: {e}", folder.display())),
        _ => Ok(()),
    }
}

/// Copies a tree without what git and cargo keep for themselves. Links become what they point to.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<(), String> {
    let error = |e| format!("{}: {e}", from.display());
    fs::create_dir_all(to).map_err(error)?;
    for entry in fs::read_dir(from).map_err(error)? {
        let entry = entry.map_err(error)?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if !from.is_dir() {
            fs::copy(&from, &to).map_err(|e| format!("{}: {e}", from.display()))?;
        } else if entry.file_name() != ".git" && !from.join("CACHEDIR.TAG").exists() {
            copy(&from, &to)?;
        }
    }
    Ok(())
}
