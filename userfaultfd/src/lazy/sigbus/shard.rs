//! Where a thread announces its faults, so that threads don't meet at one place.

/// Places. More than a machine mostly has CPUs that fault at once; each takes 128 bytes.
pub(super) const SHARDS: usize = 64;

/// The shard in which a thread announces its faults, derived from its stack: mostly the same one each time.
pub(super) fn shard_number() -> usize {
    let here = 0_u8;
    let stack = (&raw const here).addr() >> 12;
    (stack.wrapping_mul(0x9e37_79b1) >> 8) % SHARDS
}
