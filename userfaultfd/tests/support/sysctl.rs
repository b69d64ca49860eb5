//! Settings that are the whole machine's.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::sync::Mutex;

use super::lock::Lock;

/// `vm.unprivileged_userfaultfd`.
pub(crate) const UNPRIVILEGED: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// What settings were before this process changed them.
static BEFORE: Mutex<BTreeMap<&'static str, String>> = Mutex::new(BTreeMap::new());

/// A setting, which no other test sees or changes until this is dropped. Then it is as it was before.
#[derive(Debug)]
pub(crate) struct Sysctl {
    path: &'static str,
    _lock: Lock,
}

/// Waits until no other test has a setting, in this process or another. `None` where the kernel lacks it.
pub(crate) fn lock(path: &'static str) -> Option<Sysctl> {
    let lock = File::open(path).ok()?;
    Some(Sysctl { path, _lock: Lock::wait(lock) })
}

impl Sysctl {
    /// Tells whether it has the value now: it was so, or this process may change it.
    pub(crate) fn set(&self, value: &str) -> bool {
        let before = fs::read_to_string(self.path).unwrap().trim().to_owned();
        if before == value {
            return true;
        }
        let set = fs::write(self.path, value).is_ok();
        if set {
            BEFORE.lock().unwrap().entry(self.path).or_insert(before);
        }
        set
    }
}

impl Drop for Sysctl {
    fn drop(&mut self) {
        let before = BEFORE.lock().ok().and_then(|mut before| before.remove(self.path));
        if let Some(before) = before {
            put_back(self.path, &before);
        }
    }
}

/// Gives all settings back the values that they had.
pub(crate) fn restore() {
    let Ok(mut before) = BEFORE.lock() else { return };
    std::mem::take(&mut *before).iter().for_each(|(path, before)| put_back(path, before));
}

fn put_back(path: &str, before: &str) {
    if let Err(error) = fs::write(path, before) {
        eprintln!("{path} should be {before}: {error}");
    }
}
