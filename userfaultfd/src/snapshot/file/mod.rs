//! What is saved: the format of a file, its writer, and its readers.

pub(crate) mod chain;
pub(crate) mod chunk_writer;
mod chunks;
pub(crate) mod codec;
pub(crate) mod format;
mod input;
pub(crate) mod layer;
mod name;
pub(crate) mod reader;
pub(crate) mod writer;
