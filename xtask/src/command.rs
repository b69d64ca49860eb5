//! Running programs.

use std::env;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::tree;

/// The cargo that runs this program, in the workspace.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(tree::root());
    command
}

/// Runs a command that shows its own output.
pub(crate) fn execute(command: &mut Command) -> Result<(), String> {
    println!("$ {}", display(command));
    let status = command.status().map_err(|e| format!("{}: {e}", display(command)))?;
    if status.success() { Ok(()) } else { Err(format!("{}: {status}", display(command))) }
}

/// Runs a command for what it says.
pub(crate) fn output(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|e| format!("{}: {e}", display(command)))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        let errors = String::from_utf8_lossy(&output.stderr);
        Err(format!("{}: {}: {}", display(command), output.status, errors.trim_end()))
    }
}

/// The command without the path of its program, and with the environment that is set for it.
pub(crate) fn display(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let mut words: Vec<_> = command
        .get_envs()
        .filter_map(|(name, value)| Some(format!("{}={:?}", name.to_string_lossy(), value?)))
        .collect();
    words.push(program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned());
    words.extend(command.get_args().map(|argument| argument.to_string_lossy().into_owned()));
    words.join(" ")
}

/// The cargo features of one of the workspace's packages, without `default`.
pub(crate) fn features(package: &str) -> Result<Vec<String>, String> {
    let text = output(&mut cargo(&["metadata", "--no-deps", "--format-version=1"]))?;
    let metadata: Value = serde_json::from_str(&text).map_err(|e| format!("cargo metadata: {e}"))?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let features =
        packages.filter(|entry| entry["name"] == package).find_map(|entry| entry["features"].as_object());
    let features = features.ok_or_else(|| format!("cargo metadata tells no features of {package}"))?;
    Ok(features.keys().filter(|name| *name != "default").cloned().collect())
}
