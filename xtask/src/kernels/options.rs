//! What `cargo xtask kernels` is told, and the kernels that this means.

use std::num::NonZeroU64;
use std::path::PathBuf;

use guest_init::User;

use super::image::file_name;
use super::table::{Arch, Expectation, Kernel, Table};

/// A kernel to run, and what is expected of it.
pub(super) struct Subject {
    pub(super) name: String,
    pub(super) arch: Arch,
    pub(super) source: Source,
    pub(super) root: Expectation,
    pub(super) nobody: Expectation,
    /// What the user without rights runs of the binaries, if not all.
    pub(super) short: Option<Vec<String>>,
}

/// Where a kernel comes from.
pub(super) enum Source {
    Image(PathBuf),
    Packages(Kernel),
}

impl Subject {
    pub(super) fn expectation(&self, user: User) -> Expectation {
        if user == User::Root { self.root.clone() } else { self.nobody.clone() }
    }
}

#[derive(Debug, Default)]
pub(super) struct Options {
    pub(super) names: Vec<String>,
    pub(super) all: bool,
    pub(super) short: bool,
    pub(super) list: bool,
    pub(super) kernel: Option<PathBuf>,
    pub(super) arch: Option<String>,
    pub(super) features: Option<u64>,
    pub(super) lacks: Vec<String>,
    pub(super) shell: Option<String>,
    pub(super) qemu: Option<PathBuf>,
    pub(super) limit: Option<u64>,
    pub(super) guests: Option<usize>,
    pub(super) binaries: Vec<String>,
    pub(super) soak: Option<u64>,
    pub(super) arguments: Vec<String>,
}

impl Options {
    pub(super) fn parse(arguments: &[String]) -> Result<Self, String> {
        let mut options = Options::default();
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().cloned().ok_or_else(|| format!("{argument} needs a value"));
            match argument.as_str() {
                "--all" => options.all = true,
                "--short" => options.short = true,
                "--list" => options.list = true,
                "--kernel" => options.kernel = Some(value()?.into()),
                "--arch" => options.arch = Some(value()?),
                "--features" => options.features = Some(mask(&value()?)?),
                "--lacks" => options.lacks.push(value()?),
                "--shell" => options.shell = Some(value()?),
                "--qemu" => options.qemu = Some(value()?.into()),
                "--limit" => options.limit = Some(positive("--limit", &value()?)?),
                "--guests" => options.guests = Some(positive("--guests", &value()?)? as usize),
                "--binary" => options.binaries.push(value()?),
                "--soak" => {
                    let value = value()?;
                    options.soak = Some(value.parse().map_err(|e| format!("--soak {value}: {e}"))?);
                }
                "--" => options.arguments.extend(arguments.by_ref().cloned()),
                name if !name.starts_with('-') => options.names.push(name.to_owned()),
                _ => return Err(format!("kernels: unexpected argument `{argument}`")),
            }
        }
        let described = options.features.is_some() || options.arch.is_some() || !options.lacks.is_empty();
        if options.kernel.is_none() && described {
            return Err("--features, --arch and --lacks tell about the image of --kernel".to_owned());
        }
        let ways =
            [options.kernel.is_some(), options.all, options.shell.is_some(), !options.names.is_empty()];
        if ways.into_iter().filter(|way| *way).count() > 1 {
            return Err("one of names, --all, --kernel and --shell says which kernels".to_owned());
        }
        Ok(options)
    }

    fn short(&self, table: &Table) -> Option<Vec<String>> {
        self.short.then(|| table.short.clone())
    }

    /// The kernels to run.
    pub(super) fn subjects(&self, table: &Table) -> Result<Vec<Subject>, String> {
        if let Some(path) = &self.kernel {
            let path = path.canonicalize().map_err(|e| format!("--kernel {}: {e}", path.display()))?;
            let arch = table.arch(self.arch.as_deref().unwrap_or(std::env::consts::ARCH))?.clone();
            let expectation = |user| table.expect(self.features, &self.lacks, user);
            return Ok(vec![Subject {
                name: file_name(&path),
                arch,
                source: Source::Image(path),
                root: expectation(User::Root),
                nobody: expectation(User::Nobody),
                short: self.short(table),
            }]);
        }
        let names: Vec<String> = self.shell.iter().chain(&self.names).cloned().collect();
        let subject = |kernel: &Kernel| {
            Ok(Subject {
                name: kernel.name.clone(),
                arch: table.arch(&kernel.arch)?.clone(),
                source: Source::Packages(kernel.clone()),
                root: table.expectation(kernel, User::Root),
                nobody: table.expectation(kernel, User::Nobody),
                short: self.short(table),
            })
        };
        table.select(&names, self.all)?.into_iter().map(subject).collect()
    }
}

fn positive(option: &str, value: &str) -> Result<u64, String> {
    value.parse().map(NonZeroU64::get).map_err(|e| format!("{option} {value}: {e}"))
}

fn mask(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u64::from_str_radix(digits, 16).map_err(|e| format!("--features {text}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::table::Features;

    fn parse(arguments: &[&str]) -> Result<Options, String> {
        Options::parse(&arguments.iter().map(|argument| (*argument).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn options_that_make_no_sense_are_refused() {
        assert_eq!(parse(&["--kernel", "k", "--features", "0x1ff"]).unwrap().features, Some(0x1ff));
        let image = parse(&["--kernel", "/dev/null", "--lacks", "swap", "--lacks", "hugetlb"]).unwrap();
        let subject = image.subjects(&Table::read().unwrap()).unwrap().remove(0);
        let allows = |user, need| subject.expectation(user).allows(need, &Features::read().unwrap());
        assert!(allows(User::Root, "swap") && allows(User::Nobody, "hugetlb"));
        assert!(!allows(User::Root, "root") && allows(User::Nobody, "root"));
        assert!(!allows(User::Root, "PAGEMAP_SCAN") && !allows(User::Root, "memfd_secret"));
        let options = parse(&["--limit", "5", "6.1", "7.3", "--", "copy::", "--exact"]).unwrap();
        assert_eq!(
            (options.names, options.arguments),
            (vec!["6.1".into(), "7.3".into()], vec!["copy::".into(), "--exact".into()])
        );
        for wrong in [
            &["--features", "1ff"][..],
            &["--kernel", "k", "--features", "some"],
            &["--kernel"],
            &["--lacks", "swap"],
            &["--kernel", "k", "--lacks"],
            &["--kernel", "k", "6.1"],
            &["--kernel", "k", "--all"],
            &["--shell", "6.1", "7.3"],
            &["--all", "6.1"],
            &["--fast"],
            &["--limit", "soon"],
            &["--limit", "0"],
            &["--guests", "0"],
            &["--soak", "long"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
