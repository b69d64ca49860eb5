//! libclang, which bindgen loads when it runs: found, or fetched.

use std::env;
use std::path::PathBuf;

use crate::pip;
use crate::tree;

const HELP: &str = "\
libclang, with which the headers are read, is neither installed nor could it be fetched. Any of these helps:
  - install it (Debian, Ubuntu: apt-get install libclang-dev; Fedora: dnf install clang-libs; Arch: pacman -S clang)
  - have `pip` or `python3 -m pip` at hand, which fetches the package `libclang` into target/xtask/libclang
  - set LIBCLANG_PATH to the directory of a libclang.so";

/// The first release that knows every target of Rust: the last addition was loongarch64.
const OLDEST: u32 = 16;

/// Loads libclang into this process, and returns its path: the value of LIBCLANG_PATH for other processes.
///
/// Looks where clang-sys does (LIBCLANG_PATH, llvm-config, the system's folders), then where an earlier call has put
/// it, then fetches it.
pub(crate) fn load() -> Result<PathBuf, String> {
    let unusable = match load_found() {
        Ok(path) => return Ok(path),
        Err(reason) => reason,
    };
    if env::var_os("LIBCLANG_PATH").is_some() {
        return Err(format!("LIBCLANG_PATH is set, but of no use: {unusable}"));
    }
    let folder = tree::scratch().join("libclang");
    let unpacked = folder.join("clang/native");
    if !unpacked.is_dir() {
        // The Python package has nothing but the library in it, for every usual system.
        pip::install(&folder, &["libclang"])
            .map_err(|tried| format!("{HELP}\n\nWhat was tried:{tried}\n\n{unusable}"))?;
    }
    // SAFETY: this process has no other thread yet that could read the environment.
    unsafe { env::set_var("LIBCLANG_PATH", &unpacked) };
    load_found().map_err(|e| format!("{}: {e}", unpacked.display()))
}

fn load_found() -> Result<PathBuf, String> {
    clang_sys::load()?;
    let path = clang_sys::get_library().map(|library| library.path().to_owned()).unwrap_or_default();
    match bindgen::clang_version().parsed {
        Some((major, _)) if major < OLDEST => {
            clang_sys::unload()?;
            Err(format!("{} is of release {major}; it takes {OLDEST}", path.display()))
        }
        _ => Ok(path),
    }
}
