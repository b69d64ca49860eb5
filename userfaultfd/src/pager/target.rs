//! The process that has the memory of a descriptor: this one or another, alive or gone.

use super::memory::descriptor::addr_to_ptr;
use crate::{Errno, RegisterMode, Uffd, sys};

/// Pages with which a descriptor is tried: two, so that another process hardly ever maps both addresses alike.
const TRIAL_PAGES: usize = 2;

/// Returns whether a descriptor may handle the faults of this process's memory.
///
/// If it does, a private page that was mapped for the trial can be registered with it. With a descriptor of another
/// process that is `EINVAL`, unless that process has memory at the same address: hence two pages.
pub(super) fn is_own(uffd: &Uffd) -> crate::Result<bool> {
    for _ in 0..TRIAL_PAGES {
        let page = sys::map_somewhere(crate::page_size())?;
        let address = page.as_ptr().cast();
        let registered = uffd.register_unexplained(address, crate::page_size(), RegisterMode::MISSING);
        if registered.is_ok() {
            // Before the page is unmapped, which would be an event.
            uffd.unregister_unexplained(address, crate::page_size())?;
        }
        #[expect(unsafe_code, reason = "the page is this function's")]
        // SAFETY: it was mapped above, and nothing refers to it.
        unsafe {
            sys::unmap(page, crate::page_size());
        }
        match registered {
            Ok(_) => {}
            Err(error) if error.errno() == Some(Errno::EINVAL) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// Asks for an operation that fails in every process, with `ESRCH` in one that is gone.
#[expect(unsafe_code, reason = "an operation that can't succeed")]
pub(crate) fn target_is_gone(uffd: &Uffd, address: Option<usize>) -> bool {
    let dst = addr_to_ptr(address.unwrap_or(16 << 20));
    let len = address.map_or(2 << 20, |_| crate::page_size());
    // An address that no process may use, such as 0, is EINVAL on some kernels in any process.
    let Ok(unreadable) = sys::unreadable() else { return false };
    // SAFETY: nothing can be read there, so that nothing is copied.
    let answer = unsafe { uffd.copy(unreadable, dst, len, false) };
    answer.is_err_and(|error| error.errno() == Some(Errno::ESRCH))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::child::{self, Forked};
    use crate::support::memory::Memory;
    use crate::support::{dead, require, test_name, uffd};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_descriptor_of_this_process_is_told_from_another_ones() {
        require!();
        child::run_well(test_name!(), || {
            let own = uffd(crate::FeatureFlags::EVENT_UNMAP);
            assert!(is_own(&own).unwrap());
            // The descriptor of a process with the same layout, which has this memory at the same address.
            let memory = Memory::anonymous(1);
            let (here, there) = UnixStream::pair().unwrap();
            let child: Forked = child::fork(|| {
                let other = uffd(crate::FeatureFlags::empty());
                child::send_fd(&there, other.as_fd());
                let _until_killed = std::io::Read::read(&mut &there, &mut [0]);
            });
            let other = Uffd::from(child::receive_fd(&here));
            other.register(memory.start(), memory.len()).unwrap();
            for _ in 0..100 {
                assert!(!is_own(&other).unwrap());
            }
            child.kill();
            child.wait();
            let gone = is_own(&dead::uffd(&memory)).unwrap_err().errno();
            assert!(matches!(gone, Some(Errno::ESRCH | Errno::ENOMEM)), "{gone:?}");
        });
    }
}
