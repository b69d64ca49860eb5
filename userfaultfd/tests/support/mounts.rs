//! A /dev of one's own, in which /dev/userfaultfd is whatever a test wants.

use std::ffi::CStr;
use std::fs::{self, File};
use std::ptr;

use super::raw::check;

/// What stands in the place of the device.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Device {
    Missing,
    /// A device that no driver answers for.
    WithoutDriver,
    /// A device on a filesystem whose devices can't be opened.
    NotAllowed,
    /// /dev/null by this name.
    Foreign,
    File,
    Directory,
}

/// Gives the calling thread mounts of its own. Tells whether that is permitted.
pub(crate) fn own() -> bool {
    // SAFETY: touches no memory.
    let unshared = check(unsafe { libc::unshare(libc::CLONE_NEWNS) });
    // What is mounted from now on must be seen here alone.
    unshared.is_ok() && mount(c"none", c"/", None, libc::MS_REC | libc::MS_PRIVATE)
}

/// Puts something in the place of the device, and hides everything else in /dev. Takes [`own`] mounts.
pub(crate) fn replace(device: Device) {
    let flags = if matches!(device, Device::NotAllowed) { libc::MS_NODEV } else { 0 };
    assert!(mount(c"tmpfs", c"/dev", Some(c"tmpfs"), flags));
    match device {
        Device::Missing => {}
        // A major number for local use.
        Device::WithoutDriver => node(60, 0),
        Device::NotAllowed | Device::Foreign => node(1, 3),
        Device::File => drop(File::create("/dev/userfaultfd").unwrap()),
        Device::Directory => fs::create_dir("/dev/userfaultfd").unwrap(),
    }
}

/// Hides /proc. Takes [`own`] mounts.
pub(crate) fn hide_proc() {
    assert!(mount(c"tmpfs", c"/proc", Some(c"tmpfs"), 0));
}

fn mount(source: &CStr, target: &CStr, filesystem: Option<&CStr>, flags: libc::c_ulong) -> bool {
    let filesystem = filesystem.map_or(ptr::null(), CStr::as_ptr);
    // SAFETY: the strings are NUL-terminated, and no options are passed.
    let mounted = unsafe { libc::mount(source.as_ptr(), target.as_ptr(), filesystem, flags, ptr::null()) };
    check(mounted).is_ok()
}

fn node(major: u32, minor: u32) {
    node_at(c"/dev/userfaultfd", major, minor);
}

/// A character device by some name, in the /dev of one's own.
pub(crate) fn node_at(path: &CStr, major: u32, minor: u32) {
    let device = libc::makedev(major, minor);
    // SAFETY: the path is NUL-terminated.
    check(unsafe { libc::mknod(path.as_ptr(), libc::S_IFCHR | 0o666, device) }).unwrap();
}
