//! The rows of the report. Each is a function that measures and fills its section.

mod background;
mod blocks;
mod fault;
mod huge;
mod random;
mod restore;
mod scaling;
mod sequential;
mod slow;
mod statistics;

use crate::options::Options;
use crate::table::Section;

/// A name, what it is about, and what measures it.
type Row = (&'static str, &'static str, fn(&Options, Section) -> Section);

pub(crate) const ROWS: &[Row] = &[
    ("fault", "One missing fault, 4 KiB", fault::run),
    ("sequential", "Memory read from start to end, from bytes in memory", sequential::run),
    ("random", "Memory read at random, 4 KiB a fault", random::run),
    ("restore", "A second start, with the working set of the first", restore::run),
    ("slow", "A source that takes 6 ms for each read, read from start to end", slow::run),
    ("background", "A source that takes 5 ms for each read, all of it in the background", background::run),
    ("scaling", "Faults in a second, by threads that fault and descriptors", scaling::run),
    ("huge", "Huge pages, and 4 KiB pages with a block around each fault", huge::run),
    ("statistics", "What statistics and tracing cost, one fault", statistics::run),
    ("blocks", "Operations, by the size of the block", blocks::run),
];
