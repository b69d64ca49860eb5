//! The end: signals, and filling what is missing.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::thread;

use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::pipe;
use userfaultfd::handoff::ServedProcess;
use userfaultfd::pager::{self, Pager};

use super::guests::Guests;
use super::metrics::Metrics;
use crate::exit::{Count, Failure, say};

/// A socket with a byte for each signal that asks this program to end, and a duplicate to wait for it.
pub(crate) fn signals() -> Result<(UnixStream, UnixStream), Failure> {
    let make = || -> io::Result<_> {
        let (signals, written) = UnixStream::pair()?;
        pipe::register(SIGTERM, written.try_clone()?)?;
        pipe::register(SIGINT, written)?;
        let stop = signals.try_clone()?;
        Ok((signals, stop))
    };
    make().map_err(Failure::of("signals"))
}

/// What happens while memory is filled.
enum Event {
    Filled(Box<ServedProcess>, pager::Result<()>),
    Signal,
}

/// Fills all that is missing, one machine after the other, unless a second signal comes. Then drops the pager, which ends
/// what isn't complete.
pub(super) fn finish(
    (pager, metrics): (Arc<Pager>, Option<Metrics>),
    processes: impl ExactSizeIterator<Item = ServedProcess>,
    mut guests: Guests,
    mut signals: UnixStream,
) {
    let count = processes.len();
    let processes: Vec<_> = processes.inspect(|served| guests.end_record(served)).collect();
    if count > 0 {
        let machines = Count(count, "virtual machine");
        say!("filling the memory of {machines}; a second signal ends what isn't filled");
    }
    let (sender, events) = mpsc::channel();
    let of_signals = sender.clone();
    thread::spawn(move || {
        // The first signal is why this thread is here.
        if signals.read_exact(&mut [0; 2]).is_ok() {
            let _ended = of_signals.send(Event::Signal);
        }
    });
    thread::spawn(move || {
        for served in processes {
            let result = fill(&served);
            if sender.send(Event::Filled(Box::new(served), result)).is_err() {
                return;
            }
        }
    });
    let mut left = count;
    while left > 0 {
        match events.recv() {
            Ok(Event::Filled(served, result)) => {
                left -= 1;
                match result {
                    Ok(()) => guests.finished(&served),
                    // It has ended meanwhile.
                    Err(pager::Error::NotServed) => guests.end(&served),
                    Err(error) => guests.unfinished(&served, &error),
                }
            }
            Ok(Event::Signal) | Err(mpsc::RecvError) => {
                say!("not complete: {}", Count(left, "virtual machine"));
                guests.give_up(left);
                break;
            }
        }
    }
    // Its thread has a share of the pager, whose end is here.
    if let Some(metrics) = metrics {
        metrics.stop();
    }
    drop(pager);
}

/// Fills the memory of a machine, with a bar if the standard error is a terminal.
fn fill(served: &ServedProcess) -> pager::Result<()> {
    let style = ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let result = served.finish(|progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.done);
    });
    bar.finish_and_clear();
    result
}
