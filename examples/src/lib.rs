//! What the examples share: an exit status that tells why, and memory that takes more than one call to get.
//!
//! An example ends with
//!
//! - 0: it did what it shows.
//! - 1: something failed. The standard error says what.
//! - [`UNMET`], 2: this machine or this process lacks something. The last line of the standard error says what,
//!   after `needs`, and how to get it. The tests show that line as `SKIP`.
//!
//! `hello_fault` (the program of README.md) and `sparse_reads` use nothing of this, and end with 1 for both; `probe`
//! with 0, since telling what is missing is what it does.

mod handover;

use std::env;
use std::error::Error;
use std::fmt;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::os::fd::FromRawFd;
use std::path::PathBuf;
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use memmap2::{MmapMut, MmapOptions};
use userfaultfd::{FeatureFlags, Known, OpenRefusal, pager, snapshot};

pub use handover::{receive, send};

/// What an example, or a thread of it, ends with.
pub type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// The exit status of an example whose needs aren't met.
pub const UNMET: u8 = 2;

/// Something that is missing here, and how to get it.
#[derive(Debug)]
pub struct Needs(pub String);

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "needs {}", self.0)
    }
}

impl Error for Needs {}

/// Runs an example, and makes an exit status of how it ends.
pub fn run(example: impl FnOnce() -> Result<()>) -> ExitCode {
    let Err(error) = example() else { return ExitCode::SUCCESS };
    // This library's errors say their cause; others' may leave it out.
    eprintln!("{error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("  {error}");
        cause = error.source();
    }
    // What the kernel said comes through the layers above as it is.
    let kernels = match (error.downcast_ref(), error.downcast_ref()) {
        (Some(pager::Error::Uffd(error)), _) | (_, Some(snapshot::Error::Kernel(error))) => Some(error),
        _ => error.downcast_ref(),
    };
    match kernels {
        Some(userfaultfd::Error::UnsupportedFeatures { missing, .. }) => {
            eprintln!("needs {}", since(*missing));
        }
        Some(userfaultfd::Error::FeatureNotPermitted(_)) => {
            eprintln!("needs CAP_SYS_PTRACE: be root, or run: sudo setcap cap_sys_ptrace=ep PROGRAM");
        }
        Some(userfaultfd::Error::OpenFailed(failure)) => match failure.reason() {
            OpenRefusal::NotPermitted => eprintln!("needs the right to create a userfaultfd: see above"),
            OpenRefusal::NotBuiltIn => eprintln!("needs a kernel with userfaultfd: see above"),
            _ => return ExitCode::FAILURE,
        },
        _ if error.is::<Needs>() => {}
        _ => return ExitCode::FAILURE,
    }
    ExitCode::from(UNMET)
}

/// Features with the releases that brought them: `MOVE (Linux 6.8)`.
#[must_use]
pub fn since(features: FeatureFlags) -> String {
    let known = FeatureFlags::known().iter().filter(|known| features.contains(known.flag));
    let names =
        known.map(|Known { name, since: (major, minor), .. }| format!("{name} (Linux {major}.{minor})"));
    names.collect::<Vec<_>>().join(", ")
}

/// A bar of `bytes` on the standard error, if that is a terminal. It goes when it is dropped.
#[must_use]
#[expect(clippy::missing_panics_doc, reason = "the template is known")]
pub fn progress_bar(what: &'static str, bytes: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    ProgressBar::new(bytes as u64).with_style(style.expect("a template of known words")).with_message(what)
}

/// The arguments of an example of memory with a limit: `[--limit BYTES] [FLAG] FILE`. `None`: they are others.
#[must_use]
pub fn limit_flag_and_file(default: usize, flag: &str) -> Option<(usize, bool, PathBuf)> {
    let (mut limit, mut has_flag, mut path) = (default, false, None);
    let mut arguments = env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.to_str() {
            Some("--limit") => limit = parse_bytes(arguments.next()?.to_str()?)?,
            Some(argument) if argument == flag => has_flag = true,
            _ => path = Some(PathBuf::from(argument)),
        }
    }
    Some((limit, has_flag, path?))
}

/// A number of bytes: `4096`, `64K`, `256M`, `2G`.
#[must_use]
pub fn parse_bytes(text: &str) -> Option<usize> {
    let digits = text.trim_end_matches(['K', 'M', 'G']);
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return None,
    };
    digits.parse::<usize>().ok()?.checked_mul(1 << shift)
}

/// How much is hashed between two looks at the clock.
pub const HASHED_BYTES: usize = 1 << 20;

/// The hash of memory that is touched from its beginning to its end, with a bar of progress.
#[must_use]
pub fn hash_memory(memory: &[u8]) -> u64 {
    let bar = progress_bar("page faults", memory.len());
    let mut hasher = DefaultHasher::new();
    for part in memory.chunks(HASHED_BYTES) {
        hasher.write(part);
        bar.inc(part.len() as u64);
    }
    hasher.finish()
}

/// A file of `len` bytes that is in memory and nowhere else. It can be mapped more than once.
///
/// # Errors
///
/// Those of memfd_create(2) and ftruncate(2).
pub fn memfd(len: usize) -> io::Result<File> {
    memfd_with(0, len)
}

/// [`memfd`] with flags, as `MFD_HUGETLB`.
///
/// # Errors
///
/// Those of memfd_create(2) and ftruncate(2).
pub fn memfd_with(flags: libc::c_uint, len: usize) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated constant, and nothing else is passed by pointer.
    let fd = unsafe { libc::memfd_create(c"userfaultfd-example".as_ptr(), libc::MFD_CLOEXEC | flags) };
    if fd == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel made the descriptor for the call above, so nothing else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len as u64)?;
    Ok(file)
}

/// The default size of a huge page, in bytes. `None` where the kernel has no hugetlb memory.
#[must_use]
pub fn huge_page_size() -> Option<usize> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("Hugepagesize:"))?;
    let kib: usize = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(1024 * kib)
}

/// Private memory of `pages` huge pages of `size` bytes.
///
/// With `reserve` the pages are set aside for it, so that touching them can't fail. Without, anybody can map any
/// number of them, and touching them may raise SIGBUS.
///
/// # Errors
///
/// `ENOMEM`: fewer pages are free. `EINVAL`: there are no huge pages of this size.
pub fn map_huge(pages: usize, size: usize, reserve: bool) -> io::Result<MmapMut> {
    let mut options = MmapOptions::new();
    options.len(pages * size).huge(Some(size.trailing_zeros() as u8));
    if !reserve {
        options.no_reserve_swap();
    }
    options.map_anon()
}
