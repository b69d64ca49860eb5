//! Help, manual pages and completions.

use std::io::Read;
use std::process::Stdio;

use crate::program::{PATH, command, run};
use crate::support::require;

/// The subcommands that a user sees, as help lists them.
fn subcommands() -> Vec<String> {
    let help = run(&["--help"]);
    assert!(help.code == Some(0) && help.err.is_empty(), "{help:?}");
    assert!(help.out.contains("Exit codes:\n  0  "), "{}", help.out);
    let listed = help.out.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names = listed.take_while(|line| !line.is_empty()).filter_map(|line| line.split_whitespace().next());
    names.filter(|name| *name != "help").map(str::to_owned).collect()
}

#[test]
fn each_subcommand_has_help_manual_and_completions() {
    require!();
    let names = subcommands();
    assert!(names.iter().any(|name| name == "doctor"), "{names:?}");
    let manual = run(&["man"]);
    assert!(manual.code == Some(0) && manual.err.is_empty(), "{manual:?}");
    assert!(manual.out.contains(".SH SYNOPSIS"), "{}", manual.out);
    let shells = ["bash", "elvish", "fish", "powershell", "zsh"].map(|shell| {
        let completions = run(&["completions", shell]);
        assert!(completions.code == Some(0) && completions.err.is_empty(), "{completions:?}");
        completions.out
    });
    for name in names {
        let help = run(&[&name, "--help"]);
        assert!(help.code == Some(0) && help.out.contains("Usage: uffd"), "{help:?}");
        // As troff writes it.
        let written = name.replace('-', "\\-");
        assert!(manual.out.contains(&format!("uffd\\-{written}(1)")), "{name}: {}", manual.out);
        shells.iter().for_each(|completions| assert!(completions.contains(&*name), "{name}: {completions}"));
        if name != "man" {
            let page = run(&["man", &name]);
            assert!(page.code == Some(0) && page.out.contains(&format!("uffd\\-{written}")), "{page:?}");
        }
    }
    let page = run(&["man", "ws-merge"]);
    assert!(page.code == Some(0) && page.out.contains("\\-\\-common"), "{page:?}");
}

#[test]
fn arguments_that_cannot_be_end_with_2() {
    require!();
    for arguments in [&[][..], &["nothing"], &["doctor", "--xml"], &["man", "nothing"], &["completions", "c"]]
    {
        let said = run(arguments);
        assert!(said.code == Some(2) && said.out.is_empty(), "{arguments:?}: {said:?}");
        assert!(said.err.contains("--help"), "{arguments:?}: {said:?}");
    }
}

#[test]
fn reader_that_goes_early_is_no_error() {
    require!();
    let mut child = command(PATH, &["completions", "bash"]);
    let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert!(child.wait().unwrap().success() && err.is_empty(), "{err}");
}
