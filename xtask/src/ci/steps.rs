//! The steps.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::step::{Outcome, Step};
use super::{bare, deny, require, servers, targets, test, words};
use crate::command::{self, cargo, execute, output};
use crate::public_api::{self, Checked};
use crate::{bindings, libclang, tree};

/// A header tree that may lie beside the repository. Without it the headers are fetched.
const HEADERS: &str = "../shared/uapi";
const NO_HEADERS: &str = "the headers of the committed bindings' kernel can't be had";

const NO_APT: &str = "there are no apt-get and dpkg here to fetch kernels with; \
    run `cargo xtask kernels --qemu PATH --kernel PATH --features MASK` with a kernel of yours";

/// The oldest nix that the workspace accepts: programs written for userfaultfd 0.9 have it.
const OLDEST_NIX: &str = "0.27.1";

/// What the workspace's manifest says of it.
const ACCEPTED_NIX: &str = "\">=0.27, <0.32\"";

const fn step(name: &'static str, what: &'static str, run: fn() -> Result<Outcome, String>) -> Step {
    Step { name, what, run }
}

/// The tests are last, so that their verdict ends the output.
pub(super) const STEPS: &[Step] = &[
    step("fmt", "formatting", fmt),
    step("clippy", "lints, warnings denied", clippy),
    step("require", "every test begins with `require!`, which limits its time", require::run),
    step("words", "docs have no word that the glossary retires", words::run),
    step("features", "the library without its parts, with each alone, and with the optional ones", features),
    step("doc", "documentation, warnings denied", doc),
    step("docs-rs", "documentation as docs.rs builds it", docs_rs),
    step("api", "the public interface is that of userfaultfd/public-api.txt", public_api),
    step("deny", "licences, duplicates and advisories of dependencies", deny::run),
    step("targets", "every Linux target of this Rust has bindings", targets::run),
    step("bindings", "the committed bindings are those of their kernel's headers", check_bindings),
    step("bindgen", "feature `bindgen`, with the same headers", bindgen),
    step("package", "both crates, as they would be published", package),
    step("bare", "a build without libclang, C compiler and kernel headers", bare::run),
    step("nix", "the library, and programs written for 0.9, with the oldest nix that it accepts", oldest_nix),
    step("benches", "every benchmark, once and unmeasured", benches),
    step("loom", "every interleaving of page states, the SIGBUS table and counters", loom),
    step("soak", "everything at once, for a minute, with every page checked", soak),
    step("model", "random programs, for a minute, against a model of what snapshots must hold", model),
    step("kernels", "the tests on other kernels, in virtual machines", kernels),
    step("test", "the README's test command, skips only for what this machine lacks", test::run),
];

fn passed(result: Result<(), String>) -> Result<Outcome, String> {
    result.map(|()| Outcome::Passed)
}

fn fmt() -> Result<Outcome, String> {
    passed(execute(&mut cargo(&["fmt", "--all", "--check"])))
}

fn clippy() -> Result<Outcome, String> {
    passed(execute(&mut cargo(&["clippy", "--workspace", "--all-targets", "--", "--deny=warnings"])))
}

/// What the library depends on without any of its features.
const CORE: [&str; 5] = ["bitflags", "libc", "nix", "thiserror", "userfaultfd-sys"];

/// The features that are on by default.
const PARTS: [&str; 3] = ["pager", "tracking", "snapshot"];

