//! A group of processes with a limit of memory.

use std::fs;
use std::path::PathBuf;

/// It goes when this is dropped, once its processes have ended.
pub(crate) struct Group(pub(crate) PathBuf);

impl Group {
    /// Makes a group that may have so many bytes, of either version. `None` where none can be made.
    pub(crate) fn new(bytes: usize) -> Option<Self> {
        let name = format!("userfaultfd-eviction-{}", std::process::id());
        let kinds = [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];
        kinds.iter().find_map(|(parent, limit)| {
            let group = Self(PathBuf::from(parent).join(&name));
            fs::create_dir(&group.0).ok()?;
            fs::write(group.0.join(limit), bytes.to_string()).is_ok().then_some(group)
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("{} stays: {error}", self.0.display());
        }
    }
}
