//! The threads that read faults and events, what they share, and how serving ends.

pub(crate) mod backlog;
pub(crate) mod beside;
pub(crate) mod binding;
pub(crate) mod control;
pub(crate) mod delivery;
mod descriptor_cache;
mod event_reader;
pub(crate) mod mailbox;
pub(crate) mod poll;
pub(crate) mod regions;
pub(crate) mod shared;
pub(crate) mod shutdown;
pub(crate) mod vma_events;
pub(crate) mod worker;
pub(crate) mod worker_pool;
