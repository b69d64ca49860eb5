//! `cargo xtask kernels`: the workspace's tests on other kernels, in virtual machines.

mod binaries;
mod cpio;
mod image;
mod options;
mod packages;
mod qemu;
mod report;
pub(crate) mod table;
mod verdict;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use guest_init::{Pass, Plan, Transcript, User};

use binaries::{Binary, Built};
use options::{Options, Subject};
use packages::{Files, Packages};
use qemu::{Machine, Qemu};
use table::{Features, Table};
use verdict::Verdict;

use crate::tree;

pub(crate) const USAGE: &str = "\
  kernels [NAME]... [--all] [--short] [--list] [--kernel PATH [--arch ARCH] [--features MASK] [--lacks NEED]...]
          [--shell NAME] [--qemu PATH] [--limit SECONDS] [--guests NUMBER] [--binary NAME]... [--soak SECONDS]
          [-- ARGUMENT...]
      Run the workspace's tests on the kernels of xtask/kernels.toml, or the named ones of them, in virtual machines:
      as root and as a user without rights. QEMU and the kernels are Debian packages, fetched into the target folder.
      --all       kernels of other architectures, too
      --short     as the user without rights, only the binaries whose tests are about rights
      --list      only show the kernels
      --kernel    a kernel image instead, which must offer exactly the features MASK if that is given; a test that is
                  skipped for what isn't given as NEED fails, but for features that the kernel doesn't offer
      --shell     no tests but a shell on the console of this kernel, with the binaries in /tests
      --qemu      the emulator to use; else one in PATH, else a fetched one
      --limit     how long a guest may run, instead of what the table says
      --guests    how many guests run at a time, instead of two
      --binary    only this test binary, such as `userfaultfd-kernel`; once for each
      --soak      no tests but the example `soak` for this time, as root; ARGUMENT is for it then
      ARGUMENT    for every test binary: part of the names of the tests to run
";

/// Guests that run at a time if nothing is said: each emulates two processors.
const AT_A_TIME: usize = 2;

/// Seconds that a test may take in a guest, which shares this machine with another one.
const TEST_LIMIT: u64 = 400;

/// Seconds that an act of the soak may take in a guest, and that it may run longer than it is told.
const SOAK_ACT: u64 = 150;
const SOAK_REST: u64 = 900;

/// Bytes that a guest can swap to.
const SWAP: u64 = 256 << 20;

pub(crate) fn run(arguments: &[String]) -> Result<(), String> {
    let options = Options::parse(arguments)?;
    let table = Table::read()?;
    if options.list {
        list(&table);
        return Ok(());
    }
    let folder = tree::scratch().join("kernels");
    fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let guests = prepare(&folder, options.subjects(&table)?, &options, &table)?;
    if options.shell.is_some() {
        return guests.iter().try_for_each(|guest| guest.machine(&folder, &options)?.0.run_here());
    }
    run_all(&folder, &guests, &options)
}

fn list(table: &Table) {
    println!("{:12} {:10} {:>9}  package", "kernel", "machine", "features");
    for kernel in &table.kernel {
        let all = if kernel.only_with_all { " (--all)" } else { "" };
        let features = format!("{:#x}", kernel.features);
        println!("{:12} {:10} {features:>9}  {}{all}", kernel.name, kernel.arch, kernel.packages.join(", "));
    }
}

/// A kernel with everything that it takes to run it.
struct Guest {
    subject: Subject,
    qemu: Qemu,
    kernel: Files,
    busybox: Option<PathBuf>,
    built: Arc<Built>,
}

/// Finds or fetches everything, and builds the binaries. What can't be had is an error before the first guest starts.
fn prepare(
    folder: &Path,
    subjects: Vec<Subject>,
    options: &Options,
    table: &Table,
) -> Result<Vec<Guest>, String> {
    let packages = Packages::new(folder, options, table);
    let mut guests = Vec::new();
    let mut built: BTreeMap<String, Arc<Built>> = BTreeMap::new();
    for subject in subjects {
        let (qemu, kernel) = (packages.qemu(&subject)?, packages.kernel(&subject)?);
        let busybox = options.shell.as_ref().map(|_| packages.busybox(&subject)).transpose()?;
        eprintln!("{:12} {} in {}", subject.name, image::file_name(&kernel.image), qemu.version()?);
        guests.push((subject, qemu, kernel, busybox));
    }
    for (subject, ..) in &guests {
        let target = &subject.arch.target;
        if !built.contains_key(target) {
            eprintln!("building the tests for {target}");
            let wanted = options.soak.is_none().then_some(&options.binaries[..]);
            let mut binaries = binaries::build(&subject.arch, &folder.join("build"), wanted)?;
            if binaries.is_whole {
                binaries.check(&table.short)?;
            }
            binaries.keep(&options.binaries)?;
            built.insert(target.clone(), Arc::new(binaries));
        }
    }
    let guest = |(subject, qemu, kernel, busybox): (Subject, _, _, _)| {
        let built = built.get(&subject.arch.target).map(Arc::clone).ok_or("its binaries weren't built")?;
        Ok(Guest { subject, qemu, kernel, busybox, built })
    };
    guests.into_iter().map(guest).collect()
}

