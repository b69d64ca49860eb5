//! Debian packages, fetched and unpacked into a folder of ours: the system's package manager, with a root of its own.

mod sources;
mod version;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

/// Lists of packages are fetched again after this time.
const FRESH: Duration = Duration::from_secs(24 * 60 * 60);

/// Lists of this age are no reason for a failure.
const JUST_NOW: Duration = Duration::from_secs(10 * 60);

/// A file with what APT had to say when the lists were fetched, which was when it was written.
const UPDATED: &str = "updated";

/// What APT is configured with on this machine, and what is left to it.
const SYSTEM: &str = "/etc/apt";

/// A root of APT's that has nothing to do with the system's, for one architecture.
pub(crate) struct Apt {
    folder: PathBuf,
    /// By Debian's name.
    arch: String,
}

/// This machine's architecture, by Debian's name.
pub(crate) fn host() -> Result<String, String> {
    let arch = output(Command::new("dpkg").arg("--print-architecture"));
    arch.map(|arch| arch.trim().to_owned()).map_err(|reason| {
        format!("packages are fetched and unpacked by apt-get and dpkg, which this machine has not: {reason}")
    })
}

impl Apt {
    /// Prepares the root in `folder`, with lists of the suites, which aren't fetched if that was done of late.
    pub(crate) fn open(folder: PathBuf, suites: &[&str], arch: &str) -> Result<Self, String> {
        host()?;
        let apt = Apt { folder, arch: arch.to_owned() };
        let configured = sources::configured(Path::new(SYSTEM));
        let text = sources::other_suites(&configured, &code_name(), suites, arch);
        if text.is_empty() {
            return Err(format!(
                "none of the package sources in {SYSTEM} is this distribution's own, so there is no mirror to fetch from"
            ));
        }
        for folder in [
            "etc/sources",
            "etc/apt.conf.d",
            "etc/preferences.d",
            "state/lists/partial",
            "cache/archives/partial",
            "trees",
        ] {
            create(&apt.folder.join(folder))?;
        }
        write(&apt.folder.join("state/status"), "")?;
        let conf = apt.configuration();
        write(&apt.folder.join("apt.conf"), &conf)?;
        let file = apt.folder.join("etc/sources/suites.sources");
        let changed = fs::read_to_string(&file).ok().as_deref() != Some(text.as_str());
        if changed || apt.are_lists_older_than(FRESH) {
            write(&file, &text)?;
            apt.update()?;
        }
        Ok(apt)
    }

