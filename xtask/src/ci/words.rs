//! Docs use the words of the glossary in CONTRIBUTING.md, and none that it retires.

use std::fs;
use std::path::{Path, PathBuf};

use super::step::Outcome;
use crate::tree;

/// Files and folders of which comments for docs, or the whole text of Markdown, are read.
const READ: [&str; 8] = [
    "CONTRIBUTING.md",
    "README.md",
    "SECURITY.md",
    "userfaultfd-sys/README.md",
    "userfaultfd-sys/src",
    "userfaultfd/README.md",
    "userfaultfd/src",
    "xtask/journal.md",
];

/// Words that are retired, as they stand in a sentence, and what to say.
const RETIRED: [(&str, &str); 8] = [
    ("absent", "missing"),
    ("waked", "woken"),
    ("whoever", "name the actor"),
    ("somebody", "name the actor"),
    ("so many", "name the number"),
    ("so often", "name the number"),
    ("is to be", "must, will"),
    ("are to be", "must, will"),
];

pub(super) fn run() -> Result<Outcome, String> {
    let mut files = Vec::new();
    for path in READ {
        find(&tree::root().join(path), &mut files)?;
    }
    files.sort();
    let mut found = Vec::new();
    for path in &files {
        let text = fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let path = path.strip_prefix(tree::root()).unwrap_or(path);
        let retired = retired(&text, path.extension().is_some_and(|extension| extension == "rs"));
        found.extend(
            retired
                .into_iter()
                .map(|(line, word, instead)| format!("{}:{line}: \"{word}\": say {instead}", path.display())),
        );
    }
    if found.is_empty() {
        println!("{} files", files.len());
        Ok(Outcome::Passed)
    } else {
        Err(format!("words that CONTRIBUTING.md retires:\n  {}", found.join("\n  ")))
    }
}

fn find(path: &Path, files: &mut Vec<PathBuf>) -> Result<(), String> {
    if !path.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    let error = |e| format!("{}: {e}", path.display());
    for entry in fs::read_dir(path).map_err(error)? {
        let path = entry.map_err(error)?.path();
        if path.is_dir() || path.extension().is_some_and(|extension| extension == "rs" || extension == "md") {
            find(&path, files)?;
        }
    }
    Ok(())
}

/// The retired words of a text, each with its line and what to say. Of Rust only comments for docs are read; no code.
fn retired(text: &str, is_rust: bool) -> Vec<(usize, &'static str, &'static str)> {
    let mut found = Vec::new();
    let mut is_code = false;
    for (number, line) in text.lines().enumerate() {
        let line = line.trim_start();
        let prose = match line.strip_prefix("///").or_else(|| line.strip_prefix("//!")) {
            Some(prose) => prose,
            None if is_rust => {
                is_code = false;
                continue;
            }
            None => line,
        };
        if prose.trim_start().starts_with("```") {
            is_code = !is_code;
        } else if !is_code && !is_entry(prose) {
            // Between backquotes, and where links lead to, stand names.
            let prose = prose.split('`').step_by(2).collect::<Vec<_>>().join("`").to_lowercase();
            let prose: String = prose
                .split("](")
                .enumerate()
                .map(|(at, part)| match part.split_once(')') {
                    Some((_, rest)) if at > 0 => rest,
                    _ => part,
                })
                .collect();
            let has = |(word, _): &&(&str, &str)| contains(&prose, word);
            found.extend(RETIRED.iter().filter(has).map(|(word, instead)| (number + 1, *word, *instead)));
        }
    }
    found
}

/// Whether a line is one of the glossary's own.
fn is_entry(prose: &str) -> bool {
    let cells: Vec<_> = prose.trim().trim_matches('|').split('|').map(str::trim).collect();
    cells.len() == 2 && RETIRED.iter().any(|(word, _)| cells[1].split(", ").any(|cell| cell == *word))
}

/// Whether a text has a word, or words, as such.
fn contains(text: &str, word: &str) -> bool {
    text.match_indices(word).any(|(at, _)| {
        let is_end = |c: Option<char>| !c.is_some_and(char::is_alphanumeric);
        is_end(text[..at].chars().next_back()) && is_end(text[at + word.len()..].chars().next())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retired_words_are_found_in_docs_alone() {
        let rust = "/// Whoever is waked\n/// ```\n/// somebody\n/// ```\nfn somebody() {} // absent\n//! So many, `absent`.\n";
        let lines: Vec<_> = retired(rust, true).iter().map(|(line, word, _)| (*line, *word)).collect();
        assert_eq!(lines, [(1, "waked"), (1, "whoever"), (6, "so many")]);
        assert_eq!(
            retired("an absent [page](Region::absent)\n    | missing | absent |\nabsently\n", false).len(),
            1
        );
    }
}
