//! What the kernel does, seen through this crate: one module for each of its words.

mod support;

mod copy;
mod fill;
mod handshake;
mod register;
mod open;
mod support_probe;
