//! The pager: threads that answer faults from a source.

mod source;

pub use source::{Fill, PageSource, SourceBytes};
