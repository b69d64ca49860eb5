//! How cargo is run for another target.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use super::rust::{Library, Rust};
use super::zig::Zig;

use crate::tree;

/// What it takes to build for a target.
pub(crate) struct Toolchain {
    target: String,
    rust: Rust,
    library: Library,
    /// With it, static programs can be linked; without, code is checked only.
    zig: Option<Zig>,
}

/// The subcommands of cargo after which programs are linked.
const LINKING: [&str; 3] = ["build", "run", "test"];

impl Toolchain {
    /// Code for the target can be checked.
    pub(super) fn checking(target: &str, rust: &Rust) -> Result<Self, String> {
        let library = rust.library(target)?;
        Ok(Self { target: target.to_owned(), rust: rust.clone(), library, zig: None })
    }

    /// Static programs for the target, of musl, can be built.
    pub(super) fn linking(target: &str, rust: &Rust) -> Result<Self, String> {
        let zig = Zig::fetch()?;
        Ok(Self { zig: Some(zig), ..Self::checking(target, rust)? })
    }

    pub(super) fn library(&self) -> Library {
        self.library
    }

    /// `cargo SUBCOMMAND --target … ARGUMENTS`. The environment decides about the compiler, its flags (none may be
    /// added but by what [`flags`](Self::flags) returns) and the folder of what is built, which is shared.
    pub(crate) fn cargo(&self, subcommand: &str, arguments: &[&str]) -> Command {
        let own = PathBuf::from(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        let mut command = match &self.zig {
            Some(zig) if LINKING.contains(&subcommand) => zig.cargo(&own),
            _ => Command::new(own),
        };
        command.arg(subcommand).args(["--target", &self.target]);
        if self.library == Library::Source {
            command.arg("-Zbuild-std").env("RUSTC_BOOTSTRAP", "1");
        }
        command.args(arguments).current_dir(tree::root());
        command.env("RUSTC", &self.rust.rustc).env("CARGO_TARGET_DIR", self.folder());
        for variable in ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO_ENCODED_RUSTFLAGS"] {
            command.env_remove(variable);
        }
        command.env("RUSTFLAGS", self.flags());
        // Small programs, and a third of the time.
        command.env("CARGO_PROFILE_DEV_DEBUG", "0");
        command
    }

    /// What every rustc of this target gets.
    pub(crate) fn flags(&self) -> OsString {
        // zig has a C library's start files of its own.
        let flags = "-Ctarget-feature=+crt-static -Clink-self-contained=no";
        if self.zig.is_some() { flags.into() } else { OsString::new() }
    }

    fn folder(&self) -> PathBuf {
        tree::scratch().join("cross/build").join(&self.rust.version)
    }
}
