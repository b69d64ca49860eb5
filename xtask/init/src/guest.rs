//! The right to change the machine.

use std::ffi::CString;

/// An argument that the host's kernel command line gives to process 1, and that nobody would give by accident.
const ARGUMENT: &str = "i-am-a-guest";

/// Magic numbers of the file systems that a kernel unpacks an initramfs into: RAMFS_MAGIC, TMPFS_MAGIC.
const FIRST_FILE_SYSTEMS: [i64; 2] = [0x8584_58f6, 0x0102_1994];

/// The right to change the machine: this is process 1 of a guest that was started for us.
#[derive(Debug)]
pub(crate) struct Guest(());

impl Guest {
    /// Takes the right, or says why this isn't a guest.
    pub(crate) fn claim() -> Result<Guest, String> {
        let id = std::process::id();
        if id != 1 {
            return Err(format!("it is for process 1 of a virtual machine, and this is process {id}"));
        }
        // A container has a process 1, too, but neither the argument nor such a file system.
        if std::env::args().nth(1).as_deref() != Some(ARGUMENT) {
            return Err(format!("it was not started with `{ARGUMENT}`"));
        }
        let kind = file_system(c"/").map_err(|e| format!("/: {e}"))?;
        if !FIRST_FILE_SYSTEMS.contains(&kind) {
            return Err("the root of the file system is not an initramfs".to_owned());
        }
        if !std::path::Path::new(guest_init::Plan::PATH).is_file() {
            return Err(format!("there is no {}", guest_init::Plan::PATH));
        }
        Ok(Guest(()))
    }

    /// Mounts a file system on a folder, which is made if it isn't there.
    pub(crate) fn mount(&self, kind: &str, folder: &str, options: &str) -> Result<(), String> {
        std::fs::create_dir_all(folder).map_err(|e| format!("{folder}: {e}"))?;
        let text = |text: &str| CString::new(text).map_err(|e| format!("{text}: {e}"));
        let (name, target, data) = (text(kind)?, text(folder)?, text(options)?);
        // SAFETY: three strings that end with NUL and outlive the call, and options, which these file systems take as
        // a string.
        let result = unsafe {
            libc::mount(name.as_ptr(), target.as_ptr(), name.as_ptr(), libc::MS_NOSUID, data.as_ptr().cast())
        };
        if result == 0 {
            Ok(())
        } else {
            Err(format!("mount {kind} on {folder}: {}", std::io::Error::last_os_error()))
        }
    }

    /// Ends every process of a group.
    pub(crate) fn end_group(&self, group: u32) {
        if let Ok(group) = libc::pid_t::try_from(group) {
            if group > 1 {
                // SAFETY: touches no memory; the group is one that this process made.
                unsafe { libc::kill(-group, libc::SIGKILL) };
            }
        }
    }

    /// Powers the machine off.
    pub(crate) fn power_off(self) -> ! {
        // SAFETY: touches no memory.
        unsafe { libc::sync() };
        // SAFETY: touches no memory. Nothing in this machine must be kept.
        unsafe { libc::reboot(libc::RB_POWER_OFF) };
        // Where the machine has no way to power off, the host does it at the time limit.
        loop {
            std::thread::park();
        }
    }
}

/// The kind of the file system that has `path`.
fn file_system(path: &std::ffi::CStr) -> std::io::Result<i64> {
    // SAFETY: all zeros is a value of this structure of numbers.
    let mut answer: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends with NUL, and the answer is borrowed for the call.
    if unsafe { libc::statfs(path.as_ptr(), &raw mut answer) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // The type differs between targets.
    Ok(answer.f_type as i64)
}
