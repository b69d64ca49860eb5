//! The program `uffd`, run as its users run it.

#[path = "../support/mod.rs"]
#[expect(dead_code, reason = "it has what the tests of the kernel need")]
mod support;

mod doctor;
mod manual;
mod program;
