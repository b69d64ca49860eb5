//! The pager: threads that answer faults from a source.

mod source;
#[cfg_attr(not(test), expect(dead_code, reason = "the threads that count come with the pager"))]
mod stats;

pub use source::{FileSource, Fill, PageSource, SourceBytes};
pub use stats::{Histogram, Statistics};
