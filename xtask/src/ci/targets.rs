//! The table of targets against the compiler's own list.

use std::env;
use std::process::Command;

use super::step::Outcome;
use crate::command::output;
use crate::sys::targets::TARGETS;

/// Its target is WALI: WebAssembly with system calls that aren't the kernel's.
const NOT_THE_KERNEL: &str = "wasm32";

pub(super) fn run() -> Result<Outcome, String> {
    let rustc = || Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let list = output(rustc().args(["--print", "target-list"]))?;
    let (mut known, mut unknown) = (0, Vec::new());
    for triple in list.lines() {
        // Half of the list, which saves as many processes; a target of Linux is always called so.
        if !triple.contains("linux") && !triple.contains("android") {
            continue;
        }
        let cfg = output(rustc().args(["--print", "cfg", "--target", triple]))?;
        let value = |name: &str| {
            let lines = cfg.lines().filter_map(|line| line.split_once('='));
            lines.into_iter().find(|(key, _)| *key == name).map_or("", |(_, value)| value.trim_matches('"'))
        };
        if !matches!(value("target_os"), "linux" | "android") || value("target_arch") == NOT_THE_KERNEL {
            continue;
        }
        let width = value("target_pointer_width");
        if TARGETS.iter().any(|t| t.arch == value("target_arch") && t.pointer_width.to_string() == width) {
            known += 1;
        } else {
            unknown.push(triple);
        }
    }
    println!("{known} targets have bindings");
    if unknown.is_empty() {
        return Ok(Outcome::Passed);
    }
    Err(format!("userfaultfd-sys/build/targets.rs doesn't know {}", unknown.join(", ")))
}
