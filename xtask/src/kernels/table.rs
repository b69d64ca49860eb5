//! xtask/kernels.toml: which kernels there are, and what the suite must find on each.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use guest_init::User;
use serde::Deserialize;

use crate::tree;

/// Where the table lies in the workspace.
const PATH: &str = "xtask/kernels.toml";

/// What the file says.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Table {
    /// What tests may ask for beside features.
    pub(crate) needs: Vec<String>,
    /// What the machine that runs this program may lack, by how its kernel was configured.
    pub(super) any_kernel_may_lack: Vec<String>,
    /// What the unprivileged user lacks.
    pub(super) nobody_lacks: Vec<String>,
    /// What the unprivileged user runs where time is short.
    pub(super) short: Vec<String>,
    /// Where QEMU, the shell and what programs for other machines take are looked for.
    pub(super) tool_suites: Vec<String>,
    pub(super) arch: BTreeMap<String, Arch>,
    pub(super) kernel: Vec<Kernel>,
}

/// A machine that QEMU emulates.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Arch {
    /// What the binaries are built for on machines of other architectures.
    pub(super) target: String,
    /// The architecture, by Debian's name.
    pub(super) debian: String,
    pub(super) qemu: String,
    pub(super) qemu_package: String,
    pub(super) qemu_arguments: Vec<String>,
    /// The terminal that is the machine's first serial port.
    pub(super) console: String,
    /// What its kernels are told beside that.
    #[serde(default)]
    pub(super) kernel_arguments: Vec<String>,
    /// MiB that a guest has.
    pub(super) memory: usize,
    /// Seconds that a guest may run.
    pub(super) limit: u64,
    /// Huge pages that are reserved.
    pub(super) huge_pages: usize,
    /// Modules to load, as far as the kernel has them.
    pub(super) modules: Vec<String>,
}

/// A kernel, and what it offers.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Kernel {
    pub(super) name: String,
    pub(super) arch: String,
    /// Patterns of packages: of the first that any matches, the newest.
    pub(super) packages: Vec<String>,
    pub(super) suites: Vec<String>,
    /// The mask of features.
    pub(super) features: u64,
    /// Needs of tests that it doesn't meet.
    pub(super) lacks: Vec<String>,
    /// Whether it takes `--all`, or its name, to run it.
    #[serde(default)]
    pub(super) only_with_all: bool,
}

impl Table {
    pub(crate) fn read() -> Result<Self, String> {
        let text = fs::read_to_string(tree::root().join(PATH)).map_err(|e| format!("{PATH}: {e}"))?;
        Self::parse(&text)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let table: Table = toml::from_str(text).map_err(|e| format!("{PATH}: {e}"))?;
        let mut names = BTreeSet::new();
        for kernel in &table.kernel {
            if !names.insert(&kernel.name) {
                return Err(format!("{PATH}: two kernels are named {}", kernel.name));
            }
            table.arch(&kernel.arch)?;
        }
        Ok(table)
    }

    pub(super) fn arch(&self, name: &str) -> Result<&Arch, String> {
        let names = || self.arch.keys().cloned().collect::<Vec<_>>().join(", ");
        self.arch.get(name).ok_or_else(|| format!("{PATH}: no architecture {name}, there is {}", names()))
    }

    /// The kernels of these names; without names those that are run by default, or all.
    pub(super) fn select(&self, names: &[String], all: bool) -> Result<Vec<&Kernel>, String> {
        if names.is_empty() {
            return Ok(self.kernel.iter().filter(|kernel| all || !kernel.only_with_all).collect());
        }
        if let Some(name) = names.iter().find(|name| !self.kernel.iter().any(|kernel| kernel.name == **name))
        {
            return Err(format!("no kernel `{name}`: see --list"));
        }
        // Each once, in the order of the table.
        Ok(self.kernel.iter().filter(|kernel| names.contains(&kernel.name)).collect())
    }

    /// What a kernel must meet, and what is lacking there, for one of the users.
    pub(super) fn expectation(&self, kernel: &Kernel, user: User) -> Expectation {
        self.expect(Some(kernel.features), &kernel.lacks, user)
    }

    /// What one of the users must find on a kernel that isn't in the table.
    pub(super) fn expect(&self, features: Option<u64>, lacks: &[String], user: User) -> Expectation {
        let nobodys = if user == User::Nobody { self.nobody_lacks.as_slice() } else { &[] };
        let lacks: Vec<String> = lacks.iter().chain(nobodys).cloned().collect();
        let mut needs = self.needs.clone();
        needs.retain(|need| !lacks.iter().any(|lack| covers(lack, need)));
        Expectation { features, needs, lacks }
    }

