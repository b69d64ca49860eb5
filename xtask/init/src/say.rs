//! Speaking to the host.

use std::io::Write;
use std::sync::{Mutex, PoisonError};

use guest_init::{Record, encode};

/// Writes records to the console: standard output of process 1.
#[derive(Debug, Default)]
pub(crate) struct Voice(Mutex<Vec<String>>);

impl Voice {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn say(&self, record: Record) {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = u32::try_from(said.len()).unwrap_or(u32::MAX);
        let line = encode(number, &record);
        write(&line);
        said.push(line);
    }

    /// Says that this is the end, and everything once more: the kernel may have written into a line.
    pub(crate) fn end(&self) {
        self.say(Record::End);
        let said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        said.iter().for_each(|line| write(line));
        let mut console = std::io::stdout();
        let _ = console.flush();
    }
}

/// Starts a line of its own: the kernel may have left one unfinished.
fn write(line: &str) {
    let mut console = std::io::stdout();
    // There is nobody else to tell that the console doesn't work.
    let _ = console.write_all(format!("\n{line}\n").as_bytes());
}
