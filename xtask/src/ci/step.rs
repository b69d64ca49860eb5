//! What a step of CI is.

/// How a step ended, if it didn't fail.
pub(super) enum Outcome {
    Passed,
    Skipped(&'static str),
}

pub(super) struct Step {
    pub(super) name: &'static str,
    pub(super) what: &'static str,
    pub(super) run: fn() -> Result<Outcome, String>,
}
