//! What this kernel offers, what this process may do, what registered memory accepts; and for everything that is
//! refused the reason, and what helps.
//!
//! Any kernel, any rights. The first thing to run where something doesn't work, and to add to a bug report.

use std::env::consts::ARCH;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use memmap2::{MmapMut, MmapRaw};
use userfaultfd::pagemap::{Pagemap, Region, Scan};
use userfaultfd::{
    Errno, Error, FeatureFlags, Known, OpenRefusal, OpenWith, RegisterMode, Support, Uffd, UffdBuilder,
    page_size,
};
use userfaultfd_examples::{huge_page_size, map_huge, memfd, since};

fn main() -> ExitCode {
    match report(&mut io::stdout().lock()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

fn report(out: &mut impl Write) -> io::Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or("of unknown release".into());
    writeln!(out, "Linux {} on {ARCH}, pages of {} KiB", release.trim(), page_size() / 1024)?;
    writeln!(out, "\n== What this process may do\n")?;
    rights(out)?;
    match Support::probe() {
        Ok(support) => {
            writeln!(out, "\n== What this kernel offers\n")?;
            offers(out, support)?;
            writeln!(out, "\n== Which operations registered memory accepts\n")?;
            ranges(out, support)
        }
        Err(_) => writeln!(out, "\n== What this kernel offers\n\nunknown, as no descriptor can be created"),
    }
}

/// Creates a descriptor in each way, for each kind of fault, and for fork events.
fn rights(out: &mut impl Write) -> io::Result<()> {
    let ways = [(OpenWith::Device, "/dev/userfaultfd"), (OpenWith::Syscall, "userfaultfd(2)")];
    let scopes = [(true, "faults from user mode"), (false, "faults from kernel mode too")];
    let mut refused: Vec<(String, Error)> = Vec::new();
    writeln!(out, "{:<28} {:<18} {}", "", ways[0].1, ways[1].1)?;
    for (user_mode_only, scope) in scopes {
        let mut answers = [const { String::new() }; 2];
        for ((with, way), answer) in ways.iter().zip(&mut answers) {
            *answer = match UffdBuilder::new().user_mode_only(user_mode_only).open_with(*with).create() {
                Ok(_) => "yes".into(),
                Err(error) => {
                    let answer = error.errno().map_or("no".into(), |errno| format!("no: {errno:?}"));
                    refused.push((format!("{scope}, by {way}"), error));
                    answer
                }
            };
        }
        writeln!(out, "{scope:<28} {:<18} {}", answers[0], answers[1])?;
    }
    let fork = UffdBuilder::new().require_features(FeatureFlags::EVENT_FORK).create();
    writeln!(out, "{:<28} {}", "events of forks", if fork.is_ok() { "yes" } else { "no" })?;
    refused.extend(fork.err().map(|error| ("events of forks".into(), error)));

    // What has the same reason is told together.
    let mut told: Vec<(String, String)> = Vec::new();
    for (what, error) in refused {
        let reason = explain(&error);
        match told.iter_mut().find(|(_, told)| *told == reason) {
            Some((whats, _)) => whats.extend([";\n  ", &what]),
            None => told.push((what, reason)),
        }
    }
    for (whats, reason) in told {
        writeln!(out, "\nrefused: {whats}\n{reason}")?;
    }
    Ok(())
}

/// Why that is, and what helps.
fn explain(error: &Error) -> String {
    let errno = error.errno().map_or(String::new(), |errno| format!(" ({errno})"));
    let mut text = match error {
        Error::OpenFailed(failure) => match failure.reason() {
            OpenRefusal::NotBuiltIn => {
                format!("The kernel has no userfaultfd, or a sandbox pretends so{errno}.")
            }
            OpenRefusal::NotPermitted => format!("This process may not{errno}."),
            _ => format!("Something else is in the way{errno}."),
        },
        Error::OpenDevUserfaultfd(error) if error.kind() == ErrorKind::NotFound => {
            format!("There is no such device{errno}. Linux 6.1 brought it.")
        }
        Error::OpenDevUserfaultfd(_) => format!("The device can't be opened{errno}."),
        error => format!("{error}{errno}."),
    };
    let mut remedies = error.remedies().peekable();
    if remedies.peek().is_some() {
        text.push_str(" What helps, any one of:");
    }
    for remedy in remedies {
        text.extend(["\n  - ", remedy]);
    }
    text
}

/// The library's table, and what belongs beside it.
fn offers(out: &mut impl Write, support: Support) -> io::Result<()> {
    write!(out, "{support}")?;
    let scanned = Pagemap::of_self().and_then(|pagemap| {
        let mut regions = [Region::default()];
        Scan::new(0..0).next_regions(&pagemap, &mut regions).map(drop)
    });
    let here = match scanned {
        Ok(()) => "yes",
        Err(error) if error.errno() == Some(Errno::ENOTTY) => "no",
        Err(_) => "?", // no /proc
    };
    writeln!(
        out,
        "{:<20} {:>6}  {here:<5} What pages are, through /proc/PID/pagemap",
        "PAGEMAP_SCAN", "6.7"
    )?;
    writeln!(
        out,
        "\n\"no\" is a kernel before the release under \"since\", one built without the feature, or one for\n\
         an architecture or CPU that lacks it. A newer kernel may help; rights don't."
    )
}

/// Memory to register.
struct Memory {
    name: &'static str,
    map: fn() -> io::Result<MmapRaw>,
    /// The features that tell of missing, write-protect and minor faults; `None` where there never are any.
    features: [Option<FeatureFlags>; 3],
}

const KINDS: [Memory; 3] = [
    Memory {
        name: "private anonymous",
        map: || MmapMut::map_anon(page_size()).map(MmapRaw::from),
        features: [Some(FeatureFlags::empty()), Some(FeatureFlags::PAGEFAULT_FLAG_WP), None],
    },
    Memory {
        name: "shared (memfd, tmpfs)",
        map: || memfd(page_size()).and_then(|file| MmapRaw::map_raw(&file)),
        features: [
            Some(FeatureFlags::MISSING_SHMEM),
            Some(FeatureFlags::WP_HUGETLBFS_SHMEM),
            Some(FeatureFlags::MINOR_SHMEM),
        ],
    },
    Memory {
        name: "hugetlb",
        // Registering touches nothing, so no page has to be reserved.
        map: || map_huge(1, huge_page_size().ok_or(Errno::EOPNOTSUPP)?, false).map(MmapRaw::from),
        features: [
            Some(FeatureFlags::MISSING_HUGETLBFS),
            Some(FeatureFlags::WP_HUGETLBFS_SHMEM),
            Some(FeatureFlags::MINOR_HUGETLBFS),
        ],
    },
];

/// Registers memory of each kind in each mode.
fn ranges(out: &mut impl Write, support: Support) -> io::Result<()> {
    for kind in KINDS {
        for Known { flag: mode, name, .. } in RegisterMode::known() {
            let answer = register(&kind, *mode, support).unwrap_or_else(|reason| format!("no: {reason}"));
            writeln!(out, "{:<22} {name:<19} {answer}", kind.name)?;
        }
    }
    writeln!(out, "\nThe kernel promises too much: MOVE is listed for shared memory, where it fails.")
}

/// Registers a page of fresh memory. Returns the operations, or why there are none.
fn register(kind: &Memory, mode: RegisterMode, support: Support) -> Result<String, String> {
    let [missing, write_protect, minor] = kind.features;
    let feature = match mode {
        RegisterMode::MISSING => missing,
        RegisterMode::WRITE_PROTECT => write_protect,
        RegisterMode::MINOR => minor,
        RegisterMode::READ_WRITE_PROTECT => Some(FeatureFlags::RWP),
        _ => Some(FeatureFlags::empty()),
    };
    let lacking = feature.ok_or("there is no page cache behind this memory")?.difference(support.features());
    if !lacking.is_empty() {
        return Err(format!("this kernel lacks {}", since(lacking)));
    }
    let memory = (kind.map)().map_err(|error| format!("can't be mapped: {error}"))?;
    let uffd = UffdBuilder::new().request_features(FeatureFlags::RWP).create();
    let register = |uffd: Uffd| uffd.register_with_mode(memory.as_mut_ptr().cast(), memory.len(), mode);
    match uffd.and_then(register) {
        Ok(ioctls) => Ok(ioctls.to_string()),
        Err(error) => Err(error.errno().map_or(error.to_string(), |errno| errno.to_string())),
    }
}