/// Every part of the library alone, none at all, and the optional ones: those of its manifest, but for `bindgen`, which has
/// a step, and 0.9's names, which do nothing.
fn features() -> Result<Outcome, String> {
    let library = |command: &[&str], features: &str, rest: &[&str]| {
        let features = ["--package=userfaultfd", "--no-default-features", features];
        cargo(&[command, &features, rest].concat())
    };
    let run =
        |command: &[&str], features: &str, rest: &[&str]| execute(&mut library(command, features, rest));
    let tree = ["tree", "--no-default-features", "--edges=normal", "--depth=1", "--prefix=none"];
    let tree = output(&mut cargo(&[&tree[..], &["--package=userfaultfd", "--format={lib}"]].concat()))?;
    let mut core: Vec<String> = tree.lines().skip(1).map(|name| name.trim().replace('_', "-")).collect();
    core.sort();
    if core != CORE {
        return Err(format!("without features the library depends on {}", core.join(", ")));
    }
    for part in [&[""], &PARTS[..]].concat() {
        let features = format!("--features={part}");
        run(&["clippy", "--lib", "--tests"], &features, &["--", "--deny=warnings"])?;
    }
    let mut all = command::features("userfaultfd")?;
    all.retain(|name| name != "bindgen" && !name.starts_with("linux"));
    // The tests of these take all of them, below.
    for feature in all.iter().filter(|name| !PARTS.contains(&name.as_str())) {
        run(&["clippy", "--lib"], &format!("--features={feature}"), &["--", "--deny=warnings"])?;
    }
    test::judge(library(&["test", "--lib", "--test=drop_in"], "--features=", &[]))?;
    let optional = &format!("--features={}", all.join(","));
    run(&["clippy", "--all-targets"], optional, &["--", "--deny=warnings"])?;
    let tests = ["http", "async_uffd", "tokio", "object", "handoff", "guest_memory", "cli"];
    let tests: Vec<_> = tests.iter().flat_map(|test| ["--test", test]).collect();
    let features = ["--package=userfaultfd", "--no-default-features", optional];
    let mut command = cargo(&[&["test"], &tests[..], &features].concat());
    // Without it the test says that it was skipped.
    command.envs(servers::criu().map(|program| ("USERFAULTFD_TEST_CRIU", program)));
    test::judge(command)?;
    // With every way to compress, and with serde.
    let named = ["--test=snapshot", "--test=pager", "--", "chunks::", "convert::", "can_be_serialised"];
    test::judge(cargo(&[&["test"], &features[..], &named].concat()))?;
    let package = ["--package=userfaultfd-examples", "--features=http,tokio,async-io,object-store,handoff"];
    let named = ["from_http", "async_source", "from_s3", "serve_vms", "tokio_loop", "async_io_loop"];
    let built: Vec<_> = named.iter().chain(&["hand_over"]).flat_map(|name| ["--example", name]).collect();
    execute(&mut cargo(&[&["build"], &package[..], &built].concat()))?;
    let mut tests = cargo(&[&["test", "--test=run"], &package[..], &["--"], &named[..]].concat());
    // Without it the test says that it was skipped.
    tests.envs(servers::moto().map(|program| ("USERFAULTFD_TEST_MOTO", program)));
    test::judge(tests)?;
    let named = ["--", "source::zstd::", "handoff::", "trace::", "pager::metrics::"];
    test::judge(library(&["test", "--lib"], optional, &named))
}

fn doc() -> Result<Outcome, String> {
    let mut command = cargo(&["doc", "--workspace", "--no-deps"]);
    passed(execute(command.env("RUSTDOCFLAGS", "--deny=warnings")))
}

fn docs_rs() -> Result<Outcome, String> {
    let packages = ["--package=userfaultfd-sys", "--package=userfaultfd"];
    let mut command = cargo(&[&["doc", "--no-deps", "--all-features"], &packages[..]].concat());
    command.arg("--target-dir").arg(tree::scratch().join("docs-rs"));
    // docs.rs has a nightly compiler, with which documentation says what needs which feature.
    command.env("DOCS_RS", "1").env("RUSTC_BOOTSTRAP", "userfaultfd,userfaultfd_sys");
    passed(execute(command.env("RUSTDOCFLAGS", "--cfg=docsrs --deny=warnings")))
}

fn public_api() -> Result<Outcome, String> {
    match public_api::check()? {
        Checked::Same => Ok(Outcome::Passed),
        Checked::OtherFormat(_) => Ok(Outcome::Skipped("the JSON of this rustdoc is of another version")),
    }
}

/// The headers of the committed bindings' kernel: beside the repository, or fetched. `None` where neither is possible: a
/// mirror that has a newer kernel by now is no failure of the tree.
fn headers() -> Result<Option<PathBuf>, String> {
    let beside = tree::root().join(HEADERS);
    if beside.is_dir() {
        return Ok(Some(beside));
    }
    let fetched = bindings::fetch(&bindings::committed_version()?);
    Ok(fetched.inspect_err(|reason| println!("{reason}")).ok())
}

fn check_bindings() -> Result<Outcome, String> {
    let Some(headers) = headers()? else { return Ok(Outcome::Skipped(NO_HEADERS)) };
    // A process of its own: bindgen panics at times.
    let check = |more: &[&str]| {
        let mut command =
            cargo(&["run", "--quiet", "--package=xtask", "--", "bindings", "--check", "--headers"]);
        execute(command.arg(&headers).args(more))
    };
    check(&[])?;
    // A check that can't fail would prove nothing.
    match check(&["--version", "0.0.0"]) {
        Ok(()) => Err("a VERSION that drifted isn't noticed".to_owned()),
        Err(_) => {
            println!("it fails where VERSION is another, as it must");
            Ok(Outcome::Passed)
        }
    }
}

