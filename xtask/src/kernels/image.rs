//! The first file system of a guest.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use guest_init::Plan;

use super::binaries::Built;
use super::cpio::Archive;

/// Where things lie in the guest.
pub(super) const TESTS: &str = "tests";
pub(super) const EXAMPLES: &str = "examples";
pub(super) const MODULES: &str = "modules";

/// Writes the archive of a guest that runs `plan`.
pub(super) fn write(
    path: &Path,
    built: &Built,
    plan: &Plan,
    modules: &[PathBuf],
    busybox: Option<&Path>,
) -> Result<(), String> {
    let error = |e| format!("{}: {e}", path.display());
    let mut archive = Archive::new(BufWriter::new(File::create(path).map_err(error)?));
    for folder in ["dev", "bin", TESTS, EXAMPLES, MODULES] {
        archive.folder(folder).map_err(error)?;
    }
    // The kernel opens it for process 1.
    archive.device("dev/console", 5, 1).map_err(error)?;
    archive.file("init", 0o755, &built.init.read()?).map_err(error)?;
    archive.file(Plan::PATH.trim_start_matches('/'), 0o644, plan.to_string().as_bytes()).map_err(error)?;
    for (folder, binaries) in [(TESTS, &built.tests), (EXAMPLES, &built.examples)] {
        for binary in binaries {
            archive.file(&format!("{folder}/{}", binary.name), 0o755, &binary.read()?).map_err(error)?;
        }
    }
    for module in modules {
        archive.file(&format!("{MODULES}/{}", file_name(module)), 0o644, &read(module)?).map_err(error)?;
    }
    if let Some(busybox) = busybox {
        archive.file("bin/busybox", 0o755, &read(busybox)?).map_err(error)?;
    }
    archive.finish().map(|_| ()).map_err(error)
}

pub(super) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|e| format!("{}: {e}", path.display()))
}