    /// The files of this root, and how to fetch: proxies, time-outs, keys are the system's.
    fn configuration(&self) -> String {
        let own = self.folder.display();
        let system = output(Command::new("apt-config").arg("dump")).unwrap_or_default();
        let how = system.lines().filter(|line| {
            line.starts_with("Acquire::") && !line.ends_with(" \"\";") && !line.contains("IndexTargets")
        });
        let how: Vec<&str> = how.collect();
        format!(
            "{}\n\
             Dir::Etc \"{own}/etc\";\n\
             Dir::Etc::sourcelist \"{own}/etc/none\";\n\
             Dir::Etc::sourceparts \"{own}/etc/sources\";\n\
             Dir::Etc::trusted \"{SYSTEM}/trusted.gpg\";\n\
             Dir::Etc::trustedparts \"{SYSTEM}/trusted.gpg.d\";\n\
             Dir::Etc::netrc \"{SYSTEM}/auth.conf\";\n\
             Dir::Etc::netrcparts \"{SYSTEM}/auth.conf.d\";\n\
             Dir::State \"{own}/state\";\n\
             Dir::State::status \"{own}/state/status\";\n\
             Dir::Cache \"{own}/cache\";\n\
             Acquire::Languages \"none\";\n\
             APT::Architecture \"{arch}\";\n\
             APT::Architectures {{ \"{arch}\"; }};\n\
             APT::Sandbox::User \"root\";\n",
            how.join("\n"),
            arch = self.arch,
        )
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.folder.join("apt.conf")).env("LC_ALL", "C");
        command.env("DEBIAN_FRONTEND", "noninteractive").current_dir(&self.folder).stdin(Stdio::null());
        command
    }

    /// Fetches the lists. A suite that can't be had is missed only where something in it is wanted.
    fn update(&self) -> Result<(), String> {
        eprintln!("fetching lists of packages");
        let mut command = self.command("apt-get");
        let output = command.arg("update").output().map_err(|e| format!("apt-get: {e}"))?;
        let errors = String::from_utf8_lossy(&output.stderr);
        let lists = fs::read_dir(self.folder.join("state/lists")).into_iter().flatten().flatten();
        if lists.into_iter().any(|list| list.file_name().to_string_lossy().contains("_Packages")) {
            write(&self.folder.join(UPDATED), errors.trim())
        } else {
            Err(format!("apt-get update: no list of packages could be fetched\n{}", errors.trim()))
        }
    }

    fn are_lists_older_than(&self, time: Duration) -> bool {
        let modified = fs::metadata(self.folder.join(UPDATED)).and_then(|file| file.modified());
        let age = modified.ok().and_then(|modified| SystemTime::now().duration_since(modified).ok());
        age.is_none_or(|age| age > time)
    }

    /// Does something with the lists; once more with new ones if that fails, since a mirror has only the newest of a
    /// package.
    fn with_lists<T>(&self, act: impl Fn() -> Result<T, String>) -> Result<T, String> {
        act().or_else(|reason| {
            if !self.are_lists_older_than(JUST_NOW) {
                return Err(reason);
            }
            self.update()?;
            act()
        })
    }

    /// The packages that match the first of `patterns` that any matches, the newest first. A mirror may list one that
    /// it hasn't got.
    pub(crate) fn matching(&self, patterns: &[String]) -> Result<Vec<String>, String> {
        let first = patterns.first().and_then(|pattern| pattern.split('*').next()).unwrap_or_default();
        let start = first.split_inclusive('-').take(1).collect::<String>();
        let find = || {
            let mut command = self.command("apt-cache");
            let list = output(command.args(["search", "--names-only"]).arg(format!("^{start}")))?;
            let names: Vec<&str> = list.lines().filter_map(|line| line.split(' ').next()).collect();
            let matching = patterns.iter().map(|pattern| version::matching(pattern, names.iter().copied()));
            let found = matching.into_iter().find(|found| !found.is_empty()).ok_or_else(|| {
                let remarks = fs::read_to_string(self.folder.join(UPDATED)).unwrap_or_default();
                format!("no package {} at the configured mirror\n{remarks}", patterns.join(" or "))
            })?;
            Ok(found.into_iter().map(str::to_owned).collect())
        };
        self.with_lists(find)
    }

    /// The newest version of a package that starts with `start`.
    pub(crate) fn version(&self, name: &str, start: &str) -> Result<String, String> {
        self.with_lists(|| {
            // Lines of ` NAME | VERSION | SOURCE`, the newest first.
            let list = output(self.command("apt-cache").args(["madison", name]))?;
            let mut versions = list.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim);
            let found = versions.find(|version| version.starts_with(start));
            found
                .map(str::to_owned)
                .ok_or_else(|| format!("no package {name} {start} at the configured mirror"))
        })
    }

    /// The folder into which the named packages are unpacked, as far as a part of a path in them starts with one of
    /// `wanted`.
    pub(crate) fn packages(&self, names: &[String], wanted: &[&str]) -> Result<PathBuf, String> {
        self.with_lists(|| {
            let mut command = self.command("apt-get");
            let uris = output(command.args(["download", "--print-uris"]).args(names))?;
            self.tree(names, &file_names(&uris), wanted)
        })
    }

    /// The folder into which the named packages are unpacked, with everything that they depend on.
    pub(crate) fn with_dependencies(&self, names: &[&str]) -> Result<PathBuf, String> {
        self.with_lists(|| {
            let mut command = self.command("apt-get");
            command.args(["install", "--yes", "--no-install-recommends", "--print-uris"]).args(names);
            let files = file_names(&output(&mut command)?);
            let exact = files.iter().filter_map(|file| exact(file));
            self.tree(&exact.collect::<Vec<_>>(), &files, &[""])
        })
    }

    /// The folder of an exact set of package files.
    fn tree(&self, names: &[String], files: &[String], wanted: &[&str]) -> Result<PathBuf, String> {
        let Some(last) = files.last() else {
            return Err(format!("apt-get download {}: nothing to fetch", names.join(" ")));
        };
        // A path of libraries has no room for a colon.
        let name = last.trim_end_matches(".deb").replace("%3a", ".");
        let tree = self.folder.join("trees").join(format!("{name}-{:08x}", hash(files, wanted)));
        if tree.is_dir() {
            return Ok(tree);
        }
        eprintln!("fetching {name}{}", if files.len() > 1 { " and what it needs" } else { "" });
        // Another run may do the same at the same time.
        let work = self.folder.join(format!("work-{}", std::process::id()));
        remove(&work)?;
        let (packages, unpacked) = (work.join("packages"), work.join("unpacked"));
        create(&packages)?;
        create(&unpacked)?;
        output(self.command("apt-get").arg("download").args(names).current_dir(&packages))?;
        for package in fs::read_dir(&packages).map_err(|e| format!("{}: {e}", packages.display()))?.flatten()
        {
            output(Command::new("dpkg").arg("--extract").arg(package.path()).arg(&unpacked))?;
        }
        keep(&unpacked, wanted)?;
        if fs::rename(&unpacked, &tree).is_err() && !tree.is_dir() {
            return Err(format!("{} can't be made", tree.display()));
        }
        remove(&work)?;
        Ok(tree)
    }
}

