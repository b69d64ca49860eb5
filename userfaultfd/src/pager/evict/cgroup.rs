//! The limit of memory that a container has, and how short it is.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The interval between two looks, by the thread of the budget.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// The share of an interval in which some thread waited for memory, as a divisor, from which on it is short.
const PRESSURE_SHARE: u32 = 10;

/// What is given up in an interval in which memory is short, and taken back in one in which it isn't: these shares.
const SHRINK_SHARE: usize = 8;
const GROW_SHARE: usize = 32;

/// The least that is left under pressure: this share of the whole.
const FLOOR_SHARE: usize = 4;

/// Where the limits of this process lie, and what of them is wanted.
#[derive(Debug)]
pub(super) struct Cgroup {
    /// Open files, each with a number of bytes or `max`. The least counts.
    limits: Vec<File>,
    /// Bytes of the machine: where there is no limit.
    machine: u64,
    fraction: f64,
    /// The file of `pressure stall information`, if there is one.
    pressure: Option<File>,
    /// Microseconds that threads had waited by the last look, and when that was.
    stalled: (u64, Instant),
    /// What pressure has left of the limit, and what it is of, in bytes.
    now: usize,
    whole: usize,
}

impl Cgroup {
    /// Finds the limits of this process: of its group and of all above.
    pub(super) fn find(fraction: f64) -> io::Result<Self> {
        let (groups, mounts) =
            (fs::read_to_string("/proc/self/cgroup")?, fs::read_to_string("/proc/self/mountinfo")?);
        let machine = bytes_of_machine(&fs::read_to_string("/proc/meminfo")?);
        let machine = machine.ok_or_else(|| io::Error::other("no MemTotal in /proc/meminfo"))?;
        let mut limits = Vec::new();
        let mut pressure = None;
        for (dir, top) in dirs_of(&groups, &mounts) {
            pressure = pressure.or_else(|| File::open(dir.join("memory.pressure")).ok());
            for dir in dir.ancestors().take_while(|dir| dir.starts_with(&top)) {
                let files = ["memory.max", "memory.high", "memory.limit_in_bytes"];
                limits.extend(files.iter().filter_map(|name| File::open(dir.join(name)).ok()));
            }
        }
        let pressure = pressure.or_else(|| File::open("/proc/pressure/memory").ok());
        Ok(Self::new(limits, pressure, machine, fraction))
    }

    pub(super) fn new(limits: Vec<File>, pressure: Option<File>, machine: u64, fraction: f64) -> Self {
        let stalled = (pressure.as_ref().and_then(stalled_us).unwrap_or(0), Instant::now());
        let mut cgroup = Self { limits, machine, fraction, pressure, stalled, now: 0, whole: 0 };
        cgroup.whole = cgroup.fraction_of_limit();
        cgroup.now = cgroup.whole;
        cgroup
    }

    /// The bytes that were found last.
    pub(super) fn bytes(&self) -> usize {
        self.now
    }

    /// The fraction of the least limit.
    fn fraction_of_limit(&self) -> usize {
        let least = self.limits.iter().filter_map(number_in).fold(self.machine, u64::min);
        (least as f64 * self.fraction) as usize
    }

    /// Looks at limit and pressure. Returns the bytes that are left, if they have changed. Allocates nothing.
    pub(super) fn look(&mut self) -> Option<usize> {
        let (since, before) = (self.stalled.1.elapsed(), self.stalled.0);
        let stalled = self.pressure.as_ref().and_then(stalled_us).unwrap_or(before);
        self.stalled = (stalled, Instant::now());
        let is_short = Duration::from_micros(stalled.saturating_sub(before)) > since / PRESSURE_SHARE;
        self.adapt(is_short)
    }

    fn adapt(&mut self, is_short: bool) -> Option<usize> {
        let (was, whole) = (self.now, self.fraction_of_limit());
        if whole != self.whole {
            (self.whole, self.now) = (whole, whole);
        }
        self.now = if is_short {
            (self.now - self.now / SHRINK_SHARE).max(whole / FLOOR_SHARE)
        } else {
            (self.now + whole / GROW_SHARE).min(whole)
        };
        (self.now != was).then_some(self.now)
    }
}

/// Reads the beginning of a file that the kernel makes.
fn read_text<'a>(file: &File, buffer: &'a mut [u8; 256]) -> Option<&'a str> {
    let len = file.read_at(buffer, 0).ok()?;
    std::str::from_utf8(&buffer[..len]).ok()
}

/// The number in a file; `None` for `max`, and where it can't be read, as of a group that is gone.
fn number_in(file: &File) -> Option<u64> {
    let mut buffer = [0; 256];
    read_text(file, &mut buffer)?.trim_end().parse().ok()
}

/// Microseconds in which some thread waited for memory, since the machine started: `some … total=N`.
fn stalled_us(file: &File) -> Option<u64> {
    let mut buffer = [0; 256];
    let line = read_text(file, &mut buffer)?.lines().find(|line| line.starts_with("some "))?;
    line.split_once("total=")?.1.trim_end().parse().ok()
}

