//! `uffd`: what this machine can do with userfaultfd, and a page-fault handler for virtual machines.
//!
//! Each subcommand is a file; the library does the work. Nothing goes to the standard output but what was asked for.

mod cli;
mod criu;
mod doctor;
mod exit;
mod image;
mod manual;
mod serve;
mod track;
mod ws;

use std::process::ExitCode;

use clap::Parser;

use self::cli::{Arguments, Command};
use self::exit::{Failure, say};

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::CriuLazyPages(options) => criu::run(&options),
        Command::Doctor(options) => doctor::run(&options),
        Command::Serve(options) => serve::run(&options),
        Command::Image(options) => image::run(&options),
        Command::Track(options) => track::run(&options),
        Command::Ws(options) => ws::run(&options),
        Command::Man(options) => manual::man(&options),
        Command::Completions(options) => manual::completions(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of a pipe has what it wanted.
        Err(Failure::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            say!("uffd: {failure}");
            failure.code()
        }
    }
}
