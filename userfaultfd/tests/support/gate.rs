//! What holds threads up until a test lets them go on.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Holds up all threads that pass until it is opened. A copy is the same gate.
#[derive(Clone, Debug, Default)]
pub(crate) struct Gate(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    is_reached: bool,
    is_open: bool,
}

impl Gate {
    /// Waits until it is open.
    pub(crate) fn pass(&self) {
        self.change(|state| state.is_reached = true);
        self.wait_until(|state| state.is_open);
    }

    /// Waits until a thread wants to pass.
    pub(crate) fn wait_for_arrival(&self) {
        self.wait_until(|state| state.is_reached);
    }

    pub(crate) fn open(&self) {
        self.change(|state| state.is_open = true);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.0.changed.notify_all();
    }

    fn wait_until(&self, is_so: impl Fn(&State) -> bool) {
        drop(self.0.changed.wait_while(self.state(), |state| !is_so(state)).unwrap());
    }
}
