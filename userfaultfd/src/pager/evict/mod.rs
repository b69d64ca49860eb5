//! How a page gets out again, where memory has a limit.

#[expect(dead_code, reason = "measured by `benches/eviction`; nothing evicts yet")]
mod policy;
