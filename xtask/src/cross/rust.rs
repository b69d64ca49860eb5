//! A compiler with standard libraries for other targets: this machine's, or one of Debian's.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use super::targets::TARGETS;
use crate::apt::{self, Apt};
use crate::command::output;
use crate::tree;

/// The suite whose `rustc-web` is of the workspace's minimum version, and one with a newer one.
const OLDEST: &str = "bookworm";
const NEWER: &str = "trixie";

/// Where a compiler's sysroot has the sources of its standard library.
const SOURCES: &str = "lib/rustlib/src/rust";

pub(crate) const HELP: &str = "rustup component add rust-src";

/// A compiler.
#[derive(Clone)]
pub(crate) struct Rust {
    /// For instance `1.85.0`.
    pub(crate) version: String,
    pub(crate) rustc: PathBuf,
    /// Why it is this one, for readers.
    pub(crate) origin: String,
    sysroot: PathBuf,
    /// Where there is more for it.
    debian: Option<Rc<Debian>>,
}

/// How a target's standard library can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Library {
    Prebuilt,
    Source,
}

impl Rust {
    /// The compiler that the workspace promises to build with.
    pub(super) fn oldest() -> Result<Self, String> {
        let rust = Debian::new(OLDEST)?.compiler()?;
        let promised = promised()?;
        let is_it = rust.version.strip_prefix(&promised).is_some_and(|rest| rest.starts_with('.'));
        if is_it {
            Ok(rust)
        } else {
            Err(format!("Debian's compiler in {OLDEST} is {}, not the promised {promised}", rust.version))
        }
    }

    /// The installed compiler, if there are sources for it: its own or Debian's of that version; a compiler of
    /// Debian's otherwise.
    pub(crate) fn current() -> Result<Self, String> {
        let installed = PathBuf::from(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
        let version = version(&installed)?;
        let sysroot = output(Command::new(&installed).args(["--print", "sysroot"]))?;
        let sysroot = PathBuf::from(sysroot.trim());
        if is_library(&sysroot.join(SOURCES)) {
            let origin = "installed, with its rust-src".to_owned();
            return Ok(Self { version, rustc: installed, origin, sysroot, debian: None });
        }
        let missing = format!("Rust {version} is installed without its sources (what helps: {HELP})");
        let debian = Debian::new(NEWER).map_err(|reason| format!("{missing}, and {reason}"))?;
        if let Some(sources) = debian.sources(&version) {
            let rustlib = sysroot.join("lib/rustlib");
            let (rustc, sysroot) =
                assemble(&format!("installed-{version}"), &[&installed], &rustlib, Some(&sources))?;
            let origin = "installed, with Debian's sources of it".to_owned();
            return Ok(Self { version, rustc, origin, sysroot, debian: None });
        }
        let mut rust = debian.compiler().map_err(|reason| format!("{missing}, and {reason}"))?;
        rust.origin += &format!(": {missing}, and Debian's {NEWER} has no rust-src of that version");
        Ok(rust)
    }

    /// Whether standard libraries can be built.
    pub(crate) fn has_sources(&self) -> bool {
        is_library(&self.sysroot.join(SOURCES))
    }

    /// Makes sure that the standard library of a target is there, or can be built.
    pub(super) fn library(&self, target: &str) -> Result<Library, String> {
        let place = self.sysroot.join("lib/rustlib").join(target);
        if place.join("lib").is_dir() {
            return Ok(Library::Prebuilt);
        }
        let mut tried = String::new();
        let arch = TARGETS.iter().find(|known| known.name == target).and_then(|known| known.debian);
        if let (Some(debian), Some(arch)) = (&self.debian, arch) {
            match debian.library(arch, target) {
                Ok(library) => {
                    link(&library, &place)?;
                    return Ok(Library::Prebuilt);
                }
                Err(reason) => tried = format!(" ({reason})"),
            }
        }
        if self.has_sources() {
            return Ok(Library::Source);
        }
        Err(format!("Rust {} has no standard library for {target}, nor sources: {HELP}{tried}", self.version))
    }
}

/// The minimum version that Cargo.toml promises.
fn promised() -> Result<String, String> {
    let file = tree::root().join("Cargo.toml");
    let text = fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    let value = text.lines().find_map(|line| line.strip_prefix("rust-version = "));
    value.map(|value| value.trim_matches('"').to_owned()).ok_or("Cargo.toml has no rust-version".to_owned())
}

fn version(rustc: &Path) -> Result<String, String> {
    let text = output(Command::new(rustc).arg("--version"))?;
    parse_version(&text).ok_or(format!("{} says that it is {text}", rustc.display()))
}

/// The number in `rustc 1.85.0 (4d91de4e4 2025-02-17)`.
fn parse_version(text: &str) -> Option<String> {
    text.strip_prefix("rustc ")?.split_whitespace().next().map(str::to_owned)
}

fn is_library(sources: &Path) -> bool {
    sources.join("library/Cargo.toml").is_file()
}

/// A suite's packages of Rust.
struct Debian {
    suite: &'static str,
    folder: PathBuf,
    host: Apt,
    /// Of other architectures, as they are asked for.
    others: RefCell<BTreeMap<&'static str, Rc<Apt>>>,
}

impl Debian {
    fn new(suite: &'static str) -> Result<Rc<Self>, String> {
        let folder = tree::scratch().join("cross/apt").join(suite);
        let arch = apt::host()?;
        let host = Apt::open(folder.join(&arch), &[suite], &arch)?;
        Ok(Rc::new(Self { suite, folder, host, others: RefCell::default() }))
    }

