//! Where the headers lie in a tree that the caller names.

use std::fs;
use std::path::{Path, PathBuf};

use super::targets::Encoding;

/// A tree of kernel headers, in one of three shapes:
///
/// - what `make headers_install INSTALL_HDR_PATH=DIR` makes: `include/{linux,asm-generic,asm}`, one architecture;
/// - the same for many architectures: `include/{linux,asm-generic}`, `arch/ARCH/asm`;
/// - a kernel source tree: `include/uapi/{linux,asm-generic}`, `arch/ARCH/include/uapi/asm`.
#[derive(Debug)]
pub(crate) struct Headers {
    root: PathBuf,
    include: PathBuf,
    /// What `make headers_install` would have added: see `supplement`.
    supplement: PathBuf,
}

impl Headers {
    /// `scratch` is a directory for files that a tree may lack.
    pub(crate) fn open(root: &Path, scratch: &Path) -> Result<Headers, String> {
        let candidates = [root.join("include/uapi"), root.join("include")];
        let Some(include) = candidates.into_iter().find(|dir| dir.join("linux/userfaultfd.h").is_file())
        else {
            return Err(format!(
                "{}: no include/linux/userfaultfd.h and no include/uapi/linux/userfaultfd.h; \
                 give the INSTALL_HDR_PATH of `make headers_install`, or a kernel source tree",
                root.display()
            ));
        };
        let supplement = scratch.join("supplement");
        supply(&include, &supplement).map_err(|e| format!("{}: {e}", supplement.display()))?;
        Ok(Headers { root: root.to_owned(), include, supplement })
    }

    /// The folders with the own `asm/` of an architecture, if the tree has one and says whose it is.
    fn arch(&self, kernel_arch: &str) -> Vec<PathBuf> {
        let arch = self.root.join("arch").join(kernel_arch);
        let folders = [arch.clone(), arch.join("include/uapi"), arch.join("include/generated/uapi")];
        folders.into_iter().filter(|folder| folder.join("asm").is_dir()).collect()
    }

    /// Whether the tree has an `asm/` of this architecture of its own.
    pub(crate) fn has_arch(&self, kernel_arch: &str) -> bool {
        !self.arch(kernel_arch).is_empty()
    }

    /// Whether its `asm/unistd.h` is complete: in a source tree the numbers aren't made yet.
    pub(crate) fn has_syscalls(&self, kernel_arch: &str) -> bool {
        self.root.join("arch").join(kernel_arch).join("asm/unistd.h").is_file()
    }

    /// Arguments for clang: the headers as this architecture sees them. What an unprepared source tree lacks of them
    /// is what Kbuild makes: an `asm/x.h` that includes `asm-generic/x.h`.
    pub(crate) fn own(&self, kernel_arch: &str) -> Vec<String> {
        let mut folders = self.arch(kernel_arch);
        folders.push(self.include.clone());
        folders.push(self.supplement.clone());
        arguments(&folders)
    }

    /// Arguments for clang: no architecture's headers, only asm-generic's with the given encoding.
    pub(crate) fn generic(&self, encoding: Encoding) -> Vec<String> {
        let mut arguments = arguments(&[self.supplement.clone(), self.include.clone()]);
        if encoding == Encoding::MipsPowerpcSparc {
            let bits =
                ["_IOC_SIZEBITS=13", "_IOC_DIRBITS=3", "_IOC_NONE=1U", "_IOC_READ=2U", "_IOC_WRITE=4U"];
            arguments.extend(bits.map(|bits| format!("-D{bits}")));
        }
        arguments
    }

    /// Whether `include/asm` is there, of an architecture that the tree doesn't name.
    pub(crate) fn has_asm(&self) -> bool {
        self.include.join("asm").is_dir()
    }
}

fn arguments(folders: &[PathBuf]) -> Vec<String> {
    let mut arguments = vec!["-nostdinc".to_owned()];
    // What `make headers_install` removes or spells out.
    let installed = ["__user=", "__force=", "__packed=__attribute__((packed))", "__EXPORTED_HEADERS__"];
    arguments.extend(installed.map(|macro_| format!("-D{macro_}")));
    arguments.extend(folders.iter().map(|folder| format!("-isystem{}", folder.display())));
    arguments
}

/// Makes an `asm/x.h` for every `asm-generic/x.h`, and empty ones for the headers of the kernel's own that UAPI headers
/// include in a source tree.
fn supply(include: &Path, supplement: &Path) -> std::io::Result<()> {
    fs::create_dir_all(supplement.join("asm"))?;
    for entry in fs::read_dir(include.join("asm-generic"))? {
        let name = entry?.file_name();
        let wrapper = format!("#include <asm-generic/{}>\n", name.to_string_lossy());
        fs::write(supplement.join("asm").join(&name), wrapper)?;
    }
    fs::create_dir_all(supplement.join("linux"))?;
    for name in ["compiler.h", "compiler_types.h"] {
        fs::write(supplement.join("linux").join(name), "")?;
    }
    Ok(())
}