fn bindgen() -> Result<Outcome, String> {
    let Some(headers) = headers()? else { return Ok(Outcome::Skipped(NO_HEADERS)) };
    let libclang = libclang::load()?;
    let run = |arguments: &[&str]| {
        let mut command = cargo(arguments);
        execute(command.env("LINUX_HEADERS", &headers).env("LIBCLANG_PATH", &libclang))
    };
    run(&["clippy", "--package=userfaultfd", "--features=bindgen", "--", "--deny=warnings"])?;
    run(&["clippy", "--package=userfaultfd-sys", "--features=bindgen", "--", "--deny=warnings"])?;
    passed(run(&["test", "--package=userfaultfd-sys", "--features=bindgen"]))
}

fn package() -> Result<Outcome, String> {
    let mut command = cargo(&["package", "--package=userfaultfd-sys", "--package=userfaultfd"]);
    let changes = output(Command::new("git").args(["status", "--porcelain"]).current_dir(tree::root()));
    if changes.is_ok_and(|changes| !changes.is_empty()) {
        println!("with changes that aren't committed");
        command.arg("--allow-dirty");
    }
    passed(execute(&mut command))
}

fn oldest_nix() -> Result<Outcome, String> {
    // A copy, in which nothing else is accepted: a choice in Cargo.lock would be that of other crates, too, of which one
    // needs a newer nix.
    let copy = tree::scratch().join("oldest-nix");
    let source = copy.join("source");
    tree::remove(&source)?;
    tree::copy(tree::root(), &source)?;
    let run = |arguments: &[&str]| {
        let mut command = cargo(arguments);
        command.current_dir(&source).env("CARGO_TARGET_DIR", copy.join("target"));
        test::judge(command)
    };
    let manifest = source.join("Cargo.toml");
    let text = fs::read_to_string(&manifest).map_err(|error| format!("{}: {error}", manifest.display()))?;
    let oldest = text.replace(ACCEPTED_NIX, &format!("\"={OLDEST_NIX}\""));
    if oldest == text {
        return Err(format!("no nix {ACCEPTED_NIX} in {}", manifest.display()));
    }
    fs::write(&manifest, oldest).map_err(|error| format!("{}: {error}", manifest.display()))?;
    // What has an errno or a process id of nix in it.
    let of_nix = ["error::", "event::", "refusal::", "builder::"];
    run(&[&["test", "--package=userfaultfd", "--lib", "--"], &of_nix[..]].concat())?;
    run(&["test", "--package=userfaultfd", "--test=drop_in"])
}

/// Without `--bench` each benchmark does everything once, with little memory, and measures nothing.
fn benches() -> Result<Outcome, String> {
    passed(execute(&mut cargo(&["test", "--package=userfaultfd", "--benches"])))
}

/// Threads that take turns more often than this find nothing that fewer turns don't, and take minutes.
const PREEMPTIONS: &str = "3";

fn loom() -> Result<Outcome, String> {
    let mut command = cargo(&["test", "--package=userfaultfd", "--lib"]);
    command.arg("--target-dir").arg(tree::scratch().join("loom")).args(["--", "loom_models::"]);
    command.env("RUSTFLAGS", "--cfg=userfaultfd_loom").env("LOOM_MAX_PREEMPTIONS", PREEMPTIONS);
    passed(execute(&mut command))
}

/// The same seed each time, so that a change to the tree is what a failure tells of; `cargo xtask journal` takes others.
fn soak() -> Result<Outcome, String> {
    let run = ["run", "--quiet", "--package=userfaultfd-examples", "--example=soak", "--", "--seconds", "60"];
    passed(execute(cargo(&run).args(["--limit", "60", "--seed", "892230"])))
}

/// Another seed each time, since what it looks for is rare. It says which.
fn model() -> Result<Outcome, String> {
    passed(execute(&mut crate::journal::model(60)))
}

/// The oldest kernel and the newest. All of xtask/kernels.toml take minutes more than a change can wait; `cargo xtask kernels`
/// runs them.
const KERNELS: [&str; 2] = ["5.10", "7.3"];

/// The tests that run on each kernel, until those of the pager, the trackers and snapshots that are new pass there, too.
const ON_EACH_KERNEL: [&str; 4] =
    ["userfaultfd-allocation", "userfaultfd-drop_in", "userfaultfd-kernel", "userfaultfd-sigbus"];

/// Where there is APT, a kernel that can't be had is a failure: a mirror that is away for an hour must not look like
/// kernels that were tested. Elsewhere no change to the tree could make the step pass.
fn kernels() -> Result<Outcome, String> {
    if let Err(reason) = crate::apt::host() {
        println!("{reason}");
        return Ok(Outcome::Skipped(NO_APT));
    }
    let binaries = ON_EACH_KERNEL.iter().flat_map(|binary| ["--binary", *binary]);
    let arguments = ["--short"].into_iter().chain(KERNELS).chain(binaries);
    let arguments: Vec<_> = arguments.map(str::to_owned).collect();
    passed(crate::kernels::run(&arguments))
}
