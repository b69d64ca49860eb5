//! `uffd doctor`: what works here, what is refused, why, and what helps.

mod machine;
mod memory;
mod rights;

use std::env::consts::ARCH;
use std::fmt;
use std::fs;
use std::io::{self, Write};

use serde::Serialize;
use userfaultfd::page_size;

use crate::exit::Failure;

/// Report what this kernel and this process can do; for each refusal the reason, and what helps
///
/// Asks the kernel, and changes nothing. Ends with 3 if no userfaultfd can be created at all.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What was found.
#[derive(Debug, Serialize)]
struct Report {
    kernel: String,
    architecture: &'static str,
    page_size: usize,
    /// Whether a userfaultfd can be created.
    usable: bool,
    checks: Vec<Check>,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Check {
    area: Area,
    name: String,
    state: State,
    /// What was found, or why not.
    detail: String,
    /// What helps, any one of them.
    remedies: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Area {
    Rights,
    Surroundings,
    Kernel,
    Memory,
    VirtualMachines,
    HugePages,
    Limits,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Yes,
    No,
    /// Neither good nor bad in itself.
    Note,
}

impl Check {
    fn new(area: Area, state: State, name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { area, name: name.into(), state, detail: detail.into(), remedies: Vec::new() }
    }

    fn helps(mut self, remedy: impl Into<String>) -> Self {
        self.remedies.push(remedy.into());
        self
    }
}

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rights => "Rights of this process",
            Self::Surroundings => "Where this process runs",
            Self::Kernel => "Features of this kernel",
            Self::Memory => "Memory that can be registered",
            Self::VirtualMachines => "Virtual machines",
            Self::HugePages => "Huge pages",
            Self::Limits => "Limits",
        })
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Yes => "yes",
            Self::No => "no",
            Self::Note => "-",
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, architecture, page_size, .. } = self;
        writeln!(f, "Linux {kernel} on {architecture}, pages of {} KiB", page_size / 1024)?;
        let mut area = None;
        for check in &self.checks {
            if area.replace(check.area) != Some(check.area) {
                writeln!(f, "\n{}", check.area)?;
            }
            let mut lines = check.detail.lines();
            let line =
                format!("  {:<4} {:<36} {}", check.state, check.name, lines.next().unwrap_or_default());
            writeln!(f, "{}", line.trim_end())?;
            lines.try_for_each(|line| writeln!(f, "       {line}"))?;
            check.remedies.iter().try_for_each(|remedy| writeln!(f, "       helps: {remedy}"))?;
        }
        Ok(())
    }
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let kernel = first_line("/proc/sys/kernel/osrelease").unwrap_or("of unknown release".into());
    let (mut checks, usable) = rights::checks();
    checks.extend(machine::surroundings());
    checks.extend(memory::checks(&kernel));
    checks.extend(machine::checks());
    let report = Report { kernel, architecture: ARCH, page_size: page_size(), usable, checks };
    let text = match options.json {
        true => serde_json::to_string_pretty(&report).map_err(|e| Failure::Output(e.into()))? + "\n",
        false => report.to_string(),
    };
    io::stdout().lock().write_all(text.as_bytes()).map_err(Failure::Output)?;
    match usable {
        true => Ok(()),
        false => Err(Failure::Unmet("this process can't create a userfaultfd: see above".into())),
    }
}

/// The first line of a file of the kernel.
fn first_line(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.lines().next().unwrap_or_default().trim().to_owned())
}
