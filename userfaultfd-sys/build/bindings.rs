//! The one bindgen configuration. The build script uses it with the feature `bindgen`, `cargo xtask bindings` for the
//! committed files.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;

use bindgen::callbacks::{DeriveTrait, ImplementsTrait, IntKind, MacroParsingBehavior, ParseCallbacks};

/// How the names of the constants to bind begin.
const CONSTANTS: &[&str] = &["UFFD", "_UFFDIO_", "USERFAULTFD_IOC", "PAGEMAP_SCAN", "PAGE_IS_", "PM_SCAN_"];

/// The types to bind: regular expressions.
const TYPES: &[&str] = &["uffd.*", "page_region", "pm_scan_arg"];

/// What came out of a set of headers.
#[derive(Debug)]
pub(crate) struct Generated {
    pub(crate) text: String,
    /// The `linux/userfaultfd.h` that was found.
    pub(crate) header: String,
    /// The release that the headers say they are of, if they have a `linux/version.h`.
    pub(crate) version: Option<String>,
}

/// Everything but the place of the headers, which the caller adds. `scratch` is a directory for temporary files.
pub(crate) fn configure(wrapper: &Path, scratch: &Path) -> Result<bindgen::Builder, String> {
    let utf8 = wrapper.to_str().ok_or_else(|| format!("{}: clang needs UTF-8", wrapper.display()))?;
    let mut builder = bindgen::Builder::default()
        .header(utf8)
        // bindgen's own evaluator drops every macro with a cast or a sizeof: all ioctl numbers, UFFD_API, the modes.
        // The fallback evaluates `wrapper`, which therefore must be a file and must define _IOWR.
        .clang_macro_fallback()
        .clang_macro_fallback_build_dir(scratch)
        // `unsigned long` on some 64-bit architectures; types.rs has the widths.
        .blocklist_type("__[us](8|16|32|64)")
        .derive_default(true)
        // They contain alignments, which differ on 32-bit targets: layout.rs has what holds on all.
        .layout_tests(false)
        // The headers' prose stays theirs.
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
    Ok(builder)
}

/// Runs bindgen, and fails where it would silently leave something out.
pub(crate) fn generate(builder: bindgen::Builder) -> Result<Generated, String> {
    let observer = Observer::default();
    let bindings =
        builder.parse_callbacks(Box::new(observer.clone())).generate().map_err(|e| e.to_string())?;
    let text = bindings.to_string();
    let seen = observer.0.take();
    let lost: Vec<_> =
        seen.constants.into_iter().filter(|name| !text.contains(&format!("pub const {name}:"))).collect();
    if !lost.is_empty() {
        return Err(format!("{}: clang cannot evaluate {}", seen.header, lost.join(", ")));
    }
    Ok(Generated { text, header: seen.header, version: seen.version })
}

/// Gives the constants their types, and notes what bindgen meets.
#[derive(Clone, Debug, Default)]
struct Observer(Rc<RefCell<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    constants: BTreeSet<String>,
    header: String,
    version: Option<String>,
}

impl ParseCallbacks for Observer {
    fn include_file(&self, path: &str) {
        if path.ends_with("/linux/userfaultfd.h") {
            self.0.borrow_mut().header = path.to_owned();
        }
    }

    fn will_parse_macro(&self, name: &str) -> MacroParsingBehavior {
        if CONSTANTS.iter().any(|prefix| name.starts_with(prefix)) {
            self.0.borrow_mut().constants.insert(name.to_owned());
        } else if name != "LINUX_VERSION_CODE" {
            return MacroParsingBehavior::Ignore;
        }
        MacroParsingBehavior::Default
    }

    fn func_macro(&self, name: &str, _value: &[&[u8]]) {
        let name = name.split('(').next().unwrap_or(name);
        self.0.borrow_mut().constants.remove(name);
    }

    fn int_macro(&self, name: &str, value: i64) -> Option<IntKind> {
        Some(match name {
            "LINUX_VERSION_CODE" => {
                let version = format!("{}.{}.{}", value >> 16, value >> 8 & 0xff, value & 0xff);
                self.0.borrow_mut().version = Some(version);
                return None;
            }
            "UFFDIO" => IntKind::U8,
            "UFFD_USER_MODE_ONLY" | "PAGEMAP_SCAN" => IntKind::U32,
            _ if name.starts_with("USERFAULTFD_IOC") => IntKind::U32,
            _ if name.starts_with("UFFD_EVENT_") => IntKind::U8,
            _ if name.starts_with("UFFDIO_") && !name.contains("_MODE_") => IntKind::U32,
            _ => IntKind::U64,
        })
    }

    fn blocklisted_type_implements_trait(&self, _name: &str, _trait: DeriveTrait) -> Option<ImplementsTrait> {
        Some(ImplementsTrait::Yes) // they are integers
    }
}
