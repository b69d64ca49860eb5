//! How a page is filled: a thread claims the page of a fault, loads its content and installs it; work that must wait is
//! deferred and retried.

pub(crate) mod ahead_queue;
pub(crate) mod buffers;
pub(crate) mod context;
pub(crate) mod fault;
pub(crate) mod filler;
pub(crate) mod growth;
pub(crate) mod in_flight;
pub(crate) mod install;
pub(crate) mod lease;
pub(crate) mod load;
pub(crate) mod poison;
pub(crate) mod retry;
pub(crate) mod work;
