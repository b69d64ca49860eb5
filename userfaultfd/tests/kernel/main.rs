//! What the kernel does, seen through this crate: one module for each of its words.

#[path = "../support/mod.rs"]
mod support;

mod copy;
mod descriptor;
mod events;
mod fill;
mod fork;
mod gone;
mod handshake;
mod minor;
mod move_pages;
mod not_userfaultfd;
mod open;
mod pagefault;
mod pagemap;
mod poison;
mod read;
mod read_write_protect;
mod refusal;
mod register;
mod rights;
mod set_mode;
mod signals;
#[cfg(feature = "pager")]
mod sources;
mod support_probe;
mod swap;
mod unregister;
mod wake;
mod watchdog;
mod write_protect;
mod zeropage;
