//! `cargo xtask journal`: runs what takes long, and notes in `xtask/journal.md` when, where and how it ended.

use std::fs;
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::command::{cargo, display, output};
use crate::tree;

pub(crate) const USAGE: &str = "\
  journal [--note TEXT] COMMAND [ARGUMENT]...
      Run what takes longer than CI, and append date, commit, kernel, seconds and result to xtask/journal.md, whether it
      passes or fails. COMMAND is kernels, cross, mutants or sanitize, with their arguments; or
      soak [SECONDS]   the example `soak`; a quarter of an hour if nothing is said
      model [SECONDS]  random programs against a model of what snapshots must hold; likewise
";

/// The journal, in the workspace.
const PATH: &str = "xtask/journal.md";

/// How long a run takes that could go on for ever.
const SECONDS: u64 = 900;

/// Processes of the model. Its snapshots wait for much of their time.
const PROCESSES: usize = 6;

/// Where in the journal the newest line belongs.
const HEAD: &str = "| --- | --- | --- | ---: | --- | --- |\n";

pub(crate) fn run(arguments: &[String]) -> Result<(), String> {
    let (note, arguments) = match arguments {
        [option, note, rest @ ..] if option == "--note" => (note.as_str(), rest),
        _ => ("", arguments),
    };
    let mut command = command(arguments)?;
    let (commit, kernel, date) = (commit()?, tell("uname", &["-r"])?, tell("date", &["-u", "+%F"])?);
    println!("$ {}", display(&command));
    let start = Instant::now();
    let status = command.status().map_err(|e| format!("{}: {e}", display(&command)))?;
    let seconds = start.elapsed().as_secs();
    let result = match (status.success(), note) {
        (true, "") => "passed".to_owned(),
        (true, note) => format!("passed; {note}"),
        (false, "") => format!("FAILED: {status}"),
        (false, note) => format!("FAILED: {status}; {note}"),
    };
    let cells =
        [&date, &commit, &kernel, &seconds.to_string(), &format!("`{}`", arguments.join(" ")), &result];
    let line = cells.map(|cell| cell.replace('|', "\\|").replace('\n', " ")).join(" | ");

    // Read after the run: another one may have noted something meanwhile.
    let path = tree::root().join(PATH);
    let old = fs::read_to_string(&path).map_err(|e| format!("{PATH}: {e}"))?;
    fs::write(&path, insert(&old, &line)?).map_err(|e| format!("{PATH}: {e}"))?;
    println!("{PATH}: {line}");
    if status.success() { Ok(()) } else { Err(format!("{}: {status}", display(&command))) }
}

/// The journal with a line more.
fn insert(journal: &str, line: &str) -> Result<String, String> {
    let (before, after) = journal.split_once(HEAD).ok_or_else(|| format!("{PATH} has no table"))?;
    Ok(format!("{before}{HEAD}| {line} |\n{after}"))
}

fn command(arguments: &[String]) -> Result<Command, String> {
    let (name, rest) =
        arguments.split_first().ok_or_else(|| format!("journal: which command?\n\n{USAGE}"))?;
    let seconds = || match rest {
        [] => Ok(SECONDS),
        [seconds] => seconds.parse().map_err(|e| format!("journal: {name} {seconds}: {e}")),
        _ => Err(format!("journal: {name} takes a number of seconds")),
    };
    match name.as_str() {
        "kernels" | "cross" | "mutants" | "sanitize" => {
            let mut command = cargo(&["run", "--quiet", "--package=xtask", "--", name]);
            command.args(rest);
            Ok(command)
        }
        "soak" => {
            let mut command = cargo(&["run", "--release", "--quiet", "--package=userfaultfd-examples"]);
            command.args(["--example=soak", "--", "--seconds", &seconds()?.to_string()]);
            Ok(command)
        }
        "model" => Ok(model(seconds()?)),
        _ => Err(format!("journal: no command `{name}`\n\n{USAGE}")),
    }
}

/// The model of snapshots, for some seconds, from a seed that it says.
pub(crate) fn model(seconds: u64) -> Command {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() % 1_000_000);
    let mut command = cargo(&["test", "--package=userfaultfd", "--test=snapshot", "model::"]);
    command.env("USERFAULTFD_MODEL_SECONDS", seconds.to_string());
    command.env("USERFAULTFD_MODEL_SEED", seed.to_string());
    command.env("USERFAULTFD_MODEL_PROCESSES", PROCESSES.to_string());
    // The watchdog ends a test that hangs, not one that was told to go on.
    command.env("USERFAULTFD_TEST_SECONDS", (2 * seconds + 60).to_string());
    command
}

/// The commit, with a star if the tree has changes that aren't in it.
fn commit() -> Result<String, String> {
    let git = |arguments: &[&str]| output(Command::new("git").args(arguments).current_dir(tree::root()));
    let star = if git(&["status", "--porcelain"])?.is_empty() { "" } else { "*" };
    Ok(format!("{}{star}", git(&["rev-parse", "--short", "HEAD"])?.trim()))
}

fn tell(program: &str, arguments: &[&str]) -> Result<String, String> {
    Ok(output(Command::new(program).args(arguments))?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn newest_line_is_the_first() {
        let journal = fs::read_to_string(tree::root().join(PATH)).unwrap();
        let twice = insert(&insert(&journal, "older").unwrap(), "newer").unwrap();
        assert!(twice.contains(&format!("{HEAD}| newer |\n| older |\n")));
        assert_eq!(twice.replace("| newer |\n| older |\n", ""), journal);
        assert!(insert("no table", "line").is_err());
    }

    #[test]
    fn commands_that_make_no_sense_are_refused() {
        assert!(
            display(&command(&words(&["soak", "5"])).unwrap()).ends_with("--example=soak -- --seconds 5")
        );
        assert!(display(&command(&words(&["kernels", "5.10"])).unwrap()).ends_with("-- kernels 5.10"));
        let model = display(&command(&words(&["model"])).unwrap());
        assert!(
            model.contains("USERFAULTFD_MODEL_SECONDS=\"900\"") && model.contains("_TEST_SECONDS=\"1860\"")
        );
        for wrong in [&["soak", "long"][..], &["model", "1", "2"], &["ci"], &[]] {
            assert!(command(&words(wrong)).is_err(), "{wrong:?}");
        }
    }
}
