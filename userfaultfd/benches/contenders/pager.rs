//! The pager, in each delivery.

use std::sync::Arc;
use std::time::Duration;

use userfaultfd::LazyMemory;
use userfaultfd::pager::{BytesSource, Delivery, FaultAround, Pager};

use super::cpus::{self, Place};
use super::{CONTENT, Contender, FAULTS, Walk};

struct Ladder {
    place: Place,
    memory: LazyMemory,
    walk: Walk,
}

impl Contender for Ladder {
    fn round(&mut self) -> Duration {
        cpus::stay_on(self.place.faulting());
        self.walk.read(self.memory.as_ptr(), FAULTS)
    }
}

pub(crate) fn make(place: Place, delivery: Delivery) -> Result<Box<dyn Contender>, String> {
    let build = || Pager::builder().delivery(delivery).build();
    let pager = match delivery {
        // Started with one CPU they would never spin: so they go to it afterwards.
        Delivery::Spin(_) => cpus::moved(place, "uffd-pager", build)?,
        _ => cpus::answering(place, build)?,
    };
    let memory = LazyMemory::builder(BytesSource::new(Arc::clone(&CONTENT)))
        .pager(&Arc::new(pager.map_err(|error| error.to_string())?))
        .fault_around(FaultAround::Page)
        .build()
        .map_err(|error| error.to_string())?;
    Ok(Box::new(Ladder { place, memory, walk: Walk::new() }))
}

/// Without a pager's threads.
pub(crate) fn sigbus() -> Result<Box<dyn Contender>, String> {
    let memory =
        LazyMemory::sigbus(BytesSource::new(Arc::clone(&CONTENT))).fault_around(FaultAround::Page).build();
    let memory = memory.map_err(|error| error.to_string())?;
    Ok(Box::new(Ladder { place: Place::Same, memory, walk: Walk::new() }))
}
