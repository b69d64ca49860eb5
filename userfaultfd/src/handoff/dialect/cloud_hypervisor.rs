//! Cloud Hypervisor's hand-off to another process: an object of JSON behind its length of 32 bits. The handler confirms each
//! message with a byte. Memory that is plugged in later is added by a message without descriptors.

use serde::{Deserialize, Serialize};

use super::{Begins, Framing, MemoryRegion, Message, Wire};
use crate::RegisterMode;

pub(super) const WIRE: Wire = Wire { ready: &[1], ..Wire::new(Framing::Length32, begins, decode, encode) };

/// Bytes of the length.
const LENGTH_BYTES: usize = 4;
const VERSION: u64 = 0;

#[derive(Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Object {
    Handoff { version: u64, vmm_pid: Option<u32>, mode: Mode, regions: Vec<Region> },
    AddRegion { region: Region },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum Mode {
    Missing,
    Wp,
    WpAsync,
}

#[derive(Serialize, Deserialize)]
struct Region {
    guest_phys_addr: u64,
    host_virt_addr: u64,
    size: u64,
    backing_file_offset: u64,
}

impl Region {
    fn region(&self) -> Result<MemoryRegion, String> {
        let page_size = crate::page_size() as u64;
        let region =
            MemoryRegion::of_wire(self.host_virt_addr, self.size, self.backing_file_offset, page_size)?;
        Ok(region.guest_address(self.guest_phys_addr))
    }

    fn of(region: &MemoryRegion) -> Self {
        Self {
            // A guest without an address of its own has its memory from 0 on, in the order of the file.
            guest_phys_addr: region.guest_address.unwrap_or(region.offset),
            host_virt_addr: region.address as u64,
            size: region.len as u64,
            backing_file_offset: region.offset,
        }
    }
}

fn begins(bytes: &[u8]) -> Begins {
    match bytes.get(LENGTH_BYTES) {
        Some(b'{') => Begins::Yes,
        Some(_) => Begins::No,
        None => Begins::Perhaps,
    }
}

fn decode(bytes: &[u8]) -> Result<Message, String> {
    let object: Object = serde_json::from_slice(&bytes[LENGTH_BYTES..]).map_err(|error| error.to_string())?;
    match object {
        Object::Handoff { version, .. } if version != VERSION => {
            Err(format!("its version is {version}, and only {VERSION} is known"))
        }
        Object::Handoff { vmm_pid, mode, regions, .. } => {
            let regions = regions.iter().map(Region::region).collect::<Result<Vec<_>, _>>()?;
            let mode = match mode {
                Mode::Missing => RegisterMode::MISSING,
                Mode::Wp | Mode::WpAsync => RegisterMode::WRITE_PROTECT,
            };
            Ok(Message::Handoff { regions, mode, pid: vmm_pid, files: Some(0) })
        }
        Object::AddRegion { region } => Ok(Message::AddRegions(vec![region.region()?])),
    }
}

fn encode(message: &Message) -> Option<Vec<u8>> {
    let object = match message {
        Message::Handoff { regions, mode, pid, .. } => Object::Handoff {
            version: VERSION,
            vmm_pid: Some(pid.unwrap_or_else(std::process::id)),
            mode: if mode.contains(RegisterMode::MISSING) { Mode::Missing } else { Mode::Wp },
            regions: regions.iter().map(Region::of).collect(),
        },
        Message::AddRegions(regions) => match &regions[..] {
            [region] => Object::AddRegion { region: Region::of(region) },
            _ => return None,
        },
        _ => return None,
    };
    let json = serde_json::to_vec(&object).ok()?;
    Some([&u32::try_from(json.len()).ok()?.to_le_bytes()[..], &json].concat())
}
