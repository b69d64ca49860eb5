//! `cargo xtask sanitize`: memory errors, data races, and what bytes no kernel writes do.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::command::{execute, output};
use crate::cross::{self, Rust};
use crate::tree;

pub(crate) const USAGE: &str = "\
  sanitize [address] [thread] [fuzz] [--runs N] [--require]
      Run the tests under AddressSanitizer and ThreadSanitizer, and fuzz the decoding of events; all three if none is
      named.
      --runs      how many inputs to fuzz with; ten million otherwise
      --require   what can't be had is a failure
";

const RUNS: u64 = 10_000_000;

/// What is tested: everything that users get.
const TESTED: [&str; 5] = ["--workspace", "--exclude", "xtask", "--exclude", "guest-init"];

/// Tests that can't succeed in a process with a sanitizer.
const SKIPPED: [&str; 5] = [
    // The sanitizers make mlock(2) do nothing.
    "move_pages::source_and_destination_must_be_alike",
    // At the limit of mappings, the sanitizers have none left for themselves, and give up.
    "register::mappings_at_their_limit_cannot_be_split",
    // They measure what memory the process takes.
    "lazy::source_larger_than_memory_takes",
    "leaks::no_resource_is_left_after",
    "vast::",
];

/// More of them under ThreadSanitizer. It holds locks of its own across a fork, which waits for its event to be read by
/// a thread that needs them; and it keeps signals back until a thread makes a system call, which one that waits for a
/// page doesn't.
const SKIPPED_BY_THREAD: [&str; 5] = [
    "fork",
    "events::every_change_and_fault_at_once_keeps_content",
    "leaks::no_descriptor_is_left_of_children",
    "signals::",
    "locks::fault_inside_the_handler_of_another_signal",
];

/// The races that ThreadSanitizer need not tell.
const SUPPRESSIONS: &str = "xtask/thread-sanitizer.txt";

/// Seconds that a test may take: with a sanitizer everything is ten times slower.
const TEST_LIMIT: (&str, &str) = ("USERFAULTFD_TEST_SECONDS", "600");

/// A SIGBUS is what poison is for, and ends programs that don't expect one; so does a SIGSEGV where nothing is mapped.
const SIGNALS: &str = "handle_sigbus=0:handle_segv=0";

/// How the library is compiled for libFuzzer, as cargo-fuzz does.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares --cfg=fuzzing -Ccodegen-units=1 -Cdebug-assertions \
    -Zsanitizer=address";

const FUZZ: &str = "userfaultfd/fuzz";

enum Failure {
    Failed(String),
    NotAvailable(String),
}

impl From<String> for Failure {
    fn from(reason: String) -> Self {
        Self::Failed(reason)
    }
}

type Act = fn(&Installed, u64) -> Result<(), Failure>;
const STEPS: [(&str, Act); 3] = [("address", address), ("thread", thread), ("fuzz", fuzz)];

pub(crate) fn run(arguments: &[String]) -> Result<(), String> {
    let (mut selected, mut runs, mut require) = (Vec::new(), RUNS, false);
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--require" => require = true,
            "--runs" => {
                let value = arguments.next().ok_or("--runs needs a number")?;
                runs = value.parse().map_err(|e| format!("--runs {value}: {e}"))?;
            }
            name => {
                let step = STEPS.into_iter().find(|(known, _)| *known == name);
                selected.push(step.ok_or_else(|| format!("sanitize: unexpected argument `{name}`"))?);
            }
        }
    }
    if selected.is_empty() {
        selected = STEPS.to_vec();
    }
    let installed = Installed::find()?;
    let mut text = format!("\n{:10} {:>7}  result\n", "sanitizer", "seconds");
    let mut failed = Vec::new();
    for (name, act) in selected {
        println!("\n=== {name}");
        let start = Instant::now();
        let (result, is_bad) = match act(&installed, runs) {
            Ok(()) => ("passed".to_owned(), false),
            Err(Failure::Failed(reason)) => (format!("FAILED: {reason}"), true),
            Err(Failure::NotAvailable(reason)) => (format!("not available: {reason}"), require),
        };
        text += &format!("{name:10} {:7.0}  {result}\n", start.elapsed().as_secs_f32());
        if is_bad {
            failed.push(name);
        }
    }
    println!("{text}");
    if failed.is_empty() { Ok(()) } else { Err(format!("failed: {}", failed.join(", "))) }
}

/// The compiler of this machine.
struct Installed {
    rustc: PathBuf,
    target: String,
    /// Of LLVM, the number that sanitizers' run times and the code that calls them have to share.
    llvm: String,
}

impl Installed {
    fn find() -> Result<Self, String> {
        let rustc = PathBuf::from(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
        let about = about(&rustc)?;
        let target = field(&about, "host: ").ok_or("rustc names no host")?.to_owned();
        let llvm = llvm(&about)?;
        Ok(Self { rustc, target, llvm })
    }

    /// The run time of a sanitizer, which comes with some builds of the compiler.
    fn runtime(&self, sanitizer: &str) -> Result<PathBuf, Failure> {
        let mut command = Command::new(&self.rustc);
        let folder = output(command.args(["--print", "target-libdir", "--target", &self.target]))?;
        let end = format!("_rt.{sanitizer}.a");
        let entries = fs::read_dir(folder.trim()).into_iter().flatten().flatten();
        let found = entries.map(|entry| entry.path()).find(|path| path.to_string_lossy().ends_with(&end));
        found.ok_or_else(|| {
            let help = "have a Rust of rust-lang.org installed";
            Failure::NotAvailable(format!("no librustc{end} in {}: {help}", folder.trim()))
        })
    }

    fn cargo(&self, subcommand: &str, rustflags: &str, folder: &str) -> Command {
        let mut command = crate::command::cargo(&[subcommand, "--target", &self.target]);
        command.env("RUSTC_BOOTSTRAP", "1").env_remove("CARGO_ENCODED_RUSTFLAGS").env("RUSTFLAGS", rustflags);
        command.env("CARGO_TARGET_DIR", self::folder(folder));
        command
    }
}

fn folder(name: &str) -> PathBuf {
    tree::scratch().join("sanitize").join(name)
}

fn about(rustc: &Path) -> Result<String, String> {
    output(Command::new(rustc).arg("-vV"))
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name))
}

