//! What the pager serves: regions, their addresses, and the state of each page.
//! Nothing here starts a thread, or asks the kernel for more than memory.

pub(crate) mod address_map;
pub(crate) mod descriptor;
pub(crate) mod fault_around;
pub(crate) mod fault_log;
pub(crate) mod missing_range;
pub(crate) mod page_cache;
pub(crate) mod page_run;
pub(crate) mod page_state;
pub(crate) mod region;
pub(crate) mod served;
pub(crate) mod shared_image;
pub(crate) mod state_file;
pub(crate) mod table;
pub(crate) mod unfillable;
