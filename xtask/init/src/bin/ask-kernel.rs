//! Prints the kernel's release and the mask of its userfaultfd's features, in hexadecimal: for `cargo xtask ci`, which
//! tells the tests what to expect of this machine.

use std::process::ExitCode;

use guest_init::Record;

fn main() -> ExitCode {
    match guest_init::kernel::ask() {
        Record::Kernel { release, features: Ok(mask) } => {
            println!("{release} {mask:x}");
            ExitCode::SUCCESS
        }
        answer => {
            eprintln!("{answer:?}");
            ExitCode::FAILURE
        }
    }
}
