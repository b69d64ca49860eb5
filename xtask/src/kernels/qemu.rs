//! QEMU: given, found, or fetched; and a run of a guest in it.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::table::Arch;

/// An argument without which process 1 does nothing.
const ARGUMENT: &str = "i-am-a-guest";

/// How to start QEMU.
#[derive(Clone, Debug)]
pub(super) struct Qemu {
    program: PathBuf,
    /// What comes before QEMU's own arguments.
    arguments: Vec<OsString>,
}

/// What a guest is started with.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    pub(super) qemu: Qemu,
    pub(super) arch: Arch,
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
}

impl Qemu {
    /// A program that the machine has.
    pub(super) fn installed(path: &Path) -> Self {
        Self { program: path.to_owned(), arguments: Vec::new() }
    }

    /// The program of this name in PATH.
    pub(super) fn find(name: &str) -> Option<Self> {
        let paths = env::var_os("PATH")?;
        let found = env::split_paths(&paths).map(|folder| folder.join(name)).find(|path| path.is_file());
        found.map(|path| Self::installed(&path))
    }

    /// The program of this name in unpacked packages, with its own libraries: this machine's may be others. The
    /// dynamic linker is told where they are.
    pub(super) fn unpacked(tree: &Path, name: &str) -> Result<Self, String> {
        let program = tree.join("usr/bin").join(name);
        let mut libraries = Vec::new();
        for folder in ["usr/lib", "lib"] {
            let entries = fs::read_dir(tree.join(folder)).into_iter().flatten().flatten();
            libraries.extend(entries.map(|entry| entry.path()).filter(|path| {
                path.is_dir() && path.file_name().is_some_and(|n| n.to_string_lossy().contains("-linux-gnu"))
            }));
        }
        let is_linker = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            (name.starts_with("ld-linux") || name.starts_with("ld64.so")) && path.is_file()
        };
        let mut files = libraries.iter().flat_map(|folder| {
            fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
        });
        let linker = files.find(is_linker);
        let (Some(linker), true) = (linker, program.is_file()) else {
            return Err(format!("{} has no {name} with a dynamic linker", tree.display()));
        };
        let path = env::join_paths(&libraries).map_err(|e| format!("{}: {e}", tree.display()))?;
        let mut arguments = vec!["--library-path".into(), path, program.into_os_string()];
        for firmware in ["usr/share/qemu", "usr/share/seabios"] {
            arguments.extend(["-L".into(), tree.join(firmware).into_os_string()]);
        }
        Ok(Self { program: linker, arguments })
    }

    /// What it says that it is.
    pub(super) fn version(&self) -> Result<String, String> {
        let text = crate::command::output(self.command().arg("--version"))?;
        Ok(text.lines().next().unwrap_or_default().to_owned())
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        command
    }
}

impl Machine {
    fn command(&self) -> Command {
        let mut command = self.qemu.command();
        command.args(&self.arch.qemu_arguments);
        // Never the hardware's virtualisation: most machines that run this are virtual themselves.
        command.args(["-accel", "tcg,thread=multi", "-smp", "2", "-m", &self.arch.memory.to_string()]);
        command.args(["-no-user-config", "-no-reboot", "-nic", "none", "-display", "none"]);
        command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.initramfs);
        let (console, arguments) = (&self.arch.console, self.arch.kernel_arguments.join(" "));
        // A kernel from before 6.5 has memfd_secret(2) only if asked.
        let line = format!("console={console} quiet panic=-1 secretmem.enable=1 {arguments} -- {ARGUMENT}");
        command.args(["-append", &line]);
        command
    }

    /// Runs the guest until it powers off, with its console in the file `log`. `None` if it doesn't until `limit`.
    pub(super) fn run(&self, log: &Path, limit: Duration) -> Result<Option<ExitStatus>, String> {
        let error = |e| format!("{}: {e}", log.display());
        let console = File::create(log).map_err(error)?;
        let errors = console.try_clone().map_err(error)?;
        let mut command = self.command();
        command.args(["-monitor", "none", "-serial", "stdio"]);
        command.stdin(Stdio::null()).stdout(console).stderr(errors);
        let mut child = Guard(command.spawn().map_err(|e| format!("{}: {e}", self.qemu.program.display()))?);
        let start = Instant::now();
        while start.elapsed() < limit {
            if let Some(status) = child.0.try_wait().map_err(|e| format!("QEMU: {e}"))? {
                return Ok(Some(status));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(None)
    }

    /// Runs the guest with its console on this terminal.
    pub(super) fn run_here(&self) -> Result<(), String> {
        let mut command = self.command();
        command.args(["-serial", "mon:stdio"]);
        let status = command.status().map_err(|e| format!("{}: {e}", self.qemu.program.display()))?;
        if status.success() { Ok(()) } else { Err(format!("QEMU: {status}")) }
    }
}

/// A process that doesn't outlive this.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
