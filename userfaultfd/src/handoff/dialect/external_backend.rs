//! Cloud Hypervisor's external memory backend: all numbers are little-endian. A message is a header of sixteen bytes
//! (command, six unused bytes, length), a header of the command (version, flags, modes, count), and 48 bytes for each region.

use super::page_fault::{header, split};
use super::{Begins, Framing, MemoryRegion, Message, Wire};
use crate::RegisterMode;

pub(super) const WIRE: Wire = Wire { max_files: 128, ..Wire::new(Framing::Header16, begins, decode, encode) };

const HANDSHAKE: u16 = 0x0a;
const ADD_REGION: u16 = 0x0b;
const REMOVE_REGION: u16 = 0x0c;
const VERSION: u16 = 1;
/// A backing file for each region comes with the userfaultfd.
const BACKING_FILES: u8 = 8;
const MISSING: u8 = 1;
const WRITE_PROTECT: u8 = 2;
const WRITE_PROTECT_ASYNC: u8 = 4;
/// Bytes of the command's header, and of a region.
const COMMAND_BYTES: usize = 6;
const REGION_BYTES: usize = 48;

fn begins(bytes: &[u8]) -> Begins {
    super::page_fault::begins_with(&[HANDSHAKE], bytes)
}

fn region(bytes: &[u8; REGION_BYTES]) -> Result<MemoryRegion, String> {
    let number = |at: usize| {
        let mut number = [0; 8];
        number.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(number)
    };
    // Behind these lie the protection and the flags of the mapping, of 32 bits each.
    Ok(MemoryRegion::of_wire(number(0), number(8), number(16), number(24))?.file_offset(number(40)))
}

fn decode(bytes: &[u8]) -> Result<Message, String> {
    let (command, body) = split(bytes);
    let Some((&[v0, v1, flags, modes, n0, n1], rest)) = body.split_first_chunk::<COMMAND_BYTES>() else {
        return Err("it ends in the header of its command".to_owned());
    };
    let (version, count) = (u16::from_le_bytes([v0, v1]), u16::from_le_bytes([n0, n1]));
    if version != VERSION {
        return Err(format!("its version is {version}, and only {VERSION} is known"));
    }
    if rest.len() != usize::from(count) * REGION_BYTES {
        return Err(format!("it has {} bytes for {count} regions", rest.len()));
    }
    let regions = rest.chunks_exact(REGION_BYTES).filter_map(|bytes| bytes.first_chunk()).map(region);
    let regions = regions.collect::<Result<Vec<_>, _>>()?;
    match command {
        HANDSHAKE => {
            let mut mode = RegisterMode::empty();
            mode.set(RegisterMode::MISSING, modes & MISSING != 0);
            mode.set(RegisterMode::WRITE_PROTECT, modes & (WRITE_PROTECT | WRITE_PROTECT_ASYNC) != 0);
            let files = if flags & BACKING_FILES != 0 { regions.len() } else { 0 };
            Ok(Message::Handoff { regions, mode, pid: None, files: Some(files) })
        }
        ADD_REGION => Ok(Message::AddRegions(regions)),
        REMOVE_REGION => Ok(Message::RemoveRegions(regions)),
        other => Err(format!("command {other:#x} is unknown")),
    }
}

fn encode(message: &Message) -> Option<Vec<u8>> {
    let (command, regions, flags, modes) = match message {
        Message::Handoff { regions, mode, files, .. } => {
            let modes = if mode.contains(RegisterMode::MISSING) { MISSING } else { 0 };
            let protects = mode.contains(RegisterMode::WRITE_PROTECT);
            let modes = modes | if protects { WRITE_PROTECT } else { 0 };
            (HANDSHAKE, regions, if files.is_some_and(|files| files > 0) { BACKING_FILES } else { 0 }, modes)
        }
        Message::AddRegions(regions) => (ADD_REGION, regions, 0, MISSING),
        Message::RemoveRegions(regions) => (REMOVE_REGION, regions, 0, MISSING),
        _ => return None,
    };
    let mut body = VERSION.to_le_bytes().to_vec();
    body.extend([flags, modes]);
    body.extend(u16::try_from(regions.len()).ok()?.to_le_bytes());
    for region in regions {
        let numbers = [region.address as u64, region.len as u64, region.offset, region.page_size as u64];
        numbers.iter().for_each(|number| body.extend(number.to_le_bytes()));
        body.extend((libc::PROT_READ | libc::PROT_WRITE).to_le_bytes());
        body.extend(libc::MAP_SHARED.to_le_bytes());
        body.extend(region.file_offset.unwrap_or(region.offset).to_le_bytes());
    }
    Some(header(command, &body))
}
