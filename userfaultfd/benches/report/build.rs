//! Programs that are built otherwise than this one, to be compared with.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::options::Options;

/// Where the report leaves what it makes.
pub(crate) fn folder() -> PathBuf {
    // Of the target directory, cargo tells the folder `tmp`.
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    target.parent().unwrap_or(target).join("report")
}

fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // What cargo has set for this program isn't meant for another.
    for name in ["CARGO_TARGET_DIR", "CARGO_ENCODED_RUSTFLAGS"] {
        command.env_remove(name);
    }
    command
}

fn manifest() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// How those programs are built: as this one is. Only a run that measures takes the time to have them optimized.
fn profile(options: &Options) -> (&'static str, &'static str) {
    if options.test { ("dev", "debug") } else { ("release", "release") }
}

/// The program with userfaultfd 0.9, built. `Err`: what is missing.
pub(crate) fn upstream(options: &Options) -> Result<PathBuf, String> {
    let (profile, of_profile) = profile(options);
    let target = folder().join("upstream");
    let build = |libclang: Option<&str>| {
        let mut command = cargo();
        command.args(["build", "--profile", profile, "--quiet", "--manifest-path"]);
        command.arg(manifest().join("benches/upstream/Cargo.toml")).arg("--target-dir").arg(&target);
        if let Some(folder) = libclang {
            command.env("LIBCLANG_PATH", folder);
        }
        output(&mut command).map(drop)
    };
    // Where libclang isn't installed, xtask knows how to get it.
    build(None).or_else(|_| {
        let mut xtask = cargo();
        xtask.args(["run", "--quiet", "--package", "xtask", "--", "libclang"]).current_dir(manifest());
        build(Some(output(&mut xtask)?.trim()))
    })?;
    Ok(target.join(of_profile).join("userfaultfd-upstream-bench"))
}

/// How the library is built to see what a part of it costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Variant {
    /// As users get it.
    Usual,
    /// With the feature `tracing`, and no subscriber.
    Tracing,
    /// With nothing counted.
    Uncounted,
}

/// The program with the contenders, built in a way. `Err`: what is missing.
pub(crate) fn variant(variant: Variant, options: &Options) -> Result<PathBuf, String> {
    let (profile, of_profile) = profile(options);
    let target = folder().join(format!("{variant:?}").to_lowercase());
    let mut command = cargo();
    command.args(["build", "--profile", profile, "--quiet", "--manifest-path"]);
    command.arg(manifest().join("benches/variant/Cargo.toml")).arg("--target-dir").arg(&target);
    match variant {
        Variant::Usual => {}
        Variant::Tracing => {
            command.arg("--features=tracing");
        }
        Variant::Uncounted => {
            let flags = env::var("RUSTFLAGS").unwrap_or_default();
            command.env("RUSTFLAGS", format!("{flags} --cfg userfaultfd_uncounted"));
        }
    }
    output(&mut command)?;
    Ok(target.join(of_profile).join("userfaultfd-variant-bench"))
}

/// What a command printed. `Err`: what it complained of.
fn output(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let told: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).take(6).collect();
    Err(told.join("\n"))
}
