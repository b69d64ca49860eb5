//! The program `uffd`, run as its users run it.

#[path = "../support/mod.rs"]
#[expect(dead_code, reason = "it has what the tests of the kernel need")]
mod support;

#[path = "../handoff/monitor.rs"]
#[expect(dead_code, reason = "it has what the tests of the library need")]
mod monitor;
#[path = "../http/web.rs"]
#[expect(dead_code, reason = "likewise")]
mod web;

mod criu;
mod doctor;
mod image;
mod manual;
mod metrics;
mod program;
mod serve;
mod track;
mod ws;
