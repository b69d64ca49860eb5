//! Writes `OUT_DIR/bindings.rs`: the committed bindings of the target or, with the feature `bindgen`, new ones.

#[cfg_attr(
    not(feature = "bindgen"),
    expect(dead_code, reason = "only bindgen needs clang's and the kernel's names")
)]
mod targets;

use std::path::Path;
use std::{env, fs};

use targets::{TARGETS, Target};

fn main() {
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=src/bindings");
    println!("cargo::rustc-check-cfg=cfg(no_bindings)");
    let text = bindings();
    let out = Path::new(&var("OUT_DIR")).join("bindings.rs");
    fs::write(&out, text).unwrap_or_else(|e| panic!("cannot write {}: {e}", out.display()));
}

fn bindings() -> String {
    let (os, arch, width) =
        (var("CARGO_CFG_TARGET_OS"), var("CARGO_CFG_TARGET_ARCH"), var("CARGO_CFG_TARGET_POINTER_WIDTH"));
    let linux = matches!(os.as_str(), "linux" | "android");
    let target = TARGETS.iter().find(|t| linux && t.arch == arch && t.pointer_width.to_string() == width);
    match target {
        Some(target) => committed(target),
        None => unsupported(&format!("{arch} ({width} bits, {os})")),
    }
}

fn committed(target: &Target) -> String {
    let path = Path::new("src/bindings").join(target.encoding.file());
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()));
    text + &syscall(target)
}

fn syscall(target: &Target) -> String {
    format!(
        "/// Number of the system call `userfaultfd(flags)`, which C libraries don't wrap.\n\
         pub const SYS_userfaultfd: ::core::ffi::c_long = {};\n",
        target.syscall
    )
}

/// An error of the crate itself, so that it reads like one, and is reported by `cargo check` where it belongs.
fn unsupported(target: &str) -> String {
    println!("cargo::rustc-cfg=no_bindings");
    let message = format!("userfaultfd-sys has no bindings for {target}");
    format!("compile_error!({message:?});\n")
}

fn var(name: &str) -> String {
    env::var(name).unwrap_or_else(|e| panic!("{name}: {e}"))
}
