//! `uffd man`, `uffd completions`: made of the definition of the command line.

use std::io::{self, Write};

use clap::CommandFactory;

use crate::cli::Arguments;
use crate::exit::Failure;

/// Print a manual page: `uffd man | man -l -`
#[derive(Debug, clap::Args)]
pub(crate) struct Man {
    /// Print the page of this subcommand instead of the program's: `serve`, `ws-merge`
    #[arg(value_parser = subcommands())]
    subcommand: Option<String>,
}

/// Print completions of a shell, to be read by it: `source <(uffd completions bash)`
#[derive(Debug, clap::Args)]
pub(crate) struct Completions {
    /// The shell
    shell: clap_complete::Shell,
}

/// The names of the subcommands, but for this one: its definition can't have itself.
fn subcommands() -> clap::builder::PossibleValuesParser {
    [
        "criu-lazy-pages",
        "doctor",
        "serve",
        "track",
        "image",
        "image-convert",
        "image-verify",
        "image-info",
        "image-diff",
        "image-merge",
        "ws",
        "ws-info",
        "ws-merge",
        "ws-show",
        "completions",
    ]
    .into()
}

pub(crate) fn man(options: &Man) -> Result<(), Failure> {
    let mut command = Arguments::command();
    command.build();
    let page = match &options.subcommand {
        Some(name) => {
            let nested = || name.split('-').try_fold(&command, |found, part| found.find_subcommand(part));
            let found = command.find_subcommand(name).or_else(nested);
            let found = found.ok_or_else(|| Failure::Failed(format!("there is no subcommand {name}")))?;
            clap_mangen::Man::new(found.clone()).title(format!("uffd-{name}"))
        }
        None => clap_mangen::Man::new(command),
    };
    let mut text = Vec::new();
    page.render(&mut text).map_err(Failure::Output)?;
    print(&text)
}

pub(crate) fn completions(options: &Completions) -> Result<(), Failure> {
    let mut text = Vec::new();
    clap_complete::generate(options.shell, &mut Arguments::command(), "uffd", &mut text);
    print(&text)
}

/// At once, so that a reader that goes early is an error and no panic.
fn print(text: &[u8]) -> Result<(), Failure> {
    io::stdout().lock().write_all(text).map_err(Failure::Output)
}
