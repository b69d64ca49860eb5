//! Contenders that are another process: built otherwise than this program.
//!
//! It is sent a line for each round, and answers with the nanoseconds that the round took.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use crate::contenders::{Contender, FAULTS};

struct Other {
    process: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Contender for Other {
    fn round(&mut self) -> Duration {
        let mut answer = String::new();
        self.orders.as_mut().expect("not dropped yet").write_all(b"round\n").expect("a child that reads");
        self.answers.read_line(&mut answer).expect("a child that answers");
        let nanoseconds = answer.trim().parse().expect("nanoseconds");
        Duration::from_nanos(nanoseconds)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // The end of its input is what it ends by.
        drop(self.orders.take());
        let ended = self.process.wait();
        assert!(ended.is_ok_and(|status| status.success()) || std::thread::panicking(), "the child failed");
    }
}

/// Starts a program that speaks as described above.
pub(crate) fn start(command: &mut Command) -> Result<Box<dyn Contender>, String> {
    let mut process = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{command:?}: {error}"))?;
    let orders = process.stdin.take();
    let answers = BufReader::new(process.stdout.take().expect("it is piped"));
    Ok(Box::new(Other { process, orders, answers }))
}

/// Seconds for a fault.
pub(crate) fn per_fault(contender: &mut dyn Contender) -> f64 {
    contender.round().as_secs_f64() / FAULTS as f64
}
