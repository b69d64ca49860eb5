//! Maintenance of the workspace.

mod apt;
mod bindings;
mod ci;
mod command;
mod cross;
mod diff;
mod journal;
mod kernels;
mod libclang;
mod mutants;
mod pip;
mod public_api;
mod sanitize;
mod sys;
mod tree;

use std::env;
use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask COMMAND

  bindings [--headers DIR] [--check] [--version X.Y.Z]
      Regenerate userfaultfd-sys/src/bindings from a tree of kernel headers; with --check, only say what would change.
      Without --headers, Debian's package linux-libc-dev is fetched: of the newest kernel, with --check of the committed
      bindings' kernel.
      DIR is a tree of `make headers_install`, a kernel source tree, or has include/ and arch/ARCH/asm/.
      The kernel's version is taken from the tree (linux/version.h, Makefile or README.md) unless it is given.

  ci [--list] [--step NAME]...
      Everything that has to pass before a change goes in, or only the named steps.

  libclang
      Find libclang, or fetch it, and print where it is: a value for LIBCLANG_PATH.
";

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    let command = arguments.next().unwrap_or_default();
    let arguments: Vec<String> = arguments.collect();
    let asks = arguments.iter().take_while(|argument| *argument != "--").any(|argument| is_help(argument));
    let result = match if asks { "help" } else { command.as_str() } {
        "bindings" => bindings::run(&arguments),
        "ci" => ci::run(&arguments),
        "cross" => cross::run(&arguments),
        "journal" => journal::run(&arguments),
        "kernels" => kernels::run(&arguments),
        "libclang" => libclang::load().map(|path| println!("{}", path.display())),
        "mutants" => mutants::run(&arguments),
        "public-api" => public_api::run(&arguments),
        "sanitize" => sanitize::run(&arguments),
        command if command.is_empty() || is_help(command) => {
            let others = [
                cross::USAGE,
                journal::USAGE,
                kernels::USAGE,
                mutants::USAGE,
                public_api::USAGE,
                sanitize::USAGE,
            ];
            print!("{USAGE}\n{}", others.join("\n"));
            Ok(())
        }
        _ => Err(format!("no command `{command}`\n\n{USAGE}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {}", message.trim_end());
            ExitCode::FAILURE
        }
    }
}

fn is_help(argument: &str) -> bool {
    ["help", "-h", "--help"].contains(&argument)
}
