//! The pager: threads that answer faults from a source.

mod source;
#[cfg_attr(not(test), expect(dead_code, reason = "the threads that count come with the pager"))]
mod stats;

pub use source::{
    BytesSource, ConcatSource, FileSource, Fill, MappedFileSource, PageSource, SourceBytes, ZeroSource,
};
pub use stats::{Histogram, Statistics};