fn bytes_of_machine(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The directories of the groups that limit memory, of version 2 and 1, each with the place where they are mounted.
fn dirs_of(groups: &str, mounts: &str) -> Vec<(PathBuf, PathBuf)> {
    let mut dirs = Vec::new();
    for group in groups.lines() {
        let mut parts = group.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let is_2 = controllers.is_empty();
        if !is_2 && !controllers.split(',').any(|controller| controller == "memory") {
            continue;
        }
        // `ID PARENT DEV ROOT MOUNT OPTIONS … - TYPE SOURCE OPTIONS`
        let mount = mounts.lines().find_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let (mut before, mut after) = (before.split(' ').skip(3), after.split(' '));
            let (root, place) = (before.next()?, before.next()?);
            let (kind, options) = (after.next()?, after.nth(1)?);
            let fits = match kind {
                "cgroup2" => is_2,
                "cgroup" => !is_2 && options.split(',').any(|option| option == "memory"),
                _ => false,
            };
            fits.then_some((root, place))
        });
        let Some((root, place)) = mount else { continue };
        // In a container the root of the mount is the group itself, whose path the file has in full.
        let inside = Path::new(path).strip_prefix(root).unwrap_or(Path::new(""));
        let place = PathBuf::from(place);
        // Without a slash at its end, which an empty part would leave.
        dirs.push((place.join(inside).components().collect(), place));
    }
    dirs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pager::Budget;
    use crate::support::mapping::memfd_of_bytes;
    use crate::support::proc::wait_until;
    use crate::support::require;
    use crate::{FeatureFlags, LazyMemory, page_size};

    fn file(text: &str) -> File {
        let file = File::from(memfd_of_bytes(0, 0));
        write(&file, text);
        file
    }

    fn write(file: &File, text: &str) {
        file.write_all_at(text.as_bytes(), 0).unwrap();
        file.set_len(text.len() as u64).unwrap();
    }

    fn again(file: &File) -> File {
        file.try_clone().unwrap()
    }

    #[test]
    fn groups_of_both_versions_are_found_where_they_are_mounted() {
        require!();
        let mounts = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
             35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
             36 31 0:33 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu\n\
             41 31 0:38 /box /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n";
        let found = |groups: &str| {
            let dirs = dirs_of(groups, mounts).into_iter();
            dirs.map(|(dir, _)| dir.to_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(found("4:memory:/a/b\n1:cpu:/c\n"), ["/sys/fs/cgroup/memory/a/b"]);
        assert_eq!(found("4:cpu,memory:/\n"), ["/sys/fs/cgroup/memory"]);
        assert_eq!(found("0::/box/in:side\n"), ["/sys/fs/cgroup/unified/in:side"]);
        // Seen from a namespace of its own.
        assert_eq!(found("0::/\n"), ["/sys/fs/cgroup/unified"]);
        assert_eq!(found("1:name=systemd:/x\n\n7\n"), [""; 0]);
        assert_eq!(bytes_of_machine("MemTotal:    16 kB\nMemFree: 1 kB\n"), Some(16384));
    }

    #[test]
    fn least_limit_counts_and_is_followed() {
        require!();
        let (one, two) = (file("max\n"), file("4000\n"));
        let mut cgroup = Cgroup::new(vec![again(&one), again(&two)], None, 100_000, 0.5);
        assert_eq!((cgroup.bytes(), cgroup.look()), (2000, None));
        write(&one, "1000\n");
        assert_eq!((cgroup.look(), cgroup.look()), (Some(500), None));
        write(&one, "max\n");
        write(&two, "max\n");
        assert_eq!(cgroup.look(), Some(50_000));
        // A group of version 1 without a limit has a number that no machine has.
        write(&two, "9223372036854771712\n");
        assert_eq!((cgroup.look(), cgroup.bytes()), (None, 50_000));
    }

    #[test]
    fn pressure_takes_a_part_away_and_its_end_gives_it_back() {
        require!();
        let pressure = file("some avg10=0.00 avg60=0.00 avg300=0.00 total=100\nfull avg10=0.00 total=9\n");
        let mut cgroup = Cgroup::new(vec![file("32000")], Some(again(&pressure)), 1 << 40, 1.0);
        assert_eq!(cgroup.look(), None);
        write(&pressure, "some avg10=9.00 avg60=0.00 avg300=0.00 total=900000000\n");
        assert_eq!(cgroup.look(), Some(28_000));
        assert_eq!(cgroup.look(), Some(29_000), "no thread has waited since");
        (0..100).for_each(|_| _ = cgroup.adapt(true));
        assert_eq!(cgroup.bytes(), 8000, "the least");
        (0..100).for_each(|_| _ = cgroup.adapt(false));
        assert_eq!(cgroup.bytes(), 32_000);
    }

    #[test]
    fn budget_follows_its_group_while_memory_shares_it() {
        require!(FeatureFlags::PAGEFAULT_FLAG_WP);
        let limit = file(&(100 * page_size()).to_string());
        let budget = Budget::with_cgroup(Cgroup::new(vec![again(&limit)], None, 1 << 40, 0.5));
        assert_eq!(budget.bytes(), 50 * page_size());
        let memory = LazyMemory::builder(crate::pager::ZeroSource).len(400 * page_size()).budget(&budget);
        let memory = memory.build().unwrap();
        assert!(memory.iter().all(|byte| *byte == 0));
        write(&limit, &(64 * page_size()).to_string());
        wait_until(|| budget.bytes() == 32 * page_size() && budget.resident() <= 32 * page_size());
        // Not below what a budget needs.
        write(&limit, "1\n");
        wait_until(|| budget.bytes() == 16 * page_size());
        assert!(memory.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn budget_of_own_group_is_within_the_machine() {
        require!();
        let machine = bytes_of_machine(&fs::read_to_string("/proc/meminfo").unwrap()).unwrap();
        let budget = Budget::of_cgroup(0.5).unwrap();
        assert!(budget.bytes() > 0 && budget.bytes() as u64 <= machine / 2, "{budget:?}");
        for fraction in [0.0, -1.0, 1.01, f64::NAN] {
            assert!(matches!(Budget::of_cgroup(fraction), Err(crate::pager::Error::Fraction { .. })));
        }
    }
}