/// The files under a folder, sorted.
pub(crate) fn files(folder: &Path) -> Vec<PathBuf> {
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

/// The file names in what `--print-uris` prints: `'URI' FILE SIZE HASH`.
fn file_names(uris: &str) -> Vec<String> {
    let of_packages = uris.lines().filter(|line| line.starts_with('\''));
    of_packages
        .filter_map(|line| Some(line.rsplit_once('\'')?.1.split_whitespace().next()?.to_owned()))
        .collect()
}

/// What names the package of a file to APT: `NAME_VERSION_ARCHITECTURE.deb` is `NAME:ARCHITECTURE=VERSION`.
fn exact(file: &str) -> Option<String> {
    let mut parts = file.trim_end_matches(".deb").splitn(3, '_');
    let (name, version, arch) = (parts.next()?, parts.next()?, parts.next()?);
    let arch = if arch == "all" { String::new() } else { format!(":{arch}") };
    Some(format!("{name}{arch}={}", version.replace("%3a", ":")))
}

/// FNV-1a.
fn hash(names: &[String], wanted: &[&str]) -> u32 {
    let texts = names.iter().map(String::as_str).chain(wanted.iter().copied());
    let bytes = texts.flat_map(|text| text.bytes().chain([0]));
    bytes.fold(0x811c_9dc5, |sum, byte| (sum ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// Removes everything under `folder` but paths of which a part starts with one of `wanted`.
fn keep(folder: &Path, wanted: &[&str]) -> Result<(), String> {
    for entry in fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        if wanted.iter().any(|wanted| name.to_string_lossy().starts_with(wanted)) {
            continue;
        }
        let removed = if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            keep(&path, wanted)?;
            // What is left in it keeps it.
            let _ = fs::remove_dir(&path);
            Ok(())
        } else {
            fs::remove_file(&path)
        };
        removed.map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}

/// The machine's release, by its code name.
fn code_name() -> String {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    name.unwrap_or_default().trim_matches('"').to_owned()
}

fn create(folder: &Path) -> Result<(), String> {
    fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))
}

fn remove(folder: &Path) -> Result<(), String> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(format!("{}: {e}", folder.display())),
        _ => Ok(()),
    }
}

fn write(file: &Path, text: &str) -> Result<(), String> {
    fs::write(file, text).map_err(|e| format!("{}: {e}", file.display()))
}

fn output(command: &mut Command) -> Result<String, String> {
    crate::command::output(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_are_found_in_uris() {
        let text = "\
Reading package lists...
'http://mirror.example/pool/q/qemu_10.0%2bds-1_amd64.deb' qemu_1%3a10.0+ds-1_amd64.deb 10278596 SHA256:0a
'http://mirror.example/pool/s/seabios_1_all.deb' seabios_1_all.deb 163272
";
        assert_eq!(file_names(text), ["qemu_1%3a10.0+ds-1_amd64.deb", "seabios_1_all.deb"]);
        assert_eq!(exact("qemu_1%3a10.0+ds-1_amd64.deb").as_deref(), Some("qemu:amd64=1:10.0+ds-1"));
        assert_eq!(exact("seabios_1_all.deb").as_deref(), Some("seabios=1"));
        assert_eq!(file_names("E: no such package\n"), <[String; 0]>::default());
    }

    #[test]
    fn unwanted_packages_are_removed() {
        let folder = std::env::temp_dir().join(format!("xtask-keep-{}", std::process::id()));
        let paths =
            ["boot/vmlinuz-1", "boot/config-1", "lib/1/kernel/zram.ko.xz", "usr/library/std/lib.rs", "x/y"];
        for path in paths {
            let path = folder.join(path);
            create(path.parent().unwrap()).unwrap();
            write(&path, "").unwrap();
        }
        keep(&folder, &["vmlinu", "zram.ko", "library"]).unwrap();
        let left: Vec<_> = paths.iter().filter(|path| folder.join(path).exists()).collect();
        assert_eq!(left, [&paths[0], &paths[2], &paths[3]]);
        assert!(!folder.join("x").exists());
        keep(&folder, &[""]).unwrap();
        assert!(folder.join(paths[0]).exists());
        fs::remove_dir_all(folder).unwrap();
    }
}
