//! Memory that other processes hand over, in each dialect; and peers that do it wrong.

#[path = "../support/mod.rs"]
#[expect(dead_code, reason = "it has what the tests of the kernel need")]
mod support;

mod criu;
mod ends;
mod forks;
mod inherited;
mod limits;
mod monitor;
mod peers;
mod served;
mod server;
mod succession;
