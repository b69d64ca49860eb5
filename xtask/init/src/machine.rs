//! The machine that the tests find: file systems, modules, huge pages, a swap device.

use std::ffi::CStr;
use std::fs::{self, File, Permissions};
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use guest_init::{Plan, Record};

use crate::guest::Guest;
use crate::say::Voice;
use crate::swap;

/// Mounts what every system has.
pub(crate) fn mount_all(guest: &Guest) -> Result<(), String> {
    guest.mount("proc", "/proc", "")?;
    guest.mount("sysfs", "/sys", "")?;
    guest.mount("devtmpfs", "/dev", "mode=755")?;
    guest.mount("tmpfs", "/dev/shm", "mode=1777")?;
    guest.mount("devpts", "/dev/pts", "ptmxmode=666")?;
    // Files that aren't shared memory are what tests look for in the folder of temporary files.
    guest.mount("ramfs", "/tmp", "mode=1777")?;
    for (name, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        let link = Path::new("/dev").join(name);
        if !link.exists() {
            symlink(target, &link).map_err(|e| format!("{}: {e}", link.display()))?;
        }
    }
    // Only what ends the machine is shown at once; warnings are read from /dev/kmsg, so that they don't get into
    // other lines. After a crash the kernel shows everything by itself.
    write("/proc/sys/kernel/printk", "1")
}

/// Gives the tests what the kernel can be asked for. What it hasn't is said, and is seen in tests that are skipped.
pub(crate) fn set_up(guest: &Guest, plan: &Plan, voice: &Voice) {
    for module in &plan.modules {
        if let Err(e) = load(guest, module) {
            voice.say(Record::Note(format!("{module}: {e}")));
        }
    }
    if let Err(error) = bring_loopback_up(guest) {
        voice.say(Record::Note(format!("no loopback network: {error}")));
    }
    if let Err(reason) = reserve_huge_pages(guest, plan.huge_pages) {
        voice.say(Record::Note(reason));
    }
    if plan.swap > 0 {
        if let Err(reason) = swap::start(guest, plan.swap) {
            voice.say(Record::Note(format!("no swap device: {reason}")));
        }
    }
}

/// finit_module(2)'s flag for a file that the kernel must decompress, so that no program needs to.
const MODULE_INIT_COMPRESSED_FILE: libc::c_int = 4;

fn load(_guest: &Guest, path: &str) -> io::Result<()> {
    let file = File::open(path)?;
    let flags = if path.ends_with(".ko") { 0 } else { MODULE_INIT_COMPRESSED_FILE };
    // SAFETY: the descriptor is open, and the parameters are an empty string. The kernel is a guest's.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), flags) };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // Built in, or loaded as another's need.
            e if e.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            e => Err(e),
        },
    }
}

/// Sets the interface `lo` up, on which tests and examples connect to themselves: netdevice(7).
fn bring_loopback_up(_guest: &Guest) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: zeros are a valid value of all fields of the structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(*b"lo") {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the kernel reads the name, which ends with NUL, and the flags. The machine is a guest's.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn reserve_huge_pages(_guest: &Guest, wanted: usize) -> Result<(), String> {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    if wanted == 0 || !Path::new(POOL).exists() {
        return Ok(());
    }
    write(POOL, &wanted.to_string())?;
    let got = fs::read_to_string(POOL).map_err(|e| format!("{POOL}: {e}"))?;
    if got.trim() == wanted.to_string() {
        Ok(())
    } else {
        Err(format!("{} huge pages of {wanted} could be had", got.trim()))
    }
}

/// A folder of a user's own for temporary files, which is emptied.
pub(crate) fn temporary_folder(_guest: &Guest, user: guest_init::User) -> Result<String, String> {
    let folder = format!("/tmp/{user}");
    let error = |e| format!("{folder}: {e}");
    match fs::remove_dir_all(&folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(error(e)),
        _ => {}
    }
    fs::create_dir(&folder).map_err(error)?;
    fs::set_permissions(&folder, Permissions::from_mode(0o700)).map_err(error)?;
    std::os::unix::fs::chown(&folder, Some(user.id()), Some(user.id())).map_err(error)?;
    Ok(folder)
}

/// Writes to one of the kernel's files.
pub(crate) fn write(path: &str, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("{path}: {e}"))
}

/// swapon(2).
pub(crate) fn swap_on(_guest: &Guest, device: &CStr) -> io::Result<()> {
    // SAFETY: the path ends with NUL.
    if unsafe { libc::swapon(device.as_ptr(), 0) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
