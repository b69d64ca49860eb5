//! New bindings, from the headers in `LINUX_HEADERS` or from the system's.

use std::env;
use std::path::Path;

use crate::bindings::{Generated, configure, generate};
use crate::headers::Headers;
use crate::names;
use crate::targets::Target;

/// The text of bindings made now. The target may be one without committed bindings.
pub(crate) fn bindings(target: Option<&Target>) -> Result<String, String> {
    println!("cargo::rerun-if-changed=include/wrapper.h");
    println!("cargo::rerun-if-env-changed=LINUX_HEADERS");
    let out = crate::var("OUT_DIR")?;
    let mut builder = configure(Path::new("include/wrapper.h"), Path::new(&out))?
        .parse_callbacks(Box::new(bindgen::CargoCallbacks::new()));
    if let Some(root) = env::var_os("LINUX_HEADERS") {
        let headers = Headers::open(Path::new(&root), Path::new(&out))?;
        builder = builder.detect_include_paths(false).clang_args(place(&headers, target)?);
    }
    let generated = generate(builder)?;
    check_names(&generated)?;
    if let Some(target) = target {
        check_numbers(&generated, target)?;
    }
    Ok(generated.text)
}

/// The architecture's own headers, or asm-generic's where the tree has none of it but its encoding is known.
fn place(headers: &Headers, target: Option<&Target>) -> Result<Vec<String>, String> {
    match target {
        Some(target) if headers.has_arch(target.kernel_arch) => Ok(headers.own(target.kernel_arch)),
        Some(target) if !headers.has_asm() => Ok(headers.generic(target.encoding)),
        _ if headers.has_asm() => Ok(headers.own("")),
        _ => {
            Err("LINUX_HEADERS has no include/asm: install the headers with `make ARCH=… headers_install`"
                .into())
        }
    }
}

/// Code that uses the crate may rely on every name, so bindings of older headers would only move the error to a worse
/// place.
fn check_names(generated: &Generated) -> Result<(), String> {
    let missing = names::missing(&generated.text);
    if missing.is_empty() {
        return Ok(());
    }
    let version = generated.version.as_deref().map(|v| format!(" (Linux {v})")).unwrap_or_default();
    Err(format!(
        "{}{version} lacks names that userfaultfd-sys promises: {}.\n\
         Name newer headers in LINUX_HEADERS, or build without the feature `bindgen`: the committed bindings have all \
         names, and suit older kernels too.",
        generated.header,
        missing.join(", ")
    ))
}

/// ioctl numbers never change, so a difference to the committed ones means headers of another architecture.
fn check_numbers(generated: &Generated, target: &Target) -> Result<(), String> {
    let is_number = |line: &&str| line.starts_with("pub const U") && line.contains(": u32 =");
    let committed = crate::committed(target)?;
    match committed.lines().filter(is_number).find(|line| !generated.text.contains(line)) {
        None => Ok(()),
        Some(line) => Err(format!(
            "{}: the headers of another architecture? {} needs `{line}`",
            generated.header, target.arch
        )),
    }
}
