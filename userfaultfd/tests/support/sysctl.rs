//! `vm.unprivileged_userfaultfd`, which is the whole machine's.

use std::fs::{self, File};
use std::sync::Mutex;

use super::lock::Lock;

const PATH: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// What it was before this process changed it.
static BEFORE: Mutex<Option<String>> = Mutex::new(None);

/// The setting, which no other test sees or changes until this is dropped. Then it is as it was before.
#[derive(Debug)]
pub(crate) struct Sysctl {
    _lock: Lock,
}

/// Waits until no other test has it, in this process or another. `None` where the kernel lacks it, before
/// 5.2.
pub(crate) fn lock() -> Option<Sysctl> {
    let lock = File::open(PATH).ok()?;
    Some(Sysctl { _lock: Lock::wait(lock) })
}

impl Sysctl {
    /// Tells whether it has the value now: it was so, or this process may change it.
    pub(crate) fn set(&self, value: &str) -> bool {
        let before = fs::read_to_string(PATH).unwrap().trim().to_owned();
        if before == value {
            return true;
        }
        let set = fs::write(PATH, value).is_ok();
        if set {
            BEFORE.lock().unwrap().get_or_insert(before);
        }
        set
    }
}

impl Drop for Sysctl {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives it back the value that it had.
pub(crate) fn restore() {
    let Ok(mut before) = BEFORE.lock() else { return };
    let Some(before) = before.take() else { return };
    if let Err(error) = fs::write(PATH, &before) {
        eprintln!("{PATH} should be {before}: {error}");
    }
}
