//! Nydus, `block_uffd`: an object of JSON whose `type` is 0 for a hand-over, 1 for the answer to a page fault, 2 for a
//! request for the image's properties, and 3 for the answer to that. A hand-over may be the bare array, too.

use serde::{Deserialize, Serialize};

use super::{Begins, Framing, Mapping, Message, Wire, decode_array};

pub(super) const WIRE: Wire = Wire::new(Framing::Json, begins, decode, encode);

const HANDSHAKE: u64 = 0;
const STAT: u64 = 2;
/// The handler copies pages in, instead of sending files for the monitor to map.
const COPY: u64 = 1;

/// The fields that matter. `regions` is there for a hand-over only.
#[derive(Serialize, Deserialize)]
struct Object {
    #[serde(default)]
    r#type: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    regions: Option<Vec<Mapping>>,
    #[serde(default)]
    policy: u64,
}

fn begins(bytes: &[u8]) -> Begins {
    match Begins::with(b'{', bytes) {
        Begins::No => Begins::with(b'[', bytes),
        begins => begins,
    }
}

fn decode(bytes: &[u8]) -> Result<Message, String> {
    if Begins::with(b'[', bytes) == Begins::Yes {
        return decode_array(bytes);
    }
    let object: Object = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    match (object.r#type, object.regions) {
        (HANDSHAKE, Some(mappings)) => {
            let regions = mappings.iter().map(Mapping::region).collect::<Result<Vec<_>, _>>()?;
            Ok(Message::handoff(regions))
        }
        (HANDSHAKE, None) => Err("it has no regions".to_owned()),
        (STAT, _) => Ok(Message::Stat),
        (other, _) => Err(format!("a monitor sends no message of type {other}")),
    }
}

fn encode(message: &Message) -> Option<Vec<u8>> {
    let object = match message {
        Message::Handoff { regions, .. } => {
            let regions = Some(regions.iter().map(Mapping::of).collect());
            Object { r#type: HANDSHAKE, regions, policy: COPY }
        }
        Message::Stat => Object { r#type: STAT, regions: None, policy: COPY },
        _ => return None,
    };
    serde_json::to_vec(&object).ok()
}
