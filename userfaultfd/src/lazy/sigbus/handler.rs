//! The handler of SIGBUS.

#![expect(unsafe_code, reason = "a signal handler")]

use std::mem;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use super::table::{self, with_memory_at};
use crate::pager::Result;
use crate::sync_point::{Point, reach};
use crate::sys;

/// The action for a SIGBUS that isn't ours: the one installed before. Null: ours was never installed.
static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());

/// Whether the handler was installed. Another handler that calls it may have replaced it since.
static INSTALLED: AtomicBool = AtomicBool::new(false);

/// The actions that [`BEFORE`] and [`ABOVE`] point to, never freed: a handler can't know whether another thread still
/// reads the last one. 64 different actions are more than a program installs; an action found again takes no new place.
static KNOWN_ACTIONS: [OnceLock<libc::sigaction>; 64] = [const { OnceLock::new() }; 64];

/// The number of [`KNOWN_ACTIONS`] in use.
static GIVEN_OUT: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all zeros is the default action, without flags and with nothing blocked.
static DEFAULT: libc::sigaction = unsafe { mem::zeroed() };

/// The action of another handler that was last seen installed, and that calls ours. Null: ours is installed.
static ABOVE: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());

/// Keeps an action. Returns `None` if too many different ones were kept. Async-signal-safe.
fn keep(action: &libc::sigaction) -> Option<*mut libc::sigaction> {
    let known = KNOWN_ACTIONS.iter().find_map(|known| known.get().filter(|known| is_same(known, action)));
    let known = known.or_else(|| {
        // No other thread sets this one, so `get_or_init` never waits.
        let place = KNOWN_ACTIONS.get(GIVEN_OUT.fetch_add(1, Ordering::Relaxed))?;
        Some(place.get_or_init(|| *action))
    });
    known.map(|known| ptr::from_ref(known).cast_mut())
}

/// Makes [`foreign`] use this action, unless too many different ones were kept. Async-signal-safe.
fn remember(action: &libc::sigaction) {
    if let Some(known) = keep(action) {
        // Release: pairs with the acquire in `foreign`.
        BEFORE.store(known, Ordering::Release);
    }
}

/// Installs the handler, the first time.
pub(super) fn install() -> Result<()> {
    install_with(|| {})
}

/// As [`install`], and calls `between` after reading the installed action and before replacing it.
fn install_with(between: impl FnOnce()) -> Result<()> {
    table::locked(|| {
        if INSTALLED.load(Ordering::Acquire) {
            return Ok(());
        }
        let seen = sys::bus_action()?;
        if is_ours(&seen) {
            // The parent had installed it, and hadn't noted that when this process was forked.
            INSTALLED.store(true, Ordering::Release);
            return Ok(());
        }
        // Kept before it is replaced, so that a signal right after finds it.
        remember(&seen);
        between();
        // SAFETY: the handler and all that it calls allocate nothing, take no lock, and keep errno.
        let replaced = unsafe { sys::handle_bus(handle) };
        match replaced {
            // Another thread may have installed one meanwhile.
            Ok(replaced) => {
                remember(&replaced);
                INSTALLED.store(true, Ordering::Release);
            }
            Err(_) => BEFORE.store(ptr::null_mut(), Ordering::Release),
        }
        replaced.map(drop)
    })??;
    Ok(())
}

unsafe extern "C" fn handle(_signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let _errno = sys::KeepErrno::new();
    // SAFETY: it is what this handler was given.
    let (address, code) = unsafe { sys::fault_of(info) };
    // The code of a missing page of a userfaultfd, and of other faults, which aren't at an address of ours.
    if code == libc::BUS_ADRERR {
        // Nothing is held afterwards: the handler before may never return.
        if with_memory_at(address, |lazy, shard| lazy.fault(address, shard)) == Some(true) {
            return;
        }
    }
    // SAFETY: both are what this handler was given.
    unsafe { foreign(info, context) }
}

/// Does with a SIGBUS that isn't ours what the action installed before would do.
unsafe fn foreign(info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: it is what the handler was given.
    let (_, code) = unsafe { sys::fault_of(info) };
    let action = loop {
        let before = BEFORE.load(Ordering::Acquire);
        // SAFETY: an action that was remembered stays, and isn't written any more.
        match unsafe { before.as_ref() } {
            // Only a signal that a process has sent can be ignored, not one that the kernel raises.
            Some(action) if action.sa_sigaction == libc::SIG_IGN && code <= 0 => return,
            Some(action) if is_handler(action) && action.sa_flags & libc::SA_RESETHAND != 0 => {
                // It is called once, by the first thread.
                let spent = ptr::from_ref(&DEFAULT).cast_mut();
                if BEFORE.compare_exchange(before, spent, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                    break action;
                }
            }
            Some(action) if is_handler(action) => break action,
            // SAFETY: it is what the handler was given.
            _ => return unsafe { sys::die_of_bus(info) },
        }
    };
    reach(Point::BeforeForeign, 0);
    if let Ok(installed) = sys::bus_action() {
        note_above(action, &installed);
    }
    // SAFETY: the action was installed for SIGBUS; the rest is what the handler was given.
    unsafe { sys::call_handler(action, info, context) };
    if let Ok(now) = sys::bus_action() {
        put_back(action, &now);
    }
}

/// Notes the installed action before a handler is called. An action that this handler may itself have installed says
/// nothing: then another thread has called it, and hasn't put back the former action yet.
fn note_above(called: &libc::sigaction, installed: &libc::sigaction) {
    if is_ours(installed) {
        ABOVE.store(ptr::null_mut(), Ordering::Release);
    } else if !is_of_called(called, installed) {
        if let Some(known) = keep(installed) {
            ABOVE.store(known, Ordering::Release);
        }
    }
}