    /// What the suite must find on the machine that runs this program, where `unmet` of its needs aren't met.
    pub(crate) fn expect_here(&self, release: &str, features: u64, unmet: &[String]) -> Expectation {
        let mut lacks = unmet.to_vec();
        lacks.extend(self.any_kernel_may_lack.iter().cloned());
        let release = version(release);
        let arch = |kernel: &&Kernel| kernel.arch == std::env::consts::ARCH;
        let older = |kernel: &&Kernel| version(&kernel.name).is_some_and(|named| Some(named) <= release);
        let nearest =
            self.kernel.iter().filter(arch).filter(older).max_by_key(|kernel| version(&kernel.name));
        lacks.extend(nearest.iter().flat_map(|kernel| kernel.lacks.iter().cloned()));
        let mut needs = self.needs.clone();
        needs.retain(|need| !unmet.contains(need));
        Expectation { features: Some(features), needs, lacks }
    }
}

/// What a run of the suite must find.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Expectation {
    /// The mask of features, if it is known.
    pub(super) features: Option<u64>,
    /// Needs that are met.
    pub(super) needs: Vec<String>,
    /// Needs that aren't.
    pub(super) lacks: Vec<String>,
}

impl Expectation {
    /// The environment variables that tell the suite.
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        let mut variables = Vec::new();
        if let Some(features) = self.features {
            variables.push(("USERFAULTFD_EXPECT_FEATURES".to_owned(), format!("{features:#x}")));
        }
        if !self.needs.is_empty() {
            variables.push(("USERFAULTFD_EXPECT".to_owned(), self.needs.join(",")));
        }
        variables
    }

    /// Whether a test may be skipped for what it says that it needs: features, or one thing of another kind.
    pub(crate) fn allows(&self, need: &str, features: &Features) -> bool {
        match (features.bits(need), self.features) {
            (Some(bits), Some(offered)) => bits & offered == 0,
            _ => self.lacks.iter().any(|lack| covers(lack, need)),
        }
    }
}

/// The first two numbers of a release: of `6.18.44-cloud`, 6 and 18.
fn version(release: &str) -> Option<(u16, u16)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// Whether `lack` is `need`, or the part of it before an explanation. A `*` at the end stands for anything.
pub(super) fn covers(lack: &str, need: &str) -> bool {
    match lack.strip_suffix('*') {
        Some(start) => need.starts_with(start),
        None => need.strip_prefix(lack).is_some_and(|rest| rest.is_empty() || rest.starts_with([',', ':'])),
    }
}

/// The features' names and bits, from the committed bindings: this program can do without their being compiled.
#[derive(Debug)]
pub(crate) struct Features(BTreeMap<String, u64>);

impl Features {
    pub(crate) fn read() -> Result<Self, String> {
        const BINDINGS: &str = "userfaultfd-sys/src/bindings/generic.rs";
        let text = fs::read_to_string(tree::root().join(BINDINGS)).map_err(|e| format!("{BINDINGS}: {e}"))?;
        let features = Self::parse(&text);
        if features.0.is_empty() { Err(format!("{BINDINGS} has no features")) } else { Ok(features) }
    }

    fn parse(text: &str) -> Self {
        let feature = |line: &str| {
            let (name, value) = line.strip_prefix("pub const UFFD_FEATURE_")?.split_once(": u64 = ")?;
            Some((name.to_owned(), value.strip_suffix(';')?.parse().ok()?))
        };
        Self(text.lines().filter_map(feature).collect())
    }

