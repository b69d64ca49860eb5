//! CRIU's lazy pages: for each task its process id, an integer of this machine, and in a message of its own a byte with the
//! userfaultfd. A negative id is a zombie's, without one. A number at the end says that all are restored. The daemon
//! listens on `lazy-pages.socket` in the folder of the images, which have the regions.

use super::{Begins, Framing, Message, Wire};
use crate::RegisterMode;
use crate::handoff::framing::CRIU_COMPLETE;

pub(super) const WIRE: Wire = Wire {
    has_no_regions: true,
    descriptors_last: true,
    ..Wire::new(Framing::Criu, Begins::never, decode, encode)
};

fn decode(bytes: &[u8]) -> Result<Message, String> {
    let Some(number) = bytes.first_chunk() else { return Err("it is cut off".to_owned()) };
    if *number == CRIU_COMPLETE {
        return Ok(Message::Complete);
    }
    match i32::from_ne_bytes(*number) {
        0 => Err("there is no process 0".to_owned()),
        pid @ ..0 => Ok(Message::Zombie { pid: pid.unsigned_abs() }),
        pid => Ok(Message::Handoff {
            regions: Vec::new(),
            mode: RegisterMode::MISSING,
            pid: Some(pid.unsigned_abs()),
            files: Some(0),
        }),
    }
}

fn encode(message: &Message) -> Option<Vec<u8>> {
    let number = |pid: u32| i32::try_from(pid).ok().filter(|pid| *pid > 0);
    match message {
        Message::Handoff { pid, .. } => {
            let pid = number(pid.unwrap_or_else(std::process::id))?;
            Some([&pid.to_ne_bytes()[..], &[0]].concat())
        }
        Message::Zombie { pid } => Some((-number(*pid)?).to_ne_bytes().to_vec()),
        Message::Complete => Some(CRIU_COMPLETE.to_vec()),
        _ => None,
    }
}