/// Repairs what a called handler has installed: the default action, as the one of Rust's runtime does, or itself, as
/// old System V handlers do. Then [`foreign`] uses the new action from now on, and the former one is installed again.
///
/// Threads that call the handler at the same time all put back the same action.
fn put_back(called: &libc::sigaction, now: &libc::sigaction) {
    // Another handler was installed by another thread or by the program itself, and calls the former action.
    if !is_of_called(called, now) {
        return;
    }
    remember(now);
    let above = ABOVE.load(Ordering::Acquire);
    // SAFETY: an action that was kept stays, and isn't written any more.
    let _replaced = match unsafe { above.as_ref() } {
        // SAFETY: it was installed when a thread looked.
        Some(above) => unsafe { sys::set_bus_action(above) },
        // SAFETY: as in `install_with`.
        None => unsafe { sys::handle_bus(handle) },
    };
}

/// Whether `called` may have installed `action` while it ran.
fn is_of_called(called: &libc::sigaction, action: &libc::sigaction) -> bool {
    !is_handler(action) || action.sa_sigaction == called.sa_sigaction
}

fn is_ours(action: &libc::sigaction) -> bool {
    action.sa_sigaction == handle as *const () as libc::sighandler_t
}

fn is_handler(action: &libc::sigaction) -> bool {
    action.sa_sigaction != libc::SIG_DFL && action.sa_sigaction != libc::SIG_IGN
}

fn is_same(one: &libc::sigaction, other: &libc::sigaction) -> bool {
    one.sa_sigaction == other.sa_sigaction
        && one.sa_flags == other.sa_flags
        && sys::signals_of(&one.sa_mask) == sys::signals_of(&other.sa_mask)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;
    use crate::support::{child, proc, require, signal, test_name};

    static CALLS: AtomicU32 = AtomicU32::new(0);

    extern "C" fn count(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        CALLS.fetch_add(1, Ordering::SeqCst);
    }

    #[test]
    fn handler_installed_in_between_is_called() {
        require!();
        child::run_well(test_name!(), || {
            install_with(|| signal::handle(libc::SIGBUS, count)).unwrap();
            signal::send(proc::thread_id(), libc::SIGBUS);
            assert_eq!(CALLS.load(Ordering::SeqCst), 1);
        });
    }

    static STAGE: AtomicU32 = AtomicU32::new(0);

    fn stage_is(stage: u32) {
        while STAGE.load(Ordering::SeqCst) < stage {
            std::thread::yield_now();
        }
    }

    /// As handlers of old: it installs itself again.
    extern "C" fn again(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        if CALLS.fetch_add(1, Ordering::SeqCst) == 0 {
            signal::handle(signal, again);
            STAGE.store(1, Ordering::SeqCst);
            stage_is(2);
        } else {
            STAGE.store(2, Ordering::SeqCst);
            stage_is(3);
            signal::handle(signal, again);
        }
    }

    #[test]
    fn handler_call_keeps_what_another_call_installed() {
        require!();
        child::run_well(test_name!(), || {
            signal::handle(libc::SIGBUS, again);
            install().unwrap();
            let ours = || is_ours(&sys::bus_action().unwrap());
            assert!(ours());
            static STOPPED: AtomicU32 = AtomicU32::new(0);
            let _armed = crate::sync_point::tests::at(Point::BeforeForeign, 0..1, |_| {
                if STOPPED.fetch_add(1, Ordering::SeqCst) == 0 {
                    stage_is(1);
                }
            });
            std::thread::scope(|scope| {
                // Looks what is installed while the handler that the other has called is.
                scope.spawn(|| signal::send(proc::thread_id(), libc::SIGBUS));
                proc::wait_until(|| STOPPED.load(Ordering::SeqCst) == 1);
                signal::send(proc::thread_id(), libc::SIGBUS);
                assert!(ours());
                STAGE.store(3, Ordering::SeqCst);
            });
            assert_eq!(CALLS.load(Ordering::SeqCst), 2);
            assert!(ours());
        });
    }

    #[test]
    fn child_forked_in_the_installation_installs_it() {
        require!();
        child::run_well(test_name!(), || {
            let installs = || {
                install().unwrap();
                assert!(is_ours(&sys::bus_action().unwrap()));
                // SAFETY: what was remembered stays.
                let before = unsafe { &*BEFORE.load(Ordering::SeqCst) };
                assert!(!is_ours(before), "it would call itself");
            };
            // In the middle, and when it is installed and that isn't noted.
            install_with(|| child::fork(installs).succeed()).unwrap();
            INSTALLED.store(false, Ordering::SeqCst);
            child::fork(installs).succeed();
        });
    }

    #[test]
    fn handler_that_alternates_its_flags_uses_up_no_room() {
        require!();
        child::run_well(test_name!(), || {
            install().unwrap();
            let mut action = sys::bus_action().unwrap();
            for flags in [libc::SA_NODEFER, libc::SA_RESTART].into_iter().cycle().take(200) {
                action.sa_flags = flags;
                remember(&action);
                // SAFETY: what was remembered stays.
                let before = unsafe { &*BEFORE.load(Ordering::SeqCst) };
                assert_eq!(before.sa_flags, flags);
            }
            assert!(GIVEN_OUT.load(Ordering::SeqCst) <= 3);
        });
    }
}
