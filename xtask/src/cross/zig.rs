//! A linker and a C library for every target: zig, and the cargo command that uses it.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::pip;
use crate::tree;

const HELP: &str = "\
a linker for other targets could not be fetched. Have `pip` or `python3 -m pip` at hand, which fetches the packages
`ziglang` and `cargo-zigbuild` into target/xtask/zig";

/// Both, unpacked.
#[derive(Clone, Debug)]
pub(super) struct Zig {
    folder: PathBuf,
}

impl Zig {
    /// Fetches both if an earlier call hasn't.
    pub(super) fn fetch() -> Result<Self, String> {
        let zig = Self { folder: tree::scratch().join("zig") };
        if !zig.cargo_zigbuild().is_file() || !zig.zig().is_file() {
            pip::install(&zig.folder.join("packages"), &["ziglang", "cargo-zigbuild"])
                .map_err(|tried| format!("{HELP}\n\nWhat was tried:{tried}"))?;
        }
        Ok(zig)
    }

    fn packages(&self) -> PathBuf {
        self.folder.join("packages")
    }

    fn zig(&self) -> PathBuf {
        self.packages().join("ziglang/zig")
    }

    fn cargo_zigbuild(&self) -> PathBuf {
        self.packages().join("bin/cargo-zigbuild")
    }

    /// `cargo`, of the subcommands that link.
    pub(super) fn cargo(&self, cargo: &Path) -> Command {
        let mut command = Command::new(self.cargo_zigbuild());
        command.env("CARGO", cargo);
        command.env("CARGO_ZIGBUILD_ZIG_PATH", self.zig());
        command.env("CARGO_ZIGBUILD_CACHE_DIR", self.folder.join("wrappers"));
        command.env("ZIG_GLOBAL_CACHE_DIR", self.folder.join("cache"));
        command.env("ZIG_LOCAL_CACHE_DIR", self.folder.join("cache"));
        command
    }
}
