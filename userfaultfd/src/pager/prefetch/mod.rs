//! Fills without a fault: read-ahead, background fills, and working sets.

pub(crate) mod background;
pub(crate) mod fill_target;
pub(crate) mod plan;
pub(crate) mod read_ahead;
pub(crate) mod record;
pub(crate) mod replay;
pub(crate) mod working_set;
