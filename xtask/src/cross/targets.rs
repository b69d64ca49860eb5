//! The targets, and what is there for each.

/// A target of Rust that the crates are checked for.
#[derive(Debug)]
pub(crate) struct Target {
    /// What most programs for it are built for.
    pub(crate) name: &'static str,
    /// The architecture by Debian's name, if Debian has a standard library for it.
    pub(super) debian: Option<&'static str>,
    /// What tests are built for, as static programs, and the emulator's name for it. `Err` is why there are none.
    pub(super) tests: Result<Tests, &'static str>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Tests {
    pub(super) target: &'static str,
    pub(super) qemu: &'static str,
}

const fn target(
    name: &'static str,
    debian: Option<&'static str>,
    target: &'static str,
    qemu: &'static str,
) -> Target {
    Target { name, debian, tests: Ok(Tests { target, qemu }) }
}

/// Debian calls what Rust calls armv7 with hard floats `armhf`.
pub(crate) const TARGETS: &[Target] = &[
    target("aarch64-unknown-linux-gnu", Some("arm64"), "aarch64-unknown-linux-musl", "aarch64"),
    target("armv7-unknown-linux-gnueabihf", Some("armhf"), "armv7-unknown-linux-musleabihf", "arm"),
    target("i686-unknown-linux-gnu", Some("i386"), "i686-unknown-linux-musl", "i386"),
    target("riscv64gc-unknown-linux-gnu", Some("riscv64"), "riscv64gc-unknown-linux-musl", "riscv64"),
    target("s390x-unknown-linux-gnu", Some("s390x"), "s390x-unknown-linux-musl", "s390x"),
    target("powerpc64le-unknown-linux-gnu", Some("ppc64el"), "powerpc64le-unknown-linux-musl", "ppc64le"),
    target("powerpc64-unknown-linux-gnu", None, "powerpc64-unknown-linux-musl", "ppc64"),
    target("mips64el-unknown-linux-gnuabi64", None, "mips64el-unknown-linux-muslabi64", "mips64el"),
    target("loongarch64-unknown-linux-gnu", None, "loongarch64-unknown-linux-musl", "loongarch64"),
    target("x86_64-unknown-linux-musl", None, "x86_64-unknown-linux-musl", "x86_64"),
    Target {
        name: "aarch64-linux-android",
        debian: None,
        tests: Err("zig has no libc of Android's to link with"),
    },
];

/// The targets of these names: whole ones, or their architectures. All if there are none.
pub(super) fn select(names: &[String]) -> Result<Vec<&'static Target>, String> {
    if names.is_empty() {
        return Ok(TARGETS.iter().collect());
    }
    let mut selected = Vec::new();
    for name in names {
        let whole = TARGETS.iter().filter(|target| target.name == name);
        let of_arch = TARGETS.iter().filter(|target| target.name.split('-').next() == Some(name));
        let mut found: Vec<_> = whole.chain(of_arch).collect();
        if found.is_empty() {
            return Err(format!("no target `{name}`: see cargo xtask cross --list"));
        }
        selected.append(&mut found);
    }
    Ok(selected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_selected_by_name_and_by_architecture() {
        let names = |words: &[&str]| {
            let words: Vec<_> = words.iter().map(|word| (*word).to_owned()).collect();
            select(&words).map(|found| found.iter().map(|target| target.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&[]).unwrap().len(), TARGETS.len());
        assert_eq!(names(&["s390x"]).unwrap(), ["s390x-unknown-linux-gnu"]);
        let both = ["aarch64-unknown-linux-gnu", "aarch64-linux-android"];
        assert_eq!(names(&["aarch64"]).unwrap(), both);
        assert_eq!(names(&["aarch64-linux-android"]).unwrap(), both[1..]);
        assert!(names(&["vax"]).is_err());
    }

    #[test]
    fn tests_are_of_the_target_s_architecture() {
        for target in TARGETS {
            let arch = target.name.split('-').next().unwrap();
            let tests = target.tests.map_or(arch, |tests| tests.target);
            assert!(tests.starts_with(arch), "{}: {tests}", target.name);
        }
    }
}