fn run_all(folder: &Path, guests: &[Guest], options: &Options) -> Result<(), String> {
    let features = Features::read()?;
    let work = |guest: &Guest| -> Result<Verdict, String> {
        let (machine, plan) = guest.machine(folder, options)?;
        let limit = Duration::from_secs(guest.limit(options));
        run_guest(folder, guest, &machine, &plan, limit, &features)
    };

    let queue = Mutex::new(guests.iter().enumerate());
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let worker = || {
            loop {
                // The lock is held for this statement alone.
                let Some((i, guest)) = queue.lock().ok().and_then(|mut queue| queue.next()) else { return };
                let start = Instant::now();
                let verdict =
                    work(guest).unwrap_or_else(|e| Verdict { problems: vec![e], ..Verdict::default() });
                let how = if verdict.is_good() { "passed" } else { "FAILED" };
                eprintln!("{:12} {how} in {:.0} s", guest.subject.name, start.elapsed().as_secs_f32());
                if let Ok(mut done) = done.lock() {
                    done.push((i, verdict));
                }
            }
        };
        (0..options.guests.unwrap_or(AT_A_TIME)).for_each(|_| drop(scope.spawn(worker)));
    });
    let mut done = done.into_inner().map_err(|e| e.to_string())?;
    done.sort_by_key(|(i, _)| *i);
    let named = guests.iter().map(|guest| guest.subject.name.clone());
    let guests: Vec<_> = named.zip(done.into_iter().map(|(_, verdict)| verdict)).collect();

    println!("\n{}\nlogs: {}/NAME.log", report::report(&guests), folder.display());
    let failed: Vec<_> = guests.iter().filter(|(_, v)| !v.is_good()).map(|(name, _)| name.as_str()).collect();
    if failed.is_empty() { Ok(()) } else { Err(format!("failed: {}", failed.join(", "))) }
}

impl Guest {
    /// Seconds that it may run.
    fn limit(&self, options: &Options) -> u64 {
        let of_soak = options.soak.map(|seconds| seconds + SOAK_REST);
        options.limit.or(of_soak).unwrap_or(self.subject.arch.limit)
    }

    /// The machine, with its first file system made, and what it must do.
    fn machine(&self, folder: &Path, options: &Options) -> Result<(Machine, Plan), String> {
        let Self { subject, kernel, built, .. } = self;
        let environment = |user| {
            let mut variables = subject.expectation(user).environment();
            variables.push(("USERFAULTFD_EXAMPLES".to_owned(), format!("/{}", image::EXAMPLES)));
            variables.push(("USERFAULTFD_TEST_SECONDS".to_owned(), TEST_LIMIT.to_string()));
            variables
        };
        let in_guest = |folder: &str, name: &str| format!("/{folder}/{name}");
        let binaries = |user| {
            let short = subject.short.as_ref().filter(|_| user == User::Nobody);
            let runs = |test: &&Binary| short.is_none_or(|short| short.contains(&test.name));
            built.tests.iter().filter(runs).map(|test| in_guest(image::TESTS, &test.name)).collect()
        };
        let modules = kernel.modules.iter().map(|path| in_guest(image::MODULES, &image::file_name(path)));
        let own = match options.soak {
            // What a test that passes says is shown, too: that is where it says what it was skipped for.
            None => vec!["--show-output".to_owned()],
            Some(seconds) => ["--seconds", &seconds.to_string(), "--limit", &SOAK_ACT.to_string()]
                .map(str::to_owned)
                .to_vec(),
        };
        let arguments = own.into_iter().chain(options.arguments.iter().cloned());
        let mut passes = [User::Root, User::Nobody]
            .map(|user| Pass { user, binaries: binaries(user), environment: environment(user) })
            .to_vec();
        if options.soak.is_some() {
            passes.truncate(1);
            passes[0].binaries = vec![in_guest(image::EXAMPLES, "soak")];
        }
        let plan = Plan {
            console: subject.arch.console.clone(),
            modules: modules.collect(),
            huge_pages: subject.arch.huge_pages,
            swap: SWAP,
            // One that hangs leaves the others time.
            limit: match options.soak {
                None => self.limit(options) / 3,
                Some(_) => self.limit(options),
            },
            passes,
            arguments: arguments.collect(),
            shell: self.busybox.is_some(),
        };
        let initramfs = folder.join(format!("{}.cpio", subject.name));
        image::write(&initramfs, built, &plan, &kernel.modules, self.busybox.as_deref())?;
        let (qemu, kernel) = (self.qemu.clone(), kernel.image.clone());
        Ok((Machine { qemu, arch: subject.arch.clone(), kernel, initramfs }, plan))
    }
}

/// Runs a guest and judges it.
fn run_guest(
    folder: &Path,
    guest: &Guest,
    machine: &Machine,
    plan: &Plan,
    limit: Duration,
    features: &Features,
) -> Result<Verdict, String> {
    let subject = &guest.subject;
    let console = folder.join(format!("{}.console", subject.name));
    let status = machine.run(&console, limit)?;
    let said = fs::read(&console).map_err(|e| format!("{}: {e}", console.display()))?;
    let log = folder.join(format!("{}.log", subject.name));
    let readable = Transcript::readable(&said);
    fs::write(&log, &readable).map_err(|e| format!("{}: {e}", log.display()))?;

    let transcript = Transcript::read(&said);
    let runs = plan.passes.iter().map(|pass| pass.binaries.len()).sum();
    let whole = guest.built.is_whole;
    let mut verdict = verdict::judge(&transcript, runs, whole, |user| subject.expectation(user), features);
    let problem = match status {
        None => Some(format!("it did not end in {} s and was killed", limit.as_secs())),
        Some(status) if !status.success() => Some(format!("QEMU: {status}")),
        Some(_) if !transcript.has_ended() => Some("it ended early".to_owned()),
        Some(_) => None,
    };
    if let Some(problem) = problem {
        verdict.problems.push(format!("{problem}; its last output:"));
        let lines: Vec<&str> = readable.lines().collect();
        verdict.problems.extend(lines.iter().rev().take(30).rev().map(|line| format!("  {line}")));
    }
    // Made again in no time, and large.
    let _ = fs::remove_file(&machine.initramfs);
    Ok(verdict)
}
