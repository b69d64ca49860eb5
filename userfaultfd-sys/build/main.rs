//! Writes `OUT_DIR/bindings.rs`: the committed bindings of the target or, with the feature `bindgen`, new ones.

#[cfg(feature = "bindgen")]
mod bindings;
#[cfg(feature = "bindgen")]
mod generated;
#[cfg(feature = "bindgen")]
#[expect(dead_code, reason = "xtask needs more of it than a build does")]
mod headers;
#[cfg(feature = "bindgen")]
mod names;
#[expect(dead_code, reason = "xtask needs more of it than a build does")]
mod targets;

use std::path::Path;
use std::process::ExitCode;
use std::{env, fs};

use targets::{TARGETS, Target};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=src/bindings");
    println!("cargo::rustc-check-cfg=cfg(no_bindings)");

    let os = var("CARGO_CFG_TARGET_OS")?;
    let arch = var("CARGO_CFG_TARGET_ARCH")?;
    let width = var("CARGO_CFG_TARGET_POINTER_WIDTH")?;
    let target = TARGETS.iter().find(|t| t.arch == arch && t.pointer_width.to_string() == width);

    let text = if !matches!(os.as_str(), "linux" | "android") {
        unsupported(&format!(
            "userfaultfd is an interface of Linux, and this target's system is {os}. Depend on this crate below \
             [target.'cfg(any(target_os = \"linux\", target_os = \"android\"))'.dependencies] only."
        ))
    } else {
        match bindings(target)? {
            Some(bindings) => bindings + &target.map(syscall).unwrap_or_default(),
            None => unsupported(&format!(
                "userfaultfd-sys has no committed bindings for {arch} with {width}-bit pointers. Enable its feature \
                 `bindgen` (which needs libclang) and name the kernel's headers for that architecture in the \
                 environment variable LINUX_HEADERS; or add the architecture to build/targets.rs."
            )),
        }
    };
    let out = Path::new(&var("OUT_DIR")?).join("bindings.rs");
    fs::write(&out, text).map_err(|e| format!("{}: {e}", out.display()))
}

/// New bindings. docs.rs builds with all features and has headers of some kernel or other, so it gets the committed ones.
#[cfg(feature = "bindgen")]
fn bindings(target: Option<&Target>) -> Result<Option<String>, String> {
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    match env::var_os("DOCS_RS") {
        Some(_) => target.map(committed).transpose(),
        None => generated::bindings(target).map(Some),
    }
}

#[cfg(not(feature = "bindgen"))]
fn bindings(target: Option<&Target>) -> Result<Option<String>, String> {
    target.map(committed).transpose()
}

/// The text of the committed bindings.
fn committed(target: &Target) -> Result<String, String> {
    let path = Path::new("src/bindings").join(target.encoding.file());
    fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))
}

/// Not in the bindings themselves: their text is the same for many targets.
fn syscall(target: &Target) -> String {
    format!(
        "/// Number of the system call `userfaultfd(flags)`, which C libraries don't wrap.\n\
         pub const SYS_userfaultfd: ::core::ffi::c_long = {};\n",
        target.syscall
    )
}

/// An error of the crate, not of its build script, so that it is all that the user sees.
fn unsupported(message: &str) -> String {
    println!("cargo::rustc-cfg=no_bindings");
    format!("compile_error!({message:?});\n")
}

fn var(name: &str) -> Result<String, String> {
    env::var(name).map_err(|e| format!("{name}: {e}"))
}
