//! The one bindgen configuration: the build script uses it with the feature `bindgen`, `cargo xtask bindings` for the
//! committed files.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;

use bindgen::callbacks::{DeriveTrait, ImplementsTrait, IntKind, MacroParsingBehavior, ParseCallbacks};

/// Beginnings of the names of constants to bind.
const CONSTANTS: &[&str] = &["UFFD", "_UFFDIO_", "USERFAULTFD_IOC", "PAGEMAP_SCAN", "PAGE_IS_", "PM_SCAN_"];

/// Regular expressions of the types to bind.
const TYPES: &[&str] = &["uffd.*", "page_region", "pm_scan_arg"];

/// Turns `wrapper` into Rust. `clang_args` say where the headers are, `scratch` is a directory for temporary files.
pub(crate) fn generate(wrapper: &Path, clang_args: &[String], scratch: &Path) -> Result<String, String> {
    let constants = Constants::default();
    let mut builder = bindgen::Builder::default()
        .header(utf8(wrapper)?)
        .clang_args(clang_args)
        // bindgen's own evaluator drops every macro with a cast or a sizeof: all ioctl numbers, UFFD_API, the modes.
        // The fallback evaluates `wrapper`, which therefore must be a file and must define _IOWR.
        .clang_macro_fallback()
        .clang_macro_fallback_build_dir(scratch)
        .parse_callbacks(Box::new(constants.clone()))
        // `unsigned long long` or `unsigned long`, depending on the architecture: lib.rs has them as u64 everywhere.
        .blocklist_type("__[us](8|16|32|64)")
        .derive_default(true)
        // Alignments differ on 32-bit targets: layout.rs has the checks that hold on all.
        .layout_tests(false)
        .generate_comments(false)
        .disable_header_comment()
        .use_core()
        .rust_target(env!("CARGO_PKG_RUST_VERSION").parse().map_err(|e| format!("rust-version: {e}"))?)
        .rust_edition(bindgen::RustEdition::Edition2024)
        .formatter(bindgen::Formatter::Prettyplease);
    for prefix in CONSTANTS {
        builder = builder.allowlist_var(format!("{prefix}.*"));
    }
    for pattern in TYPES {
        builder = builder.allowlist_type(pattern);
    }
    let text = builder.generate().map_err(|e| e.to_string())?.to_string();
    constants.check(&text)?;
    Ok(text)
}

fn utf8(path: &Path) -> Result<&str, String> {
    path.to_str().ok_or_else(|| format!("not UTF-8, which clang needs: {}", path.display()))
}

/// Gives constants their types, and notices those that bindgen meets but can't evaluate: it drops them silently.
#[derive(Clone, Debug, Default)]
struct Constants {
    met: Rc<RefCell<BTreeSet<String>>>,
}

impl Constants {
    fn check(&self, text: &str) -> Result<(), String> {
        let met = self.met.borrow();
        let lost: Vec<_> =
            met.iter().filter(|name| !text.contains(&format!("pub const {name}:"))).map(String::as_str).collect();
        if lost.is_empty() { Ok(()) } else { Err(format!("clang could not evaluate {}", lost.join(", "))) }
    }
}

impl ParseCallbacks for Constants {
    fn will_parse_macro(&self, name: &str) -> MacroParsingBehavior {
        if !CONSTANTS.iter().any(|prefix| name.starts_with(prefix)) {
            return MacroParsingBehavior::Ignore;
        }
        self.met.borrow_mut().insert(name.to_owned());
        MacroParsingBehavior::Default
    }

    fn int_macro(&self, name: &str, _value: i64) -> Option<IntKind> {
        Some(match name {
            "UFFDIO" | "USERFAULTFD_IOC" => IntKind::U8,
            "UFFD_USER_MODE_ONLY" | "USERFAULTFD_IOC_NEW" | "PAGEMAP_SCAN" => IntKind::U32,
            _ if name.starts_with("UFFD_EVENT_") => IntKind::U8,
            _ if name.starts_with("UFFDIO_") && !name.contains("_MODE_") => IntKind::U32,
            _ => IntKind::U64,
        })
    }

    fn blocklisted_type_implements_trait(&self, _name: &str, _trait: DeriveTrait) -> Option<ImplementsTrait> {
        Some(ImplementsTrait::Yes) // they are integers
    }
}
