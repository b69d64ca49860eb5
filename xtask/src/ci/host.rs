//! What this machine has of what tests may ask for. It is asked here, without the library, so that a test can't be
//! skipped for what is there.

use std::fs::{self, File};
use std::path::Path;

use crate::command::{cargo, output};

/// The bit of WP_ASYNC, which came with the same release as PAGEMAP_SCAN.
const WP_ASYNC: u64 = 1 << 15;

pub(super) struct Host {
    pub(super) release: String,
    /// The mask of its userfaultfd's features.
    pub(super) features: u64,
    /// Of the needs that xtask/kernels.toml names, those that aren't met.
    pub(super) unmet: Vec<String>,
}

impl Host {
    /// Asks for each of the needs. One that isn't known here is an error: the table has got a new one.
    pub(super) fn ask(needs: &[String]) -> Result<Self, String> {
        let program = ["run", "--quiet", "--package=guest-init", "--bin=ask-kernel"];
        let answer = output(&mut cargo(&program))?;
        let [release, mask, forks] = answer.split_whitespace().collect::<Vec<_>>()[..] else {
            return Err(format!("ask-kernel answers `{answer}`"));
        };
        let features = u64::from_str_radix(mask, 16).map_err(|e| format!("the mask {mask}: {e}"))?;
        let mut unmet = Vec::new();
        for need in needs {
            if !is_met(need, features, forks == "true")? {
                unmet.push(need.clone());
            }
        }
        Ok(Self { release: release.to_owned(), features, unmet })
    }
}

fn is_met(need: &str, features: u64, may_watch_forks: bool) -> Result<bool, String> {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let opens = |path: &str, reads: bool| File::options().read(reads).write(true).open(path).is_ok();
    Ok(match need {
        "root" => is_root(&text("/proc/self/status")),
        "CAP_SYS_PTRACE" => may_watch_forks,
        // A user who may change the pool gets the few pages that a test needs.
        "hugetlb" => opens("/proc/sys/vm/nr_hugepages", false),
        // The first line is the head of the table.
        "swap" => text("/proc/swaps").lines().count() > 1,
        "/dev/userfaultfd" => opens("/dev/userfaultfd", true),
        "regular files" => file_system(&text("/proc/self/mounts"), &std::env::temp_dir()) != Some("tmpfs"),
        "PAGEMAP_SCAN" => features & WP_ASYNC != 0 && Path::new("/proc/self/pagemap").exists(),
        _ => return Err(format!("xtask/kernels.toml names a need that ci/host.rs can't ask for: {need}")),
    })
}

/// Whether the effective user of a process is the superuser, from its `/proc/PID/status`.
fn is_root(status: &str) -> bool {
    let user = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    user.and_then(|numbers| numbers.split_whitespace().nth(1)) == Some("0")
}

/// The kind of the file system that has a folder, from `/proc/self/mounts`.
fn file_system<'a>(mounts: &'a str, folder: &Path) -> Option<&'a str> {
    let mounted = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        Some((words.next()?, words.next()?))
    });
    // Of two in one place, the later one is seen.
    mounted
        .filter(|(place, _)| folder.starts_with(place))
        .max_by_key(|(place, _)| place.len())
        .map(|(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::table::Table;

    #[test]
    fn every_need_of_table_can_be_checked() {
        for need in Table::read().unwrap().needs {
            is_met(&need, 0, false).unwrap();
        }
        assert!(is_met("a coffee", 0, false).is_err());
        assert_eq!(is_met("PAGEMAP_SCAN", 0x7fff, false), Ok(false));
    }

    #[test]
    fn effective_user_is_read_from_a_status() {
        assert!(is_root("Name:\tx\nUid:\t1000\t0\t0\t0\n"));
        assert!(!is_root("Uid:\t0\t1000\t0\t0\n") && !is_root(""));
    }

    #[test]
    fn innermost_mount_has_a_folder() {
        let mounts = "/dev/vda / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/vdb /tmp/a xfs rw 0 0\n";
        let of = |folder| file_system(mounts, Path::new(folder));
        assert_eq!([of("/tmp"), of("/tmpfs"), of("/tmp/a/b")], [Some("tmpfs"), Some("ext4"), Some("xfs")]);
        let hidden = format!("{mounts}ramfs /tmp ramfs rw 0 0\n");
        assert_eq!(file_system(&hidden, Path::new("/tmp")), Some("ramfs"));
    }
}