    /// The sources of a version.
    fn sources(&self, version: &str) -> Option<PathBuf> {
        ["rust-web-src", "rust-src"].iter().find_map(|name| {
            let package = self.host.version(name, &format!("{version}+")).ok()?;
            let tree = self.host.packages(&[format!("{name}={package}")], &[""]).ok()?;
            Some(tree.join("usr").join(SOURCES)).filter(|sources| is_library(sources))
        })
    }

    /// The compiler with its sources, as a program that runs with the libraries of its own suite.
    fn compiler(self: &Rc<Self>) -> Result<Rust, String> {
        let tree = self.host.with_dependencies(&["rustc-web", "rust-web-src"])?;
        let folders = ["usr/lib", "lib"].map(|folder| tree.join(folder));
        let libraries: Vec<_> = folders.iter().flat_map(|folder| entries(folder, "-linux-gnu")).collect();
        // Not the loader of the machine: its libraries may be older than what this takes.
        let loaders = [tree.join("lib64"), tree.join("usr/lib64")];
        let loader = libraries.iter().chain(&loaders).find_map(|folder| entries(folder, "ld-linux").pop());
        let loader = loader.ok_or(format!("{} has no dynamic linker", tree.display()))?;
        let path = std::env::join_paths(&libraries).map_err(|e| format!("{}: {e}", tree.display()))?;
        let words = [&loader, Path::new("--library-path"), Path::new(&path), &tree.join("usr/bin/rustc")];
        let (rustc, sysroot) =
            assemble(&format!("debian-{}", self.suite), &words, &tree.join("usr/lib/rustlib"), None)?;
        let version = version(&rustc)?;
        let origin = format!("Debian's, of {}", self.suite);
        Ok(Rust { version, rustc, origin, sysroot, debian: Some(Rc::clone(self)) })
    }

    /// The prebuilt standard library of another architecture.
    fn library(&self, arch: &'static str, target: &str) -> Result<PathBuf, String> {
        let known = self.others.borrow().get(arch).cloned();
        let apt = match known {
            Some(apt) => apt,
            None => {
                let apt = Rc::new(Apt::open(self.folder.join(arch), &[self.suite], arch)?);
                self.others.borrow_mut().insert(arch, Rc::clone(&apt));
                apt
            }
        };
        let tree = apt.packages(&["libstd-rust-web-dev".to_owned()], &[""])?;
        let library = tree.join("usr/lib/rustlib").join(target);
        if library.is_dir() { Ok(library) } else { Err(format!("{} has no {target}", tree.display())) }
    }
}

/// The paths in a folder whose names contain `part`.
fn entries(folder: &Path, part: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let named = entries.filter(|entry| entry.file_name().to_string_lossy().contains(part));
    named.map(|entry| entry.path()).collect()
}

/// A sysroot made of links to what `rustlib` and `sources` have, and a program that runs the compiler `words` in it.
fn assemble(
    name: &str,
    words: &[&Path],
    rustlib: &Path,
    sources: Option<&Path>,
) -> Result<(PathBuf, PathBuf), String> {
    let folder = tree::scratch().join("cross/rust").join(name);
    let sysroot = folder.join("sysroot");
    let links = sysroot.join("lib/rustlib");
    create(&links)?;
    for entry in entries(rustlib, "") {
        link(&entry, &links.join(entry.file_name().unwrap_or_default()))?;
    }
    if let Some(sources) = sources {
        create(&links.join("src"))?;
        link(sources, &sysroot.join(SOURCES))?;
    }
    let words: Vec<_> = words.iter().map(|word| quoted(&word.to_string_lossy())).collect();
    let sysroot_word = quoted(&sysroot.to_string_lossy());
    let script = format!("#!/bin/sh\nexec {} --sysroot {sysroot_word} \"$@\"\n", words.join(" "));
    let rustc = folder.join("rustc");
    // Cargo builds everything anew after a change of the file.
    if fs::read_to_string(&rustc).ok().as_deref() != Some(&script) {
        fs::write(&rustc, script).map_err(|e| format!("{}: {e}", rustc.display()))?;
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&rustc, mode).map_err(|e| format!("{}: {e}", rustc.display()))?;
    }
    Ok((rustc, sysroot))
}

/// A word of a shell's.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn create(folder: &Path) -> Result<(), String> {
    fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))
}

/// Makes or renews a link.
fn link(to: &Path, at: &Path) -> Result<(), String> {
    if fs::read_link(at).is_ok_and(|known| known == to) {
        return Ok(());
    }
    let _ = fs::remove_file(at);
    symlink(to, at).map_err(|e| format!("{}: {e}", at.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(parse_version("rustc 1.85.0 (4d91de4e4 2025-02-17)").as_deref(), Some("1.85.0"));
        assert_eq!(parse_version("rustc 1.97.0-nightly\n").as_deref(), Some("1.97.0-nightly"));
        assert_eq!(parse_version("cargo 1.85.0"), None);
        assert_eq!(promised().unwrap(), env!("CARGO_PKG_RUST_VERSION"));
    }

    #[test]
    fn words_are_words_to_a_shell() {
        for word in ["a b", "it's", "$HOME `x` \\"] {
            let script = format!("printf %s {}", quoted(word));
            assert_eq!(output(Command::new("sh").args(["-c", &script])).unwrap(), word);
        }
    }
}
