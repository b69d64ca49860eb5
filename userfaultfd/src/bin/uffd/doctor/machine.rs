//! What surrounds this process: filters, containers, KVM, huge pages, limits.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

use userfaultfd::pager::Budget;

use super::{Area, Check, State, first_line};

/// Descriptors that a handler has open for a virtual machine: its userfaultfd, its connection and its pidfd, and three duplicates
/// of the last two.
const DESCRIPTORS_A_MACHINE: u64 = 6;

/// The field of a file in /proc that has a name, a colon and a value in each line.
fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

/// The default size of huge pages, in bytes.
pub(super) fn huge_page_size() -> Option<usize> {
    kib(&field("/proc/meminfo", "Hugepagesize")?).and_then(|bytes| usize::try_from(bytes).ok())
}

/// The bytes of `123 kB`.
fn kib(text: &str) -> Option<u64> {
    text.strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// What may refuse things.
pub(super) fn surroundings() -> Vec<Check> {
    let note = |name, detail: &str| Check::new(Area::Surroundings, State::Note, name, detail);
    let mut checks = Vec::new();
    checks.push(match container() {
        Some(name) => note("container", name).helps(
            "where something is refused: a seccomp profile that allows userfaultfd, and --device /dev/userfaultfd, \
             --device /dev/kvm",
        ),
        None => note("container", "no sign of one"),
    });
    checks.push(match field("/proc/self/status", "Seccomp").as_deref() {
        Some("0") => note("seccomp", "no filter of system calls"),
        Some(_) => {
            note("seccomp", "a filter of system calls is at work: EPERM and ENOSYS may be its answers")
        }
        None => note("seccomp", "unknown, as /proc/self/status doesn't say it"),
    });
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let is_initial = map.split_whitespace().eq(["0", "0", "4294967295"]);
    checks.push(note(
        "user namespace",
        if is_initial { "the initial one" } else { "another one: its root has no rights outside of it" },
    ));
    let sysctl = first_line("/proc/sys/vm/unprivileged_userfaultfd");
    checks.push(note("vm.unprivileged_userfaultfd", sysctl.as_deref().unwrap_or("isn't there")));
    checks
}

/// The kind of container that this process runs in, by the marks that they leave.
fn container() -> Option<&'static str> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    if std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() || groups.contains("kubepods") {
        Some("Kubernetes")
    } else if Path::new("/.dockerenv").exists() || groups.contains("/docker") {
        Some("Docker")
    } else if Path::new("/run/.containerenv").exists() || groups.contains("/libpod") {
        Some("Podman")
    } else {
        Path::new("/run/systemd/container").exists().then_some("a container that systemd knows")
    }
}

pub(super) fn checks() -> Vec<Check> {
    let mut checks = vec![kvm()];
    checks.extend(huge_pages());
    checks.push(transparent());
    checks.push(memory());
    checks.push(pressure());
    checks.extend(open_files());
    checks
}

fn kvm() -> Check {
    let check = |state, detail: String| Check::new(Area::VirtualMachines, state, "/dev/kvm", detail);
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => check(State::Yes, "opens".into()),
        Err(error) if error.kind() == ErrorKind::NotFound => check(State::No, "isn't there".into())
            .helps("virtualisation switched on in the firmware, or nested in the hypervisor; the module kvm_intel or kvm_amd")
            .helps("in a container: --device /dev/kvm"),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => check(State::No, error.to_string())
            .helps("membership in the group kvm, from an administrator: usermod -aG kvm $USER"),
        Err(error) => check(State::No, error.to_string()),
    }
}

/// The pools of all sizes.
fn huge_pages() -> Vec<Check> {
    let Ok(folder) = fs::read_dir("/sys/kernel/mm/hugepages") else {
        let detail = "the kernel has none, or /sys isn't mounted";
        return vec![Check::new(Area::HugePages, State::No, "hugetlb", detail)];
    };
    let names = folder.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut pools: Vec<_> = names
        .filter_map(|name| {
            let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
            let number =
                |file| first_line(&format!("/sys/kernel/mm/hugepages/{name}/{file}"))?.parse::<u64>().ok();
            Some((kib << 10, number("nr_hugepages")?, number("free_hugepages")?, number("resv_hugepages")?))
        })
        .collect();
    pools.sort_unstable();
    let check = |(size, all, free, reserved): (u64, u64, u64, u64)| {
        let usable = free.saturating_sub(reserved);
        let state = if usable > 0 { State::Yes } else { State::No };
        let detail = format!("{usable} of {all} pages are free");
        let check = Check::new(Area::HugePages, state, format!("hugetlb, {}", mib(size)), detail);
        if usable > 0 {
            return check;
        }
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages", size >> 10);
        check.helps(format!("pages in the pool, from an administrator: echo NUMBER > {path}"))
    };
    pools.into_iter().map(check).collect()
}

fn transparent() -> Check {
    let check = |state, detail: &str| Check::new(Area::HugePages, state, "transparent", detail);
    let Some(line) = first_line("/sys/kernel/mm/transparent_hugepage/enabled") else {
        return check(State::No, "the kernel has none, or /sys isn't mounted");
    };
    match line.split(['[', ']']).nth(1) {
        Some("never") => check(State::No, "switched off")
            .helps("from an administrator: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"),
        Some(mode) => check(State::Yes, mode),
        None => check(State::Note, &line),
    }
}

fn memory() -> Check {
    let machine = field("/proc/meminfo", "MemTotal").and_then(|text| kib(&text));
    match (Budget::of_cgroup(1.0), machine) {
        // Whole pages of the machine's memory at most.
        (Ok(budget), Some(machine)) if (budget.bytes() as u64) < machine >> 12 << 12 => {
            let detail =
                format!("{} of {}: a limit of this container", mib(budget.bytes() as u64), mib(machine));
            Check::new(Area::Limits, State::Note, "memory", detail)
                .helps("where memory runs out: a budget below the limit (pager::Budget::of_cgroup), or a higher limit")
        }
        (Ok(_), Some(machine)) => {
            Check::new(Area::Limits, State::Yes, "memory", format!("{}, no limit below it", mib(machine)))
        }
        (Err(error), _) => Check::new(Area::Limits, State::Note, "memory", error.to_string()),
        (Ok(_), None) => {
            Check::new(Area::Limits, State::Note, "memory", "unknown, as /proc/meminfo doesn't say it")
        }
    }
}

fn pressure() -> Check {
    let check = |state, detail| Check::new(Area::Limits, state, "memory pressure", detail);
    match File::open("/proc/pressure/memory") {
        Ok(_) => check(State::Yes, "budgets shrink when memory is short"),
        Err(_) => check(State::No, "the kernel doesn't report it: budgets know the limit only")
            .helps("a kernel with CONFIG_PSI=y, booted with psi=1"),
    }
}

fn open_files() -> Option<Check> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    let mut numbers = line.split_whitespace();
    let (soft, hard) = (numbers.next()?, numbers.next()?);
    let machines = soft.parse::<u64>().ok().map(|soft| soft / DESCRIPTORS_A_MACHINE);
    let detail = match machines {
        Some(machines) => format!("{soft}: enough for some {machines} virtual machines in one handler"),
        None => soft.to_owned(),
    };
    let check = Check::new(Area::Limits, State::Note, "open files", detail);
    Some(if soft == hard {
        check.helps("for more, from an administrator: a higher hard limit (LimitNOFILE= of systemd)")
    } else {
        check.helps(format!("for more, up to {hard}: ulimit -n"))
    })
}
