//! Process 1 of a guest of `cargo xtask kernels`: sets the machine up, runs the test binaries, tells what came of it
//! and powers off.
//!
//! Nothing of that may happen on a machine that people use. So everything that touches the machine takes a
//! [`Guest`], which is had only by process 1 of a machine that has just been started from our own file system.

mod guest;
mod machine;
mod run;
mod say;
mod shell;
mod swap;

use std::process::ExitCode;

use guest::Guest;
use guest_init::{Plan, Record};
use say::Voice;

fn main() -> ExitCode {
    let guest = match Guest::claim() {
        Ok(guest) => guest,
        Err(reason) => {
            eprintln!("guest-init: does nothing here: {reason}");
            return ExitCode::FAILURE;
        }
    };
    let voice = Voice::new();
    match serve(&guest, &voice) {
        Ok(()) => voice.end(),
        Err(reason) => voice.say(Record::Note(reason)),
    }
    guest.power_off()
}

fn serve(guest: &Guest, voice: &Voice) -> Result<(), String> {
    machine::mount_all(guest)?;
    let text = std::fs::read_to_string(Plan::PATH).map_err(|e| format!("{}: {e}", Plan::PATH))?;
    let plan: Plan = text.parse()?;
    machine::set_up(guest, &plan, voice);
    if plan.shell {
        return shell::run(guest, &plan);
    }
    voice.say(guest_init::kernel::ask());
    for pass in &plan.passes {
        run::pass(guest, &plan, pass, voice)?;
    }
    Ok(())
}
