//! Prints the kernel's release, the mask of its userfaultfd's features, in hexadecimal, and whether this process may be
//! told of forks: for `cargo xtask ci`, which tells the tests what to expect of this machine.

use std::process::ExitCode;

use guest_init::Record;

fn main() -> ExitCode {
    match guest_init::kernel::ask() {
        Record::Kernel { release, features: Ok(mask) } => {
            println!("{release} {mask:x} {}", guest_init::kernel::may_watch_forks());
            ExitCode::SUCCESS
        }
        answer => {
            eprintln!("{answer:?}");
            ExitCode::FAILURE
        }
    }
}
