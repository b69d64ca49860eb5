//! What this kernel offers, and which memory can be registered.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use memmap2::{MmapMut, MmapOptions, MmapRaw};
use userfaultfd::pagemap::{Pagemap, Region, Scan};
use userfaultfd::{Errno, FeatureFlags, Known, RegisterMode, Support, UffdBuilder, page_size};

use super::machine::huge_page_size;
use super::{Area, Check, State};

/// Where memory is made that is shared.
const TMPFS: &str = "/dev/shm";

/// Nothing without a userfaultfd.
pub(super) fn checks(kernel: &str) -> Vec<Check> {
    let Ok(support) = Support::probe() else { return Vec::new() };
    let mut checks = features(kernel, support);
    checks.push(scan());
    checks.extend(KINDS.iter().flat_map(|kind| register_all(kind, support)));
    checks
}

fn features(kernel: &str, support: Support) -> Vec<Check> {
    let release = release(kernel);
    let check = |known: &Known<FeatureFlags>| {
        let Known { flag, name, since: (major, minor), what, .. } = *known;
        if support.features().contains(flag) {
            return Check::new(Area::Kernel, State::Yes, name, what);
        }
        let check = Check::new(Area::Kernel, State::No, name, what);
        if release.is_some_and(|release| release >= (major, minor)) {
            check.helps(format!(
                "Linux {major}.{minor} brought it, so this one was built without it, or for an architecture that lacks it"
            ))
        } else {
            check.helps(format!("Linux {major}.{minor} or newer"))
        }
    };
    FeatureFlags::known().iter().map(check).collect()
}

/// The first two numbers of a release.
fn release(kernel: &str) -> Option<(u16, u16)> {
    let mut numbers = kernel.split(|letter: char| !letter.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn scan() -> Check {
    let scanned = Pagemap::of_self().and_then(|pagemap| {
        let mut regions = [Region::default()];
        Scan::new(0..0).next_regions(&pagemap, &mut regions).map(drop)
    });
    let what = "what pages are, through /proc/PID/pagemap";
    match scanned {
        Ok(()) => Check::new(Area::Kernel, State::Yes, "PAGEMAP_SCAN", what),
        Err(error) if error.errno() == Some(Errno::ENOTTY) => {
            Check::new(Area::Kernel, State::No, "PAGEMAP_SCAN", what).helps("Linux 6.7 or newer")
        }
        Err(error) => {
            let detail = format!("{what}: {error}");
            Check::new(Area::Kernel, State::No, "PAGEMAP_SCAN", detail).helps("a mounted /proc")
        }
    }
}

/// Memory to register.
struct Kind {
    name: &'static str,
    map: fn() -> io::Result<MmapRaw>,
    /// The features that report missing, write-protect and minor faults; `None` where there never are any.
    features: [Option<FeatureFlags>; 3],
}

const KINDS: [Kind; 3] = [
    Kind {
        name: "private anonymous",
        map: || MmapMut::map_anon(page_size()).map(MmapRaw::from),
        features: [Some(FeatureFlags::empty()), Some(FeatureFlags::PAGEFAULT_FLAG_WP), None],
    },
    Kind {
        name: "shared",
        map: map_shared,
        features: [
            Some(FeatureFlags::MISSING_SHMEM),
            Some(FeatureFlags::WP_HUGETLBFS_SHMEM),
            Some(FeatureFlags::MINOR_SHMEM),
        ],
    },
    Kind {
        name: "hugetlb",
        map: map_huge,
        features: [
            Some(FeatureFlags::MISSING_HUGETLBFS),
            Some(FeatureFlags::WP_HUGETLBFS_SHMEM),
            Some(FeatureFlags::MINOR_HUGETLBFS),
        ],
    },
];

/// A page of a file that has no name.
fn map_shared() -> io::Result<MmapRaw> {
    let mut options = File::options();
    let file = options.read(true).write(true).custom_flags(libc::O_TMPFILE).open(TMPFS)?;
    file.set_len(page_size() as u64)?;
    MmapRaw::map_raw(&file)
}

/// Registering touches nothing, so no page has to be reserved.
fn map_huge() -> io::Result<MmapRaw> {
    let size = huge_page_size().ok_or(Errno::EOPNOTSUPP)?;
    let mut options = MmapOptions::new();
    options.len(size).huge(Some(size.trailing_zeros() as u8)).no_reserve_swap();
    options.map_anon().map(MmapRaw::from)
}

/// Registers memory of a kind in each mode.
fn register_all(kind: &Kind, support: Support) -> impl Iterator<Item = Check> {
    RegisterMode::known().iter().map(move |Known { flag: mode, name, .. }| {
        let name = format!("{}, {name}", kind.name);
        match register(kind, *mode, support) {
            Ok(operations) => Check::new(Area::Memory, State::Yes, name, operations),
            Err((reason, remedy)) => {
                let mut check = Check::new(Area::Memory, State::No, name, reason);
                check.remedies.extend(remedy);
                check
            }
        }
    })
}

/// Registers a page of fresh memory. Returns the operations, or why there are none, and what helps.
fn register(kind: &Kind, mode: RegisterMode, support: Support) -> Result<String, (String, Option<String>)> {
    let [missing, write_protect, minor] = kind.features;
    let feature = match mode {
        RegisterMode::MISSING => missing,
        RegisterMode::WRITE_PROTECT => write_protect,
        RegisterMode::MINOR => minor,
        RegisterMode::READ_WRITE_PROTECT => Some(FeatureFlags::RWP),
        _ => Some(FeatureFlags::empty()),
    };
    let Some(feature) = feature else {
        return Err(("there is no page cache behind this memory".into(), None));
    };
    let lacking = feature.difference(support.features());
    if !lacking.is_empty() {
        return Err((format!("this kernel lacks {lacking}"), Some("see the feature above".into())));
    }
    let memory = (kind.map)().map_err(|error| (format!("it can't be mapped: {error}"), None))?;
    let uffd = UffdBuilder::new().close_on_exec(true).request_features(FeatureFlags::RWP).create();
    let registered =
        uffd.and_then(|uffd| uffd.register_with_mode(memory.as_mut_ptr().cast(), memory.len(), mode));
    registered.map(|ioctls| ioctls.to_string()).map_err(|error| (error.to_string(), None))
}