    /// The bits of what are features' names and nothing else: `MOVE | POISON`, or `MOVE (Linux 6.8), POISON (Linux 6.6)`.
    fn bits(&self, names: &str) -> Option<u64> {
        let name = |part: &str| part.split(" (Linux ").next().map(str::to_owned);
        let mut names = names.split(" | ").flat_map(|part| part.split(", "));
        names.try_fold(0, |bits, part| Some(bits | self.0.get(&name(part)?)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features() -> Features {
        Features::parse(
            "pub const UFFD_FEATURE_MOVE: u64 = 65536;\npub const UFFD_FEATURE_POISON: u64 = 16384;\n",
        )
    }

    #[test]
    fn table_of_the_tree_is_sound() {
        let table = Table::read().unwrap();
        let default = table.select(&[], false).unwrap();
        assert!(default.len() >= 5 && default.iter().all(|kernel| kernel.arch == "x86_64"));
        assert_eq!(table.select(&["5.10".to_owned()], false).unwrap()[0].features, 0x1ff);
        assert!(table.select(&["4.4".to_owned()], true).is_err());
        let names = ["7.3", "6.1", "7.3"].map(str::to_owned);
        let named: Vec<_> = table.select(&names, false).unwrap().iter().map(|kernel| &kernel.name).collect();
        assert_eq!(named, ["6.1", "7.3"]);
        for kernel in &table.kernel {
            assert!(kernel.packages.iter().all(|p| p.contains('*') && p.starts_with("linux-")), "{kernel:?}");
        }
    }

    #[test]
    fn bindings_give_the_features() {
        let features = Features::read().unwrap();
        assert_eq!(features.bits("RWP_ASYNC"), Some(1 << 18));
        assert_eq!(features.bits("RWP | RWP_ASYNC"), Some(3 << 17));
        assert_eq!(features.bits("RWP (Linux 7.3), RWP_ASYNC (Linux 7.3)"), Some(3 << 17));
        assert_eq!(features.bits("root"), None);
    }

    #[test]
    fn skip_is_allowed_only_for_what_is_lacking() {
        let lacks = vec!["root".to_owned(), "guards on *".to_owned()];
        let expectation = Expectation { features: Some(16384), needs: Vec::new(), lacks };
        let allows = |need| expectation.allows(need, &features());
        assert!(allows("MOVE") && allows("root") && allows("guards on Hugetlb"));
        assert!(!allows("POISON") && !allows("MOVE | POISON") && !allows("MOVE | NEWER"));
        assert!(
            allows("root: be it") && allows("root, to drop it") && !allows("rooted") && !allows("a root")
        );
        assert!(!allows("hugetlb") && !allows("guards") && !allows(""));
        // Where nothing is known, nothing is allowed.
        assert!(!Expectation::default().allows("anything", &features()));
        assert!(!Expectation::default().allows("POISON", &features()));
    }

    #[test]
    fn machine_is_expected_to_match_its_release() {
        let mut table = Table::read().unwrap();
        table.any_kernel_may_lack = vec!["seccomp".to_owned()];
        let unmet = vec!["swap".to_owned()];
        let allows = |release, need| table.expect_here(release, 0x1ff, &unmet).allows(need, &features());
        assert!(allows("5.10.1", "swap") && allows("5.10.1", "seccomp") && allows("5.10.1", "MOVE"));
        assert!(!allows("5.10.1", "root"));
        if std::env::consts::ARCH == "x86_64" {
            assert!(allows("5.15.0-generic", "memfd_secret") && !allows("6.2.0", "memfd_secret"));
        }
        // Older than all of the table, and unreadable.
        assert!(!allows("4.19.0", "memfd_secret") && !allows("unknown", "memfd_secret"));
        let told = table.expect_here("6.18.44", 0x1ff, &unmet).environment();
        assert!(told[1].1.split(',').any(|need| need == "root"), "{told:?}");
        assert!(!told[1].1.split(',').any(|need| need == "swap"), "{told:?}");
    }

    #[test]
    fn suite_expects_needs_that_are_not_lacking() {
        let table = Table::parse(
            "needs = ['root', 'hugetlb', 'swap']\nany-kernel-may-lack = []\nnobody-lacks = ['root']\nshort = ['a']\ntool-suites = []\n[arch]\n[[kernel]]\nname = '1'\n\
             arch = 'x'\npackages = []\nsuites = []\nfeatures = 0x1ff\nlacks = ['swap']\n",
        );
        assert!(table.unwrap_err().contains("no architecture x"));
        let mut table = Table::read().unwrap();
        table.needs = ["root", "hugetlb", "swap"].map(str::to_owned).to_vec();
        table.nobody_lacks = vec!["root".to_owned()];
        table.kernel[0].lacks = vec!["swap".to_owned()];
        let told = |user| table.expectation(&table.kernel[0], user).environment();
        assert_eq!(told(User::Root)[0].1, "0x1ff");
        assert_eq!(told(User::Root)[1].1, "root,hugetlb");
        assert_eq!(told(User::Nobody)[1].1, "hugetlb");
    }
}
