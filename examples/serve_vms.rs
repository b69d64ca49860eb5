//! The page-fault handler of a host: serves the memory of any number of virtual machines from a snapshot.
//!
//! ```sh
//! cargo run --features handoff --example serve_vms -- SNAPSHOT SOCKET &
//! cargo run --features handoff --example hand_over -- SNAPSHOT SOCKET
//! ```
//!
//! SNAPSHOT is the monitor's memory file, SOCKET a path where nothing is yet: `backend_path` of Firecracker's
//! `PUT /snapshot/load`, for example; the dialects of other monitors are understood, too. `hand_over` plays a monitor. Ends after a
//! number of machines, if there is a third argument. Any kernel; no rights from Linux 5.11 on, but monitors that run KVM need some.

use std::env;
use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;

use userfaultfd::handoff::{Listener, Message, Server, ServerEvent};
use userfaultfd::pager::{FileSource, Pager};
use userfaultfd_examples::Result;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    let (snapshot, socket, machines) = match &arguments[..] {
        [snapshot, socket] => (snapshot, socket, Some(usize::MAX)),
        [snapshot, socket, machines] => (snapshot, socket, machines.to_str().and_then(|n| n.parse().ok())),
        _ => return usage(),
    };
    let Some(machines) = machines else { return usage() };
    userfaultfd_examples::run(|| serve(snapshot, socket, machines))
}

fn usage() -> ExitCode {
    eprintln!("usage: cargo run --features handoff --example serve_vms -- SNAPSHOT SOCKET [MACHINES]");
    ExitCode::FAILURE
}

fn serve(snapshot: &OsString, socket: &OsString, machines: usize) -> Result<()> {
    let snapshot = Arc::new(FileSource::open(snapshot)?);
    let pager = Pager::builder().max_threads(8).on_problem(|problem| eprintln!("{problem}")).build()?;
    let mut server = Server::new(Listener::bind(socket)?)?;
    println!("serving");
    let mut ended = 0;
    while ended < machines {
        match server.wait()? {
            ServerEvent::Handoff(handoff) => match pager.serve(handoff, |_| Arc::clone(&snapshot)) {
                Ok(served) => drop(server.add(served)),
                // Its memory would never be filled, so its process is killed here.
                Err(unserved) => eprintln!("{unserved}"),
            },
            ServerEvent::Message { process, received } => match (received.message, server.get_mut(process)) {
                (Message::AddRegions(regions), Some(served)) => regions
                    .into_iter()
                    .try_for_each(|region| served.add_region(region, Arc::clone(&snapshot)).map(drop))?,
                (message, _) => eprintln!("{message:?} isn't understood"),
            },
            ServerEvent::Ended(served) => {
                ended += 1;
                let statistics = served.statistics();
                let (faults, bytes) = (statistics.faults(), statistics.bytes);
                println!("{} has ended: {faults} faults, {bytes} bytes", served.process().credentials);
            }
            event => eprintln!("{event:?}"),
        }
    }
    Ok(())
}
