//! What a run needs and this machine may not have: QEMU, kernels, a shell.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::qemu::Qemu;
use super::table::Table;
use super::{Options, Source, Subject};
use crate::apt::Apt;

const KERNEL_HELP: &str = "give a kernel image with --kernel";

/// Where packages are from.
pub(super) struct Packages {
    /// Why there are none, on a machine that can't fetch any.
    apt: Result<Apt, String>,
    qemu: Option<PathBuf>,
    suites: Vec<String>,
}

/// A kernel and its modules.
pub(super) struct Files {
    pub(super) image: PathBuf,
    pub(super) modules: Vec<PathBuf>,
}

impl Packages {
    /// Prepares what has to be fetched for these kernels, if anything.
    pub(super) fn prepare(
        folder: &Path,
        options: &Options,
        table: &Table,
        subjects: &[Subject],
    ) -> Result<Self, String> {
        // All suites of the table: which kernels are run doesn't change where a package comes from.
        let kernels = table.kernel.iter().flat_map(|kernel| &kernel.suites);
        let suites: BTreeSet<&str> = kernels
            .chain(table.arch.values().flat_map(|arch| &arch.qemu_suites))
            .map(String::as_str)
            .collect();
        let suites: Vec<&str> = suites.into_iter().collect();
        let archs: Vec<&str> = subjects.iter().map(|subject| subject.arch.debian.as_str()).collect();
        let installed =
            |subject: &Subject| options.qemu.is_some() || Qemu::find(&subject.arch.qemu).is_some();
        let needed = options.shell.is_some()
            || subjects.iter().any(|s| matches!(s.source, Source::Packages(_)) || !installed(s));
        let apt = if needed {
            Apt::open(folder.join("apt"), &suites, &archs)
        } else {
            Err("not needed".to_owned())
        };
        let suites = suites.into_iter().map(str::to_owned).collect();
        let packages = Self { apt, qemu: options.qemu.clone(), suites };
        // Everything that can be missing is, before the long work starts.
        for subject in subjects {
            let qemu = packages.qemu(subject)?;
            let version = qemu.version()?;
            let kernel = packages.kernel(subject)?;
            eprintln!("{:12} {} in {version}", subject.name, super::image::file_name(&kernel.image));
        }
        Ok(packages)
    }

    fn apt(&self) -> Result<&Apt, String> {
        self.apt.as_ref().map_err(Clone::clone)
    }

    /// QEMU for a kernel: the given one, the installed one, or a fetched one.
    pub(super) fn qemu(&self, subject: &Subject) -> Result<Qemu, String> {
        let arch = &subject.arch;
        if let Some(path) = &self.qemu {
            return Ok(Qemu::installed(path));
        }
        if let Some(qemu) = Qemu::find(&arch.qemu) {
            return Ok(qemu);
        }
        let fetch = || {
            let tree = self.apt()?.with_dependencies(&[&arch.qemu_package])?;
            Qemu::unpacked(&tree, &arch.qemu)
        };
        fetch().map_err(|reason| {
            format!(
                "{} is not in PATH, and could not be fetched: install it (Debian's package {}), or give its path with \
                 --qemu\n{reason}",
                arch.qemu, arch.qemu_package
            )
        })
    }

    /// A kernel, and those of the modules of its architecture that it has.
    pub(super) fn kernel(&self, subject: &Subject) -> Result<Files, String> {
        let kernel = match &subject.source {
            Source::Image(path) => return Ok(Files { image: path.clone(), modules: Vec::new() }),
            Source::Packages(kernel) => kernel,
        };
        let fetch = || {
            let apt = self.apt()?;
            let image = apt.newest(&kernel.packages)?;
            let mut names = vec![image.clone()];
            // What used to be one package is two.
            names.extend(
                image.strip_prefix("linux-binary-").map(|version| format!("linux-modules-{version}")),
            );
            let names: Vec<_> = names.iter().map(|name| format!("{name}:{}", subject.arch.debian)).collect();
            let tree = apt.packages(&names)?;
            let files = files(&tree);
            let is_image = |path: &&PathBuf| {
                let name = super::image::file_name(path);
                name.starts_with("vmlinuz") || name.starts_with("vmlinux")
            };
            let image = files.iter().find(is_image).ok_or(format!("no kernel in {}", tree.display()))?;
            let module = |name: &String| {
                let of_module = |path: &&PathBuf| {
                    super::image::file_name(path).split_once(".ko").is_some_and(|(stem, _)| stem == name)
                };
                files.iter().find(of_module).cloned()
            };
            let modules = subject.arch.modules.iter().filter_map(module).collect();
            Ok(Files { image: image.clone(), modules })
        };
        fetch().map_err(|reason: String| {
            let suites = self.suites.join(", ");
            format!(
                "kernel {} could not be fetched: {KERNEL_HELP}. Suites that were looked into: {suites}\n{reason}",
                kernel.name
            )
        })
    }

    /// A shell and the usual tools in one static program.
    pub(super) fn busybox(&self, subject: &Subject) -> Result<PathBuf, String> {
        let tree = self.apt()?.packages(&[format!("busybox-static:{}", subject.arch.debian)])?;
        let paths = ["bin/busybox", "usr/bin/busybox"].map(|path| tree.join(path));
        let found = paths.into_iter().find(|path| path.is_file());
        found.ok_or_else(|| format!("no busybox in {}", tree.display()))
    }
}

/// The files under a folder, sorted.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                Ok(kind) if kind.is_file() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found.sort();
    found
}
