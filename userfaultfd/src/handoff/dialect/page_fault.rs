//! Cloud Hypervisor's page faults: a header of sixteen bytes (command, six unused bytes, length, little-endian), then for a
//! fault the guest address and the length. The peer connects to the monitor, and no userfaultfd is handed over.

use super::{Begins, Framing, Message, Wire};

pub(super) const WIRE: Wire = Wire {
    max_files: 16,
    ..Wire::new(Framing::Header16, |bytes| begins_with(&[PAGE_FAULT], bytes), decode, encode)
};

const PAGE_FAULT: u16 = 9;
/// Bytes of the header.
const HEADER_BYTES: usize = 16;

/// Whether bytes begin a message with one of some commands.
pub(super) fn begins_with(commands: &[u16], bytes: &[u8]) -> Begins {
    let begins = |command: &u16| {
        let mut start = [0; 8];
        start[..2].copy_from_slice(&command.to_le_bytes());
        let len = bytes.len().min(start.len());
        bytes[..len] == start[..len]
    };
    match bytes.len() {
        _ if !commands.iter().any(begins) => Begins::No,
        0..8 => Begins::Perhaps,
        _ => Begins::Yes,
    }
}

/// The command and the body of a whole message.
pub(super) fn split(bytes: &[u8]) -> (u16, &[u8]) {
    let command = bytes.first_chunk().map_or(0, |command| u16::from_le_bytes(*command));
    (command, bytes.get(HEADER_BYTES..).unwrap_or_default())
}

/// A whole message.
pub(super) fn header(command: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = u64::from(command).to_le_bytes().to_vec();
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.extend(body);
    bytes
}

fn decode(bytes: &[u8]) -> Result<Message, String> {
    match split(bytes) {
        (PAGE_FAULT, body) => {
            let numbers =
                body.split_first_chunk().and_then(|(address, rest)| Some((address, rest.first_chunk()?)));
            match numbers.filter(|_| body.len() == 16) {
                Some((address, len)) => Ok(Message::PageFault {
                    guest_address: u64::from_le_bytes(*address),
                    len: u64::from_le_bytes(*len),
                }),
                None => Err(format!("a page fault of {} bytes", body.len())),
            }
        }
        (other, _) => Err(format!("command {other:#x} is unknown")),
    }
}

fn encode(message: &Message) -> Option<Vec<u8>> {
    let Message::PageFault { guest_address, len } = message else { return None };
    Some(header(PAGE_FAULT, [guest_address.to_le_bytes(), len.to_le_bytes()].as_flattened()))
}
