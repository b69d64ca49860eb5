//! The files of a series in a directory.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::format::{FormatError, SnapshotId};
use super::input::Input;
use super::layer::{Layer, read_header};
use super::reader::SnapshotReader;

/// A chain of snapshot files in a directory: a base, which holds everything, and the increments that follow it.
///
/// ```
/// use userfaultfd::pager::PageSource;
/// use userfaultfd::snapshot::{Chain, Error, Options};
///
/// let folder = std::env::temp_dir().join(format!("chain-{}", std::process::id()));
/// std::fs::create_dir(&folder)?;
/// let mut memory = memmap2::MmapMut::map_anon(16 * userfaultfd::page_size())?;
/// let range = memory.as_ptr().addr()..memory.as_ptr().addr() + memory.len();
/// let mut series = match Options::new().range(range).series() {
///     Ok(series) => series,
///     Err(Error::Kernel(error)) => return Ok(println!("{error}")), // no write protection here
///     Err(error) => return Err(error.into()),
/// };
/// for round in 0..5 {
///     memory[0] = round;
///     series.begin_in(&folder, 100)?.wait()?;
/// }
/// let chain = Chain::open(&folder)?;
/// assert_eq!(chain.files().len(), 5);
/// assert_eq!(chain.into_reader()?.len(), Some(memory.len() as u64));
/// # std::fs::remove_dir_all(&folder)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Chain {
    /// From the base on.
    files: Vec<PathBuf>,
}

impl Chain {
    /// Finds the files of a directory and their order, by the snapshot that each one follows. Of several chains, as after a
    /// new base, it takes the one whose newest file has the greatest name.
    ///
    /// Skips [unfinished](FormatError::is_unfinished) files, hidden files, and directories.
    ///
    /// # Errors
    ///
    /// [`FormatError::File`]: a file is no snapshot, or damaged. [`FormatError::NeedsParent`]: the chain has no base
    /// here. [`FormatError::NotAChain`]: there is no snapshot, or they follow each other in a circle.
    /// [`FormatError::Io`]: the directory can't be read.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self, FormatError> {
        let mut found: HashMap<SnapshotId, (PathBuf, Option<SnapshotId>)> = HashMap::new();
        // By their names, so that of two files of the same snapshot, as a merged one is, the last one counts.
        let mut paths = BTreeMap::new();
        for entry in fs::read_dir(std::path::absolute(directory)?)? {
            let entry = entry?;
            let name = entry.file_name();
            if !name.as_bytes().starts_with(b".") && entry.path().is_file() {
                paths.insert(name, entry.path());
            }
        }
        for path in paths.into_values() {
            match check(&path) {
                Ok((id, parent)) => drop(found.insert(id, (path, parent))),
                Err(error) if error.is_unfinished() => {}
                Err(error) => return Err(FormatError::File { path, error: Box::new(error) }),
            }
        }
        let followed: Vec<SnapshotId> = found.values().filter_map(|(_, parent)| *parent).collect();
        let newest = found.iter().filter(|(id, _)| !followed.contains(id));
        let newest = newest.max_by_key(|(_, (path, _))| path.clone()).map(|(id, _)| *id);
        let mut next = newest.ok_or(FormatError::NotAChain("none is the newest"))?;
        let mut files = Vec::new();
        loop {
            let (path, parent) = found.remove(&next).ok_or(FormatError::NeedsParent { parent: next })?;
            files.insert(0, path);
            match parent {
                Some(parent) => next = parent,
                None => return Ok(Self { files }),
            }
        }
    }

    /// Returns the files, the base first.
    #[must_use]
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Opens the files as one snapshot.
    ///
    /// # Errors
    ///
    /// As [`SnapshotReader::open`] and [`SnapshotReader::on`], in a [`FormatError::File`].
    pub fn into_reader(self) -> Result<SnapshotReader, FormatError> {
        let mut reader: Option<SnapshotReader> = None;
        for path in self.files {
            let opened = SnapshotReader::open(&path).and_then(|one| match reader.take() {
                Some(below) => one.on(below),
                None => Ok(one),
            });
            reader = Some(opened.map_err(|error| FormatError::File { path, error: Box::new(error) })?);
        }
        reader.ok_or(FormatError::NotAChain("it is empty"))
    }
}

/// Opens a file to see that it is whole, and what it follows.
fn check(path: &Path) -> Result<(SnapshotId, Option<SnapshotId>), FormatError> {
    let input = Input::File(Arc::new(File::open(path)?));
    let header = read_header(&input)?;
    Layer::open(input, None)?;
    Ok((header.id, header.parent))
}
