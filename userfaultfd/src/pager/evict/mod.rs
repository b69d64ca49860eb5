//! How a page gets out again, where memory has a limit.
//!
//! A [`Budget`](budget::Budget) has the frames of all memories that share it, the policy that orders them, and a thread
//! that takes pages away. A region with a budget has a [`Residence`](residence::Residence), which says where each of its
//! pages is that isn't in memory. Filling asks it for room before content is loaded, and for content that isn't the
//! source's; the state of a page is the one that filling knows, and a page on its way out is claimed like one on its way
//! in.
//!
//! Pages of private memory are moved to a staging area, or copied where the kernel can't; those of shared memory are copied
//! from its file ([`shared`]). Written pages go to a spill file when they leave ([`write_back`]), or to a store before they may ([`clean`], [`writer`]).

pub(crate) mod budget;
mod cgroup;
pub(crate) mod clean;
pub(crate) mod context;
pub(crate) mod flush_error;
mod frames;
mod page_set;
pub(crate) mod pins;
mod policy;
mod pool;
pub(crate) mod residence;
pub(crate) mod shared;
pub(crate) mod store;
pub(crate) mod take;
mod write_back;
pub(crate) mod writer;
