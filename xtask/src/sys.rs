//! What the build script of userfaultfd-sys and this program share: one configuration, one table, one list.

#[path = "../../userfaultfd-sys/build/bindings.rs"]
pub(crate) mod bindings;
#[path = "../../userfaultfd-sys/build/headers.rs"]
pub(crate) mod headers;
#[path = "../../userfaultfd-sys/build/names.rs"]
pub(crate) mod names;
#[path = "../../userfaultfd-sys/build/targets.rs"]
pub(crate) mod targets;
