//! Guides: when to use this crate and when not, recipes for usual jobs, fleets, and moving from 0.9.
//!
//! - [When not to use it](when_not_to_use_it): what `mmap`, `fork` and the kernel do better.
//! - [Cookbook](cookbook): a page for each usual job, with a program that runs in the tests.
//! - [Tuning](crate::pager::tuning): what a fault costs, and how to have fewer.
//! - [At scale](at_scale): chunk sizes, caches and starts of many virtual machines, calculated for a fleet.
//! - [The program `uffd`](program): what works here, and why not; a page-fault handler without a line of code.
//! - [From 0.9](from_0_9): what a program written for userfaultfd 0.8 or 0.9 must change.

/// Recipes for usual jobs.
///
/// | job | recipe |
/// | --- | --- |
/// | read a file or a model from far away as it is touched | [`lazy_content`](cookbook::lazy_content) |
/// | fill the memory of a VM from another process | [`other_process`](cookbook::other_process) |
/// | save a store in memory while it works, and restart at once | [`self_saving_store`](cookbook::self_saving_store) |
/// | checkpoint a numeric program at each step | [`checkpoints`](cookbook::checkpoints) |
/// | reset a sandbox to its image | [`sandbox_reset`](cookbook::sandbox_reset) |
/// | move a process's memory over TCP while it runs | [`migration`](cookbook::migration) |
/// | resolve faults in a tokio program, or on another executor | [`tokio_loop`](cookbook::tokio_loop) |
/// | find the old objects that a mutator has written | [`write_barrier`](cookbook::write_barrier) |
///
/// Recipes that are examples (`other_process`, `migration`, `tokio_loop`) show parts of
/// programs that lie in the repository under `examples/`; the others are whole programs.
pub mod cookbook {
    #[doc = include_str!("cookbook/lazy_content.md")]
    pub mod lazy_content {}

    #[doc = include_str!("cookbook/other_process.md")]
    pub mod other_process {}

    #[doc = include_str!("cookbook/self_saving_store.md")]
    pub mod self_saving_store {}

    #[doc = include_str!("cookbook/checkpoints.md")]
    pub mod checkpoints {}

    #[doc = include_str!("cookbook/sandbox_reset.md")]
    pub mod sandbox_reset {}

    #[doc = include_str!("cookbook/migration.md")]
    pub mod migration {}

    #[doc = include_str!("cookbook/tokio_loop.md")]
    pub mod tokio_loop {}

    #[doc = include_str!("cookbook/write_barrier.md")]
    pub mod write_barrier {}
}

#[doc = include_str!("when_not_to_use_it.md")]
pub mod when_not_to_use_it {}

#[doc = include_str!("at_scale.md")]
pub mod at_scale {}

#[doc = include_str!("program.md")]
pub mod program {}

#[doc = include_str!("from_0_9.md")]
pub mod from_0_9 {}
