//! E2B's Firecracker: the array, with the userfaultfd and, where the memory is a memfd, that memfd.

use super::Wire;
use super::firecracker;

pub(super) const WIRE: Wire = Wire { max_files: 1, with_memory_file: None, ..firecracker::WIRE };
