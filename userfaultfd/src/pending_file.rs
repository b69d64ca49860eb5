//! [`PendingFile`]: how everything that this crate saves comes into being.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use crate::owner::Owner;
use crate::{Errno, sys};

/// Symbolic links that are followed, as many as the kernel follows.
const MAX_LINKS: usize = 40;

/// A file that takes its name when it is complete.
///
/// It is written beside the file that it replaces. [`commit`](Self::commit) writes it to the disk, gives it the name,
/// and writes the directory to the disk. At every moment the name leads to all of the old file or to all of the new
/// one: after an error, a full disk, the death of the process, and after a loss of power. A process that reads the old
/// file, or has mapped it, goes on reading it.
///
/// Dropped without `commit`, it is gone. While it is written it has no name, so not even a killed process leaves
/// anything behind; on filesystems without such files (NFS, for one) a killed process leaves a file named
/// `.NAME.….new`.
///
/// The new file has the permissions of the old one, and its owner and group if the process may give files to them.
/// A symbolic link stays, and the file that it leads to is replaced. A pipe or a device is written directly.
///
/// [`SnapshotWriter::create`](crate::snapshot::SnapshotWriter::create) and
/// [`WorkingSet::save`](crate::pager::WorkingSet::save) write such files.
///
/// ```
/// use std::io::Write;
/// use userfaultfd::PendingFile;
///
/// let path = std::env::temp_dir().join(format!("pending-{}", std::process::id()));
/// PendingFile::replace(&path, b"old")?;
///
/// let mut new = PendingFile::create(&path)?;
/// new.write_all(b"new")?;
/// assert_eq!(std::fs::read(&path)?, b"old");
/// new.commit()?;
/// assert_eq!(std::fs::read(&path)?, b"new");
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "without `commit` the file is gone"]
pub struct PendingFile {
    pub(crate) file: File,
    pub(crate) name: FinalName,
}

/// The name that a file will take.
#[derive(Debug)]
pub(crate) struct FinalName {
    /// `None`: what is there isn't a regular file, and is written directly.
    target: Option<PathBuf>,
    /// The name until then, if it has one.
    beside: Option<PathBuf>,
    /// A fork's child that drops what it inherited leaves its parent's file.
    owner: Owner,
    /// Replaces no file: where there is one by now, returns another name in the directory.
    other: Option<OtherName>,
}

/// Returns a name in a directory that no file has at the moment.
pub(crate) type OtherName = fn(&Path) -> io::Result<PathBuf>;

impl PendingFile {
    /// Creates the new file, beside the one at `path` if there is one.
    ///
    /// # Errors
    ///
    /// Those of open(2): the directory can't be written to, the file that is there may not be written.
    pub fn create(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::create_at(path.as_ref(), true)
    }

    /// Creates a file that replaces none: see [`OtherName`].
    #[cfg(feature = "snapshot")]
    pub(crate) fn create_new(directory: &Path, name: OtherName) -> io::Result<Self> {
        let mut file = Self::create_at(&name(directory)?, true)?;
        file.name.other = Some(name);
        Ok(file)
    }

