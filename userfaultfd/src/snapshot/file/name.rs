//! The names that a series gives its files in a directory: numbers, so that their order is that of the snapshots.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The end of a name.
const SUFFIX: &[u8] = b".snapshot";

/// The path of the next file of a series in a directory.
pub(crate) fn next_path(directory: &Path) -> io::Result<PathBuf> {
    let mut last = 0;
    for entry in fs::read_dir(directory)? {
        last = last.max(number_of(&entry?.file_name()).unwrap_or(0));
    }
    let next = last.checked_add(1).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            "a file of the directory has the greatest number that there is",
        )
    })?;
    Ok(directory.join(format!("{next:010}{}", String::from_utf8_lossy(SUFFIX))))
}

fn number_of(name: &OsStr) -> Option<u64> {
    let number = name.as_bytes().strip_suffix(SUFFIX)?;
    std::str::from_utf8(number).ok()?.parse().ok()
}
