//! Running the binaries.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use guest_init::{Ending, Pass, Plan, Record};

use crate::guest::Guest;
use crate::machine;
use crate::say::Voice;

/// Lines of a binary's output that are passed on: more than a few thousand tests have.
const OUTPUT_LINES: usize = 20_000;

/// Runs binaries as one user.
pub(crate) fn pass(guest: &Guest, plan: &Plan, pass: &Pass, voice: &Voice) -> Result<(), String> {
    let mut log = KernelLog::open()?;
    for path in &pass.binaries {
        voice.say(Record::Start { user: pass.user, binary: path.clone() });
        let start = Instant::now();
        let ending = binary(guest, path, plan, pass, voice).unwrap_or_else(Ending::NotRun);
        let milliseconds = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        log.pass_on(voice);
        voice.say(Record::Done { ending, milliseconds });
    }
    Ok(())
}

fn binary(guest: &Guest, path: &str, plan: &Plan, pass: &Pass, voice: &Voice) -> Result<Ending, String> {
    let limit = Duration::from_secs(plan.limit);
    let temporary = machine::temporary_folder(guest, pass.user)?;
    let error = |e| format!("{path}: {e}");
    // One way for both outputs keeps their order.
    let (ours, theirs) = UnixStream::pair().map_err(error)?;
    let mut command = Command::new(path);
    command.args(&plan.arguments).current_dir("/").env_clear();
    command.env("PATH", "/bin").env("HOME", "/").env("TMPDIR", temporary).env("RUST_BACKTRACE", "1");
    command.envs(pass.environment.iter().map(|(name, value)| (name, value)));
    command.uid(pass.user.id()).gid(pass.user.id()).process_group(0);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::from(std::os::fd::OwnedFd::from(theirs.try_clone().map_err(error)?)));
    command.stderr(Stdio::from(std::os::fd::OwnedFd::from(theirs)));
    let mut child = command.spawn().map_err(error)?;
    // The command keeps its ends of the sockets open.
    drop(command);

    thread::scope(|scope| {
        scope.spawn(|| pass_output_on(ours, voice));
        let status = wait(&mut child, limit);
        if !matches!(status, Ok(Some(_))) {
            show_threads(child.id(), voice);
        }
        // Children that the binary left behind would keep its output open.
        guest.end_group(child.id());
        let ending = match status {
            Ok(Some(status)) => Ok(ending(status)),
            Ok(None) => child.wait().map(|_| Ending::Limit).map_err(error),
            Err(e) => Err(error(e)),
        };
        reap();
        ending
    })
}

fn ending(status: ExitStatus) -> Ending {
    status.signal().map_or_else(|| Ending::Exit(status.code().unwrap_or(-1)), Ending::Signal)
}

/// Waits for the end of a child, but not longer than `limit`.
fn wait(child: &mut Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    let start = Instant::now();
    while start.elapsed() < limit {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(None)
}

fn pass_output_on(from: UnixStream, voice: &Voice) {
    let mut lines = BufReader::new(from).split(b'\n');
    let mut count = 0;
    while let Some(Ok(line)) = lines.next() {
        if count < OUTPUT_LINES {
            voice.say(Record::Output(String::from_utf8_lossy(&line).into_owned()));
        }
        count += 1;
    }
    if count > OUTPUT_LINES {
        voice.say(Record::Output(format!("({} more lines)", count - OUTPUT_LINES)));
    }
}

/// Where each thread of a process is in the kernel.
fn show_threads(process: u32, voice: &Voice) {
    let Ok(threads) = fs::read_dir(format!("/proc/{process}/task")) else { return };
    for thread in threads.flatten() {
        let about = |file| fs::read_to_string(thread.path().join(file)).unwrap_or_default();
        let frames: Vec<_> =
            about("stack").lines().filter_map(|line| line.split(' ').nth(1).map(str::to_owned)).collect();
        let (name, call) = (about("comm"), about("syscall"));
        let text = format!("thread {}: {}: {}", name.trim(), call.trim(), frames.join(" < "));
        voice.say(Record::Output(text));
    }
}

/// Waits for processes whose parents ended before them.
fn reap() {
    let mut status = 0;
    // SAFETY: the status is borrowed for the call. No child of this process that a thread waits for is left.
    while unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) } > 0 {}
}

/// Warnings of the kernel.
struct KernelLog(File);

impl KernelLog {
    fn open() -> Result<Self, String> {
        let error = |e| format!("/dev/kmsg: {e}");
        let mut file =
            File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg").map_err(error)?;
        file.seek(SeekFrom::End(0)).map_err(error)?;
        Ok(Self(file))
    }

    /// Passes on what came since the last time.
    fn pass_on(&mut self, voice: &Voice) {
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(0) => return,
                Ok(len) => {
                    if let Some(text) = warning(&String::from_utf8_lossy(&record[..len])) {
                        voice.say(Record::Log(text));
                    }
                }
                // Records were overwritten before they were read: the next read has the oldest that is left.
                Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {}
                Err(_) => return,
            }
        }
    }
}

/// The text of a record of /dev/kmsg, if it is a warning or worse: `priority,number,time,flags;text`.
fn warning(record: &str) -> Option<String> {
    const WARNING: u32 = 4;
    let (head, text) = record.split_once(';')?;
    let priority: u32 = head.split(',').next()?.parse().ok()?;
    (priority % 8 <= WARNING).then(|| text.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::warning;

    #[test]
    fn warnings_differ_from_information() {
        let warned = "4,339,5140900,-;WARNING: CPU: 1 PID: 5\n SUBSYSTEM=x\n";
        assert_eq!(warning(warned).as_deref(), Some("WARNING: CPU: 1 PID: 5"));
        assert_eq!(warning("12,1,2,-;user's warning\n").as_deref(), Some("user's warning"));
        assert_eq!(warning("6,339,5140900,-;all is well\n"), None);
        assert_eq!(warning("nothing"), None);
    }
}