    /// Without `unnamed` it has a name while it is written, as on filesystems that know no other files.
    fn create_at(path: &Path, unnamed: bool) -> io::Result<Self> {
        let owner = Owner::current()?;
        // A user who may not write to the old file doesn't replace it, either.
        let old = match OpenOptions::new().write(true).open(path) {
            Ok(file) => match file.metadata()? {
                metadata if metadata.is_file() => Some(metadata),
                _ => {
                    return Ok(Self {
                        file,
                        name: FinalName { target: None, beside: None, owner, other: None },
                    });
                }
            },
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let target = follow_links(std::path::absolute(path)?)?;
        let mut options = OpenOptions::new();
        // Nobody else gets to read it before its permissions are those of the old one.
        options.write(true).mode(if old.is_some() { 0o600 } else { 0o666 });
        let nameless = unnamed.then(|| {
            let file = options.clone().custom_flags(libc::O_TMPFILE).open(directory(&target)?)?;
            // Where it will get its name from.
            fs::metadata(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
            Ok::<_, io::Error>(file)
        });
        let (file, name) = match nameless {
            Some(Ok(file)) => (file, FinalName { target: Some(target), beside: None, owner, other: None }),
            _ => {
                let beside = name_beside(&target)?;
                let file = options.create_new(true).open(&beside)?;
                (file, FinalName { target: Some(target), beside: Some(beside), owner, other: None })
            }
        };
        if let Some(old) = &old {
            take_over(&file, old)?;
        }
        Ok(Self { file, name })
    }

    /// Writes `bytes` as the new file at `path`, and commits it.
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create) and [`commit`](Self::commit).
    pub fn replace(path: impl AsRef<Path>, bytes: &[u8]) -> io::Result<()> {
        let mut file = Self::create(path)?;
        file.write_all(bytes)?;
        file.commit()
    }

    /// Writes the file to the disk, gives it its name, and writes the directory to the disk.
    ///
    /// # Errors
    ///
    /// Those of fsync(2), linkat(2) and rename(2): the old file is as it was. The directory is written last, so that
    /// its error means that the name leads to the new file, and may lead to the old one again after a loss of power.
    pub fn commit(self) -> io::Result<()> {
        self.name.put(&self.file)
    }

    /// Returns the open file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Write for PendingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl FinalName {
    /// See [`PendingFile::commit`].
    pub(crate) fn put(mut self, file: &File) -> io::Result<()> {
        let Some(target) = &mut self.target else { return sync(file) };
        file.sync_all()?;
        if let Some(other) = self.other {
            let put = |target: &Path| match &self.beside {
                Some(beside) => sys::rename_new(beside, target),
                None => sys::link(file.as_fd(), target),
            };
            while let Err(errno) = put(target) {
                if errno != Errno::EEXIST {
                    return Err(errno.into());
                }
                *target = other(directory(target)?)?;
            }
            self.beside = None;
            return sync(&File::open(directory(target)?)?);
        }
        if self.beside.is_none() {
            match sys::link(file.as_fd(), target) {
                // Only a file with a name can replace another.
                Err(Errno::EEXIST) => {
                    let beside = name_beside(target)?;
                    sys::link(file.as_fd(), &beside)?;
                    self.beside = Some(beside);
                }
                linked => linked?,
            }
        }
        if let Some(beside) = &self.beside {
            fs::rename(beside, &*target)?;
            self.beside = None;
        }
        sync(&File::open(directory(target)?)?)
    }
}

impl Drop for FinalName {
    fn drop(&mut self) {
        if let Some(beside) = self.beside.as_ref().filter(|_| self.owner.is_current()) {
            // What can't be removed is left over.
            drop(fs::remove_file(beside));
        }
    }
}

/// Writes to the disk what can be: pipes and devices can't, nor the directories of some filesystems.
fn sync(file: &File) -> io::Result<()> {
    match file.sync_all() {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result,
    }
}

fn directory(target: &Path) -> io::Result<&Path> {
    target.parent().ok_or_else(|| ErrorKind::InvalidInput.into())
}

/// A hidden name in the same directory.
fn name_beside(target: &Path) -> io::Result<PathBuf> {
    let name = target.file_name().ok_or(ErrorKind::InvalidInput)?.to_string_lossy();
    // A name has at most 255 bytes, and a character at most four.
    let name: String = name.chars().take(50).collect();
    let random = u64::from_ne_bytes(sys::random_bytes()?);
    Ok(directory(target)?.join(format!(".{name}.{random:016x}.new")))
}

/// Where a path leads to, also if nothing is there.
fn follow_links(mut path: PathBuf) -> io::Result<PathBuf> {
    for _ in 0..MAX_LINKS {
        match fs::read_link(&path) {
            Ok(to) => path = directory(&path)?.join(to),
            // No link, or nothing.
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::from_raw_os_error(libc::ELOOP))
}

/// Gives a new file the owner and the permissions of the one that it replaces.
fn take_over(file: &File, old: &Metadata) -> io::Result<()> {
    let new = file.metadata()?;
    let mut mode = old.mode() & 0o777;
    if new.uid() != old.uid() {
        // Otherwise it belongs to the user who writes it.
        drop(fchown(file, Some(old.uid()), None));
    }
    if new.gid() != old.gid() && fchown(file, None, Some(old.gid())).is_err() {
        // What one group may is nothing to another.
        mode &= 0o707;
    }
    if new.mode() & 0o777 != mode {
        file.set_permissions(Permissions::from_mode(mode))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::support::{self, require};

    /// A directory of its own, removed when dropped.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("userfaultfd-pending-{}-{name}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }

        /// Whether files can be without a name there, which isn't so of ramfs in Linux 5.10.
        fn has_unnamed(&self) -> bool {
            OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).open(&self.0).is_ok()
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(&self.0).unwrap();
            let mut names: Vec<_> =
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            drop(fs::remove_dir_all(&self.0));
        }
    }

    fn write(path: &Path, unnamed: bool, bytes: &[u8]) -> PendingFile {
        let mut file = PendingFile::create_at(path, unnamed).unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn forked_child_leaves_the_file_that_it_inherited() {
        require!();
        support::child::run_well(support::test_name!(), || {
            let scratch = Scratch::new("forked");
            let path = scratch.path("file");
            let mut pending = Some(write(&path, false, b"parent's"));
            support::child::fork(|| {
                drop(pending.take());
                // Its own goes, as ever.
                drop(write(&path, false, b"child's"));
            })
            .succeed();
            assert_eq!(scratch.names().len(), 1);
            pending.take().unwrap().commit().unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"parent's");
        });
    }

    #[test]
    fn name_shows_old_file_until_new_one_is_complete() {
        require!();
        for unnamed in [true, false] {
            let scratch = Scratch::new(&format!("until-{unnamed}"));
            let path = scratch.path("file");
            write(&path, unnamed, b"first").commit().unwrap();
            let mut reader = File::open(&path).unwrap();

            let second = write(&path, unnamed, b"second");
            let names = if unnamed && scratch.has_unnamed() { 1 } else { 2 };
            assert_eq!(scratch.names().len(), names, "{:?}", scratch.names());
            assert_eq!(fs::read(&path).unwrap(), b"first");
            second.commit().unwrap();
            assert_eq!(
                (fs::read(&path).unwrap(), scratch.names()),
                (b"second".to_vec(), vec!["file".to_owned()])
            );
            let mut seen = Vec::new();
            reader.read_to_end(&mut seen).unwrap();
            assert_eq!(seen, b"first");

            drop(write(&path, unnamed, b"third"));
            assert_eq!(
                (fs::read(&path).unwrap(), scratch.names()),
                (b"second".to_vec(), vec!["file".to_owned()])
            );
        }
    }

    #[test]
    fn new_file_is_as_permissive_as_the_old() {
        require!();
        for unnamed in [true, false] {
            let scratch = Scratch::new(&format!("mode-{unnamed}"));
            let path = scratch.path("file");
            write(&path, unnamed, b"").commit().unwrap();
            // As any other file.
            File::create(scratch.path("other")).unwrap();
            let mode = |name| fs::metadata(scratch.path(name)).unwrap().mode() & 0o777;
            assert_eq!(mode("file"), mode("other"));
            for wanted in [0o600, 0o640, 0o666] {
                fs::set_permissions(&path, Permissions::from_mode(wanted)).unwrap();
                write(&path, unnamed, b"").commit().unwrap();
                assert_eq!(mode("file"), wanted, "{unnamed}");
            }
        }
        if support::is_root() {
            let scratch = Scratch::new("owner");
            let path = scratch.path("file");
            write(&path, true, b"").commit().unwrap();
            std::os::unix::fs::chown(&path, Some(12), Some(34)).unwrap();
            write(&path, true, b"").commit().unwrap();
            let now = fs::metadata(&path).unwrap();
            assert_eq!((now.uid(), now.gid()), (12, 34));
        }
    }

    #[test]
    fn links_stay_and_lead_to_the_new_file() {
        require!();
        let scratch = Scratch::new("links");
        fs::create_dir(scratch.path("folder")).unwrap();
        std::os::unix::fs::symlink("folder/file", scratch.path("link")).unwrap();
        std::os::unix::fs::symlink("link", scratch.path("again")).unwrap();
        // Also where nothing is yet.
        for bytes in [&b"first"[..], b"second"] {
            PendingFile::replace(scratch.path("again"), bytes).unwrap();
            assert!(fs::symlink_metadata(scratch.path("link")).unwrap().is_symlink());
            assert_eq!(fs::read(scratch.path("folder/file")).unwrap(), bytes);
        }
        std::os::unix::fs::symlink("round", scratch.path("round")).unwrap();
        let error = PendingFile::create(scratch.path("round")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn pipe_or_a_device_is_written_directly() {
        require!();
        PendingFile::replace("/dev/null", b"nothing").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
        let mut reader = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let pipe = reader.stdin.take().unwrap();
        PendingFile::replace(format!("/proc/self/fd/{}", pipe.as_raw_fd()), b"through").unwrap();
        drop(pipe);
        assert_eq!(reader.wait_with_output().unwrap().stdout, b"through");
    }

    #[test]
    fn unreplaceable_path_is_refused_at_once() {
        require!();
        let scratch = Scratch::new("errors");
        let kind = |path: PathBuf| PendingFile::create(path).unwrap_err().kind();
        assert_eq!(kind(scratch.0.clone()), ErrorKind::IsADirectory);
        assert_eq!(kind(scratch.path("nowhere/file")), ErrorKind::NotFound);
        assert_eq!(kind(PathBuf::new()), ErrorKind::InvalidInput);
        // A long name has room beside it.
        PendingFile::create_at(&scratch.path(&"ü".repeat(127)), false).unwrap().commit().unwrap();
        if !support::is_root() {
            let path = scratch.path("read-only");
            PendingFile::replace(&path, b"kept").unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o444)).unwrap();
            assert_eq!(kind(path), ErrorKind::PermissionDenied);
        }
    }
}
