//! What a run needs and this machine may not have: QEMU, kernels, a shell.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::image::file_name;
use super::options::{Options, Source, Subject};
use super::qemu::Qemu;
use super::table::Table;
use crate::apt::{self, Apt};

const KERNEL_HELP: &str = "give a kernel image with --kernel";

/// Where packages are from.
pub(super) struct Packages {
    folder: PathBuf,
    suites: Vec<String>,
    /// By architecture, those that were needed.
    roots: RefCell<BTreeMap<String, Rc<Apt>>>,
    qemu: Option<PathBuf>,
}

/// A kernel and its modules.
#[derive(Clone, Debug)]
pub(super) struct Files {
    pub(super) image: PathBuf,
    pub(super) modules: Vec<PathBuf>,
}

impl Packages {
    pub(super) fn new(folder: &Path, options: &Options, table: &Table) -> Self {
        // All suites of the table: which kernels are run doesn't change where a package comes from.
        let suites: BTreeSet<&String> =
            table.kernel.iter().flat_map(|kernel| &kernel.suites).chain(&table.tool_suites).collect();
        Self {
            folder: folder.join("apt"),
            suites: suites.into_iter().cloned().collect(),
            roots: RefCell::default(),
            qemu: options.qemu.clone(),
        }
    }

    /// The packages of an architecture, by Debian's name.
    pub(super) fn of(&self, arch: &str) -> Result<Rc<Apt>, String> {
        if let Some(apt) = self.roots.borrow().get(arch) {
            return Ok(Rc::clone(apt));
        }
        let suites: Vec<&str> = self.suites.iter().map(String::as_str).collect();
        let apt = Rc::new(Apt::open(self.folder.join(arch), &suites, arch)?);
        self.roots.borrow_mut().insert(arch.to_owned(), Rc::clone(&apt));
        Ok(apt)
    }

    /// The packages of this machine's architecture.
    pub(super) fn of_host(&self) -> Result<Rc<Apt>, String> {
        self.of(&apt::host()?)
    }

    /// QEMU for a kernel: the given one, the installed one, or a fetched one.
    pub(super) fn qemu(&self, subject: &Subject) -> Result<Qemu, String> {
        let arch = &subject.arch;
        if let Some(path) = &self.qemu {
            let there = path.is_file().then(|| Qemu::installed(path));
            return there.ok_or_else(|| format!("--qemu {}: no such program", path.display()));
        }
        if let Some(qemu) = Qemu::find(&arch.qemu) {
            return Ok(qemu);
        }
        let fetch = || {
            let tree = self.of_host()?.with_dependencies(&[&arch.qemu_package])?;
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
        let unpack = |apt: &Apt, image: &String| {
            let mut names = vec![image.clone()];
            // What used to be one package is two.
            names.extend(
                image.strip_prefix("linux-binary-").map(|version| format!("linux-modules-{version}")),
            );
            let modules: Vec<_> = subject.arch.modules.iter().map(|name| format!("{name}.ko")).collect();
            let wanted: Vec<_> = modules.iter().map(String::as_str).chain(["vmlinu"]).collect();
            let tree = apt.packages(&names, &wanted)?;
            let files = apt::files(&tree);
            let is_image = |path: &&PathBuf| {
                let name = file_name(path);
                name.starts_with("vmlinuz") || name.starts_with("vmlinux")
            };
            let image = files.iter().find(is_image).ok_or(format!("no kernel in {}", tree.display()))?;
            let module = |name: &String| {
                let of_module =
                    |path: &&PathBuf| file_name(path).split_once(".ko").is_some_and(|(stem, _)| stem == name);
                files.iter().find(of_module).cloned()
            };
            let modules = subject.arch.modules.iter().filter_map(module).collect();
            Ok(Files { image: image.clone(), modules })
        };
        let fetch = || {
            let apt = self.of(&subject.arch.debian)?;
            let images = apt.matching(&kernel.packages)?;
            let (newest, older) = images.split_first().ok_or("no package matches")?;
            unpack(&apt, newest).or_else(|reason| {
                eprintln!("{newest} can't be had: {reason}");
                older.iter().find_map(|image| unpack(&apt, image).ok()).ok_or(reason)
            })
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
        let apt = self.of(&subject.arch.debian)?;
        let tree = apt.packages(&["busybox-static".to_owned()], &["busybox"])?;
        let paths = ["bin/busybox", "usr/bin/busybox"].map(|path| tree.join(path));
        let found = paths.into_iter().find(|path| path.is_file());
        found.ok_or_else(|| format!("no busybox in {}", tree.display()))
    }
}
