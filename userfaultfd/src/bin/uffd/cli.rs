//! The command line: the one definition that help, manual pages and completions are made of.

use crate::exit::CODES;
use crate::{criu, doctor, image, manual, serve, track, ws};

/// Linux userfaultfd: page faults handled by a program.
///
/// `uffd` says what this kernel and this process can do, serves the memory of virtual machines, and copies its images.
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