/// The first number of LLVM's version.
fn llvm(about: &str) -> Result<String, String> {
    let version = field(about, "LLVM version: ").ok_or("rustc names no LLVM")?;
    Ok(version.split('.').next().unwrap_or_default().to_owned())
}

fn address(installed: &Installed, _: u64) -> Result<(), Failure> {
    installed.runtime("asan")?;
    test(&[], |subcommand| {
        let mut command = installed.cargo(subcommand, "-Zsanitizer=address", "address");
        command.env("ASAN_OPTIONS", SIGNALS);
        command
    })
}

/// Runs the tests, which run the examples.
fn test(skipped: &[&str], cargo: impl Fn(&str) -> Command) -> Result<(), Failure> {
    execute(cargo("build").args(TESTED).args(["--quiet", "--examples"]))?;
    let mut command = cargo("test");
    command.args(TESTED).args(["--quiet", "--lib", "--tests", "--no-fail-fast", "--"]);
    for test in SKIPPED.iter().chain(skipped) {
        command.args(["--skip", test]);
    }
    command.env(TEST_LIMIT.0, TEST_LIMIT.1);
    Ok(execute(&mut command)?)
}

/// Here the standard library must be built with the sanitizer, too: or what synchronises by it looks unsynchronised.
fn thread(installed: &Installed, _: u64) -> Result<(), Failure> {
    let runtime = installed.runtime("tsan")?;
    let rust = Rust::current().map_err(Failure::NotAvailable)?;
    if !rust.has_sources() {
        return Err(Failure::NotAvailable(format!("Rust {} has no sources: {}", rust.version, cross::HELP)));
    }
    println!("Rust {}: {}", rust.version, rust.origin);
    if llvm(&about(&rust.rustc)?)? != installed.llvm {
        let reason = format!("Rust {} has another LLVM than the run time of the installed one", rust.version);
        return Err(Failure::NotAvailable(format!("{reason}: {}", cross::HELP)));
    }
    // The run time is named, since a compiler of Debian's has none of its own; first, so that what it needs follows.
    let flags = format!(
        "-Zsanitizer=thread -Zexternal-clangrt -Zpre-link-arg=-Wl,--whole-archive -Zpre-link-arg={} \
         -Zpre-link-arg=-Wl,--no-whole-archive -Clink-arg=-lm",
        runtime.display()
    );
    let suppressions = tree::root().join(SUPPRESSIONS);
    let options = format!("{SIGNALS}:die_after_fork=0:suppressions={}", suppressions.display());
    test(&SKIPPED_BY_THREAD, |subcommand| {
        let mut command = installed.cargo(subcommand, &flags, "thread");
        command.arg("-Zbuild-std").env("RUSTC", &rust.rustc);
        // Tests fork while the harness has other threads; their children only make system calls.
        command.env("TSAN_OPTIONS", &options);
        command
    })
}

fn fuzz(installed: &Installed, runs: u64) -> Result<(), Failure> {
    installed.runtime("asan")?;
    let sources = tree::root().join(FUZZ);
    let mut command = installed.cargo("build", COVERAGE, "fuzz");
    execute(command.args(["--release", "--manifest-path"]).arg(sources.join("Cargo.toml")))?;

    let (corpus, findings) = (folder("corpus"), folder("findings"));
    for folder in [&corpus, &findings] {
        fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    }
    let program = folder("fuzz").join(&installed.target).join("release/events");
    let mut command = Command::new(program);
    command.arg(format!("-runs={runs}")).arg(format!("-artifact_prefix={}/", findings.display()));
    // A byte, and messages that fill the largest buffer four times.
    command.args(["-max_len=1025", "-print_final_stats=1"]).arg(&corpus).arg(sources.join("seeds/events"));
    // Most of the time would go into remembering which code allocated what.
    command.env("ASAN_OPTIONS", "malloc_context_size=2:quarantine_size_mb=4");
    execute(&mut command).map_err(|reason| {
        Failure::Failed(format!("{reason}; inputs that fail are in {}", findings.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compiler_version_is_read() {
        let about = "rustc 1.95.0\nhost: x86_64-unknown-linux-gnu\nLLVM version: 22.1.2\n";
        assert_eq!(field(about, "host: "), Some("x86_64-unknown-linux-gnu"));
        assert_eq!(llvm(about).as_deref(), Ok("22"));
        assert!(llvm("rustc 1.95.0\n").is_err());
    }

    #[test]
    fn wrong_arguments_are_refused() {
        for wrong in [&["memory"][..], &["--runs"], &["--runs", "many"], &["--fast"]] {
            let arguments: Vec<_> = wrong.iter().map(|argument| (*argument).to_owned()).collect();
            assert!(run(&arguments).is_err(), "{wrong:?}");
        }
    }
}
