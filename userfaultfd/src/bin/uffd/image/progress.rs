//! A bar on the standard error, where that is a terminal.

use std::io;

use indicatif::{ProgressBar, ProgressStyle};

pub(super) struct Progress(ProgressBar);

impl Progress {
    pub(super) fn new(what: &'static str) -> Self {
        let style = ProgressStyle::with_template("{msg} {bytes} of {total_bytes} [{bar:40}] {eta}");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        Self(ProgressBar::new(0).with_style(style).with_message(what))
    }

    pub(super) fn tell(&self, done: u64, all: u64) -> io::Result<()> {
        self.0.set_length(all);
        self.0.set_position(done);
        Ok(())
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
