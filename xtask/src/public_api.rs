//! `cargo xtask public-api`: the public interface of the library as text, so that a review sees what changes in it.

use std::fs;

use crate::command::{cargo, execute, features, output};
use crate::{diff, tree};

pub(crate) const USAGE: &str = "\
  public-api [--check]
      Write the public interface of the library to userfaultfd/public-api.txt; with --check, only say what would change.
";

/// The file, in the workspace.
const PATH: &str = "userfaultfd/public-api.txt";

/// The version of rustdoc's JSON that the crate `public-api` of xtask's Cargo.toml reads: Rust 1.93 to 1.95 write it.
const FORMAT: u64 = 57;

/// What came of a check.
pub(crate) enum Checked {
    Same,
    /// This Rust writes another version of JSON.
    OtherFormat(u64),
}

pub(crate) fn run(arguments: &[String]) -> Result<(), String> {
    let check = match arguments {
        [] => false,
        [one] if one == "--check" => true,
        [one, path] if one == "--render" => return render(path),
        _ => return Err(format!("public-api: unexpected arguments {arguments:?}")),
    };
    let other = |format| {
        format!(
            "rustdoc writes version {format} of its JSON, and xtask reads {FORMAT}: see the version of `public-api`"
        )
    };
    if check {
        return match self::check()? {
            Checked::Same => Ok(()),
            Checked::OtherFormat(format) => Err(other(format)),
        };
    }
    let text = current()?.map_err(other)?;
    fs::write(tree::root().join(PATH), text).map_err(|e| format!("{PATH}: {e}"))
}

/// Compares the file with the code.
pub(crate) fn check() -> Result<Checked, String> {
    let new = match current()? {
        Ok(text) => text,
        Err(format) => return Ok(Checked::OtherFormat(format)),
    };
    let old = fs::read_to_string(tree::root().join(PATH)).map_err(|e| format!("{PATH}: {e}"))?;
    let changes = diff::unified(PATH, &old, &new);
    if changes.is_empty() {
        return Ok(Checked::Same);
    }
    println!("{changes}");
    Err(format!(
        "the public interface isn't what {PATH} says: run `cargo xtask public-api`, and review the change"
    ))
}

/// The text, or the version of the JSON if it is another one.
fn current() -> Result<Result<String, u64>, String> {
    let folder = tree::scratch().join("public-api");
    // The committed bindings have all names, so that the feature that generates new ones changes nothing.
    let features: Vec<_> = features("userfaultfd")?.into_iter().filter(|name| name != "bindgen").collect();
    let features = format!("--features={}", features.join(","));
    let mut rustdoc = cargo(&["rustdoc", "--quiet", "--package=userfaultfd", "--lib", &features]);
    rustdoc.arg("--target-dir").arg(&folder).env("RUSTC_BOOTSTRAP", "1");
    execute(rustdoc.args(["--", "-Zunstable-options", "--output-format=json", "--cap-lints=allow"]))?;

    let path = folder.join("doc/userfaultfd.json");
    let json = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let json: serde_json::Value =
        serde_json::from_str(&json).map_err(|e| format!("{}: {e}", path.display()))?;
    match json["format_version"].as_u64().ok_or("rustdoc's JSON has no format_version")? {
        FORMAT => {}
        other => return Ok(Err(other)),
    }
    // A program of its own, since building what reads the JSON takes longer than all of xtask.
    let own = ["run", "--quiet", "--package=xtask", "--features=public-api", "--", "public-api", "--render"];
    output(cargo(&own).arg(&path)).map(Ok)
}

/// Prints the interface that a file of rustdoc's JSON describes.
#[cfg(feature = "public-api")]
fn render(path: &str) -> Result<(), String> {
    use std::collections::HashSet;

    /// Traits that the compiler implements and that nobody relies on.
    const UNINTERESTING: [&str; 6] = [
        "core::marker::Freeze for ",
        "core::marker::StructuralPartialEq for ",
        "core::marker::Unpin for ",
        "core::marker::UnsafeUnpin for ",
        "core::panic::unwind_safe::RefUnwindSafe for ",
        "core::panic::unwind_safe::UnwindSafe for ",
    ];

    let items = |brief: bool| {
        let builder = public_api::Builder::from_rustdoc_json(path).omit_blanket_impls(true);
        let builder = builder.omit_auto_trait_impls(brief).omit_auto_derived_impls(brief);
        let api = builder.build().map_err(|e| format!("{path}: {e}"))?;
        Ok::<Vec<String>, String>(api.items().map(ToString::to_string).collect())
    };
    // Of what is derived or automatic the line of the trait is enough: its methods say nothing.
    let brief: HashSet<_> = items(true)?.into_iter().collect();
    let is_trait =
        |line: &str| line.starts_with("impl") && !UNINTERESTING.iter().any(|part| line.contains(part));
    let lines: Vec<_> =
        items(false)?.into_iter().filter(|line| brief.contains(line) || is_trait(line)).collect();
    settled(&lines).iter().for_each(|line| println!("{line}"));
    Ok(())
}

/// Sorts the lines, and names what both `source` and `pager` have as that of `source`, except where it is declared. Rustdoc
/// names either, in the order of the code, so that the text would change with code that isn't public.
#[cfg(any(feature = "public-api", test))]
fn settled(lines: &[String]) -> Vec<String> {
    use std::collections::HashSet;

    const SOURCE: &str = "userfaultfd::source::";
    const PAGER: &str = "userfaultfd::pager::";
    const KINDS: [&str; 4] = ["pub struct ", "pub enum ", "pub trait ", "pub unsafe trait "];
    fn declared<'a>(line: &'a str, module: &str) -> Option<&'a str> {
        KINDS.iter().find_map(|kind| line.split_once(kind)?.1.strip_prefix(module)).map(word)
    }
    let names = |module| -> HashSet<_> { lines.iter().filter_map(|line| declared(line, module)).collect() };
    let (of_source, of_pager) = (names(SOURCE), names(PAGER));
    let settle = |line: &String| {
        if declared(line, PAGER).is_some() {
            return line.clone();
        }
        let mut parts = line.split(PAGER);
        let first = parts.next().unwrap_or_default().to_owned();
        parts.fold(first, |said, part| {
            let is_both = of_source.contains(word(part)) && of_pager.contains(word(part));
            said + if is_both { SOURCE } else { PAGER } + part
        })
    };
    let mut settled: Vec<_> = lines.iter().map(settle).collect();
    settled.sort_unstable();
    settled.dedup();
    settled
}

/// The name with which a text begins.
#[cfg(any(feature = "public-api", test))]
fn word(text: &str) -> &str {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default()
}

#[cfg(not(feature = "public-api"))]
fn render(_: &str) -> Result<(), String> {
    Err("public-api: --render is of xtask's feature `public-api`".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_does_not_depend_on_the_order_of_the_code() {
        let lines = |module: &str| {
            let lines = [
                "impl MODULEPageSource for userfaultfd::pager::Pager",
                "pub enum userfaultfd::pager::PageData",
                "pub enum userfaultfd::source::PageData",
                "pub fn MODULEPageSource::read(&self) -> MODULEPageData",
                "pub struct userfaultfd::pager::Pager",
                "pub trait userfaultfd::pager::PageSource",
                "pub trait userfaultfd::source::PageSource",
            ];
            lines.map(|line| line.replace("MODULE", module))
        };
        let expected = lines("userfaultfd::source::");
        assert_eq!(settled(&expected), expected);
        let mut other = lines("userfaultfd::pager::");
        other.reverse();
        assert_eq!(settled(&other), expected);
    }
}
