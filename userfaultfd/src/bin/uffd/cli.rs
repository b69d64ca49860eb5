//! The command line: the one definition that help, manual pages and completions are made of.

use crate::exit::CODES;
use crate::{criu, doctor, image, manual, serve, track, ws};

/// Handle page faults in user space with Linux userfaultfd
///
/// `uffd` reports what this kernel and this process can do, serves the memory of virtual machines and of processes that CRIU
/// restores, converts images of memory, and reports what a process writes.
#[derive(Debug, clap::Parser)]
#[command(name = "uffd", version, after_help = CODES, after_long_help = CODES)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    CriuLazyPages(criu::Options),
    Doctor(doctor::Options),
    Serve(serve::Options),
    Image(image::Options),
    Track(track::Options),
    Ws(ws::Options),
    Man(manual::Man),
    Completions(manual::Completions),
}
