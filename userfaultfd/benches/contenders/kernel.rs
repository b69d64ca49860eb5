//! What the kernel's own fault on anonymous memory costs.

use std::time::Duration;

use memmap2::MmapMut;

use super::cpus::{self, Place};
use super::{Contender, FAULTS, PAGES, Walk, memory};

struct Anonymous {
    memory: MmapMut,
    walk: Walk,
}

impl Contender for Anonymous {
    fn round(&mut self) -> Duration {
        cpus::stay_on(Place::Same.faulting());
        self.walk.write(self.memory.as_mut_ptr(), FAULTS)
    }
}

pub(crate) fn make() -> Result<Box<dyn Contender>, String> {
    let memory = memory(PAGES * userfaultfd::page_size());
    Ok(Box::new(Anonymous { memory, walk: Walk::new() }))
}
