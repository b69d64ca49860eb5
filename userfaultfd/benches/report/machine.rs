//! What the figures were measured on.

use std::fs;
use std::process::Command;

use crate::contenders::cpus;

/// Lines about this machine.
pub(crate) fn describe() -> String {
    let cpuinfo = read("/proc/cpuinfo");
    let field = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim_start_matches([' ', '\t', ':']).trim().to_owned())
    };
    let model = field(&cpuinfo, "model name").or_else(|| field(&cpuinfo, "Model"));
    let memory = field(&read("/proc/meminfo"), "MemTotal").unwrap_or_default();
    let memory: u64 = memory.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or(0);
    let virtual_machine = match cpuinfo.lines().find(|line| line.starts_with("flags")) {
        Some(flags) if flags.split_whitespace().any(|flag| flag == "hypervisor") => "a virtual machine",
        Some(_) => "not a virtual machine",
        None => "whether a virtual machine, its /proc/cpuinfo doesn't tell",
    };
    let load = read("/proc/loadavg");
    let load = load.split_whitespace().next().unwrap_or("?");
    let thp = read("/sys/kernel/mm/transparent_hugepage/enabled");
    let thp = thp.split(['[', ']']).nth(1).unwrap_or("not there");
    format!(
        "{} CPUs, {}, {} GiB, {virtual_machine}\nLinux {}, pages of {} bytes, transparent huge pages: {thp}\n\
         {}, load {load} when it began\n",
        cpus::ALLOWED.len(),
        model.as_deref().unwrap_or(std::env::consts::ARCH),
        memory.div_ceil(1 << 20),
        read("/proc/sys/kernel/osrelease").trim(),
        userfaultfd::page_size(),
        date(),
    )
}

/// The day and the minute, in UTC.
fn date() -> String {
    let output = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).output();
    match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => "date unknown".to_owned(),
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}
