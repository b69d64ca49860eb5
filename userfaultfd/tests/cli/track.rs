//! `uffd track`: what a process writes.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdout, Stdio};

use userfaultfd::FeatureFlags;

use crate::program::{PATH, command, run};
use crate::support::child::{self, Forked};
use crate::support::memory::Memory;
use crate::support::{has, require, test_name};

/// A process that writes to the pages that it is told.
struct Writer {
    process: Forked,
    socket: UnixStream,
    start: usize,
}

impl Writer {
    fn fork() -> Self {
        let memory = Memory::anonymous(8);
        (0..8).for_each(|page| memory.write(page, 1));
        let (socket, there) = UnixStream::pair().unwrap();
        let start = memory.start().addr();
        let process = child::fork(|| {
            let mut page = [0];
            while (&there).read(&mut page).unwrap() == 1 && page[0] < 8 {
                memory.write(page[0].into(), 2);
                (&there).write_all(&page).unwrap();
            }
        });
        Self { process, socket, start }
    }

    fn write(&mut self, page: u8) {
        self.socket.write_all(&[page]).unwrap();
        self.socket.read_exact(&mut [0]).unwrap();
    }
}

/// The program at work, with the lines that it prints.
struct Tracking {
    child: Child,
    out: BufReader<ChildStdout>,
    err: String,
}

impl Tracking {
    fn start(pid: libc::pid_t, more: &[&str]) -> Self {
        let pid = pid.to_string();
        let mut command = command(PATH, &[&["track", "--interval", "0.02", &pid], more].concat());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut err = String::new();
        let mut lines = BufReader::new(child.stderr.as_mut().unwrap());
        lines.read_line(&mut err).unwrap();
        assert!(err.starts_with("tracking ") && err.contains(&format!(" MiB of process {pid}")), "{err}");
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out, err }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        assert_ne!(self.out.read_line(&mut line).unwrap(), 0, "it has ended");
        line
    }

    /// How it ended, and its standard error.
    fn end(mut self) -> (Option<i32>, String) {
        self.child.stderr.take().unwrap().read_to_string(&mut self.err).unwrap();
        let mut rest = String::new();
        self.out.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().code(), self.err)
    }
}

fn can_be_tracked(test: &str) -> bool {
    has(test, "system calls made in other processes (x86-64)", cfg!(target_arch = "x86_64"))
}

#[test]
fn writes_are_told_by_place_until_the_process_ends() {
    require!(FeatureFlags::WP_ASYNC);
    if !can_be_tracked(test_name!()) {
        return;
    }
    child::run_well(test_name!(), || {
        let mut writer = Writer::fork();
        let mut tracking = Tracking::start(writer.process.pid(), &["--ranges", "--json"]);
        for pages in [&[2, 5][..], &[0], &[7]] {
            pages.iter().for_each(|page| writer.write(*page));
            let mut left: Vec<usize> =
                pages.iter().map(|page| writer.start + usize::from(*page) * crate::support::page()).collect();
            // They may be in two lines.
            while !left.is_empty() {
                let line: serde_json::Value = serde_json::from_str(&tracking.line()).unwrap();
                let written = line["written"].as_array().unwrap();
                assert!(line["ranges"].as_u64().unwrap() as usize <= written.len(), "{line}");
                let bytes: u64 = written
                    .iter()
                    .map(|one| one["end"].as_u64().unwrap() - one["start"].as_u64().unwrap())
                    .sum();
                assert_eq!(line["bytes"].as_u64(), Some(bytes), "{line}");
                let has = |at: &usize| {
                    written.iter().any(|one| {
                        let (start, end) = (one["start"].as_u64().unwrap(), one["end"].as_u64().unwrap());
                        (start..end).contains(&(*at as u64))
                    })
                };
                left.retain(|at| !has(at));
                // What it wasn't told to write stays as it was.
                let others = (0..8).filter(|page| !pages.contains(page));
                let others: Vec<_> =
                    others.map(|page| writer.start + usize::from(page) * crate::support::page()).collect();
                assert!(!others.iter().any(has), "{line}");
            }
        }
        writer.socket.write_all(&[9]).unwrap();
        writer.process.succeed();
        let (code, err) = tracking.end();
        assert!(code == Some(0) && err.ends_with("has ended\n"), "{err}");
    });
}

#[test]
fn process_goes_on_when_the_program_is_ended() {
    require!(FeatureFlags::WP_ASYNC);
    if !can_be_tracked(test_name!()) {
        return;
    }
    child::run_well(test_name!(), || {
        let mut writer = Writer::fork();
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGKILL] {
            let mut tracking = Tracking::start(writer.process.pid(), &[]);
            writer.write(3);
            let line = tracking.line();
            assert!(line.contains(" s ") && line.contains("KiB in "), "{line:?}");
            // SAFETY: touches no memory. The child isn't waited for yet, so the number is its own.
            assert_eq!(unsafe { libc::kill(tracking.child.id() as libc::pid_t, signal) }, 0);
            let (code, _) = tracking.end();
            assert_eq!(code, if signal == libc::SIGKILL { None } else { Some(0) });
            writer.write(4);
        }
        let mut counted = command(
            PATH,
            &["track", &writer.process.pid().to_string(), "--interval", "0.01", "--count", "3"],
        );
        let output = counted.output().unwrap();
        assert!(
            output.status.success() && output.stdout.iter().filter(|byte| **byte == b'\n').count() == 3,
            "{output:?}"
        );
        writer.socket.write_all(&[9]).unwrap();
        writer.process.succeed();
    });
}

#[test]
fn process_that_is_not_there_is_an_error() {
    require!(FeatureFlags::WP_ASYNC);
    if !can_be_tracked(test_name!()) {
        return;
    }
    let writer = Writer::fork();
    let pid = writer.process.pid().to_string();
    writer.process.kill();
    writer.process.wait();
    let said = run(&["track", &pid]);
    assert!(said.code == Some(1) && said.out.is_empty(), "{said:?}");
    assert!(said.err.contains(&format!("there is no process {pid}")), "{said:?}");
    for arguments in
        [&["track", "0"][..], &["track", "1", "--interval", "0"], &["track", "99999999999"], &["track"]]
    {
        let said = run(arguments);
        assert!(said.code == Some(2) && said.out.is_empty(), "{arguments:?}: {said:?}");
    }
}
