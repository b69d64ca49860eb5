//! Where this machine has its packages from: APT's own configuration, read in both of its forms.

use std::fs;
use std::path::{Path, PathBuf};

/// What can be carried over from a configured source to other suites of the same mirror.
const CARRIED: [&str; 4] = ["Signed-By", "Trusted", "Check-Valid-Until", "Check-Date"];

/// A configured source of binary packages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Source {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    /// Fields of [`CARRIED`] with their values, which may have several lines.
    fields: Vec<(String, String)>,
}

/// The sources that are configured in a folder like /etc/apt.
pub(super) fn configured(folder: &Path) -> Vec<Source> {
    let mut files = vec![folder.join("sources.list")];
    let parts = fs::read_dir(folder.join("sources.list.d")).into_iter().flatten().flatten();
    let mut parts: Vec<PathBuf> = parts.map(|entry| entry.path()).collect();
    parts.sort();
    files.append(&mut parts);

    let mut sources = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(one_line(&text)),
            Some("sources") => sources.extend(deb822(&text)),
            _ => {}
        }
    }
    sources
}

/// `deb [option=value …] URI SUITE COMPONENT…`
fn one_line(text: &str) -> Vec<Source> {
    let source = |line: &str| {
        let line = line.split('#').next().unwrap_or_default().trim();
        let line = line.strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim_start();
        let (options, rest) = match line.strip_prefix('[') {
            Some(line) => line.split_once(']')?,
            None => ("", line),
        };
        let mut words = rest.split_whitespace().map(str::to_owned);
        let (uri, suite) = (words.next()?, words.next()?);
        let field = |option: &str| {
            let (name, value) = option.split_once('=')?;
            let name = CARRIED.iter().find(|carried| carried.eq_ignore_ascii_case(name))?;
            Some(((*name).to_owned(), value.replace(',', " ")))
        };
        let fields = options.split_whitespace().filter_map(field).collect();
        Some(Source { uris: vec![uri], suites: vec![suite], components: words.collect(), fields })
    };
    text.lines().filter_map(source).collect()
}

/// Stanzas of `Field: value`, where a value may go on in lines that start with a blank.
fn deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    // A blank line at the end ends the last stanza.
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            sources.extend(stanza(std::mem::take(&mut fields)));
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.trim().to_owned(), value.trim().to_owned()));
        }
    }
    sources
}

fn stanza(fields: Vec<(String, String)>) -> Option<Source> {
    let value = |wanted: &str| {
        let field = fields.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted));
        field.map(|(_, value)| value.as_str()).unwrap_or_default()
    };
    let words = |name: &str| value(name).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let off = ["no", "false", "0", "off", "without", "disable"];
    if !words("Types").contains(&"deb".to_owned()) || off.contains(&value("Enabled")) {
        return None;
    }
    let (uris, suites, components) = (words("URIs"), words("Suites"), words("Components"));
    let carried = |(name, value): (String, String)| {
        let name = CARRIED.iter().find(|carried| carried.eq_ignore_ascii_case(&name))?;
        Some(((*name).to_owned(), value))
    };
    let fields = fields.into_iter().filter_map(carried).collect();
    Some(Source { uris, suites, components, fields })
}

/// Sources for other suites than the configured ones, on the configured mirrors, in the form of deb822.
///
/// `release` is the code name of the machine's release, which tells the distribution's own sources from others. A
/// suite for security has a mirror of its own. Each suite is a stanza: one that doesn't exist doesn't hide others.
pub(super) fn other_suites(configured: &[Source], release: &str, suites: &[&str], arch: &str) -> String {
    let with = |matches: &dyn Fn(&str) -> bool| -> Vec<&Source> {
        let has = |source: &&Source| {
            source.suites.iter().any(|suite| matches(suite)) && source.components.iter().any(|c| c == "main")
        };
        configured.iter().filter(has).collect()
    };
    // A release goes by its code name or by what it is.
    let names = [release, "stable", "testing", "unstable", "sid"];
    let all = names.map(|name| with(&|suite| suite == name)).into_iter().find(|found| !found.is_empty());
    let all = all.unwrap_or_default();
    // Others than the distribution have suites of the release's name, too, but no updates of it.
    let updates = with(&|suite| suite.ends_with("-updates"));
    let own = |source: &&Source| updates.iter().any(|other| other.uris == source.uris);
    let main = if all.iter().any(own) { all.into_iter().filter(own).collect() } else { all };
    let security = with(&|suite| suite.ends_with("-security"));

    let mut text = String::new();
    for suite in suites {
        let mirrors = if suite.ends_with("-security") { &security } else { &main };
        for source in mirrors {
            text += &format!("Types: deb\nURIs: {}\nSuites: {suite}\n", source.uris.join(" "));
            text += &format!("Components: main\nArchitectures: {arch}\n");
            source.fields.iter().for_each(|(name, value)| text += &format!("{name}: {value}\n"));
            text += "\n";
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "\
Types: deb
# a comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/archive.gpg

Types: deb deb-src
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Check-Valid-Until: no
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc

Types: deb
URIs: http://other.example/tools
Suites: bookworm
Components: main

Types: deb-src
URIs: http://mirror.example/debian
Suites: bookworm

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main";

    const ONE_LINE: &str = "\
# deb http://comment.example/debian bookworm main
deb http://mirror.example/debian bookworm main contrib # behind
deb-src http://mirror.example/debian bookworm main
deb [ arch=amd64 signed-by=/keys/a.gpg,/keys/b.gpg trusted=yes ] http://mirror.example/debian bookworm-updates main
deb\thttp://mirror.example/debian-security   bookworm-security main
";

    #[test]
    fn stanzas_are_read() {
        let sources = deb822(DEB822);
        assert_eq!(sources.len(), 3);
        assert_eq!(sources[0].uris, ["http://mirror.example/debian"]);
        assert_eq!(sources[0].suites, ["bookworm", "bookworm-updates"]);
        assert_eq!(sources[0].components, ["main", "contrib"]);
        assert_eq!(sources[0].fields.len(), 1);
        let key = "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc";
        assert!(sources[1].fields.contains(&("Signed-By".to_owned(), key.to_owned())));
    }

    #[test]
    fn lines_are_read() {
        let sources = one_line(ONE_LINE);
        assert_eq!(sources.len(), 3);
        assert_eq!(sources[0].suites, ["bookworm"]);
        assert_eq!(sources[0].components, ["main", "contrib"]);
        let fields = [("Signed-By", "/keys/a.gpg /keys/b.gpg"), ("Trusted", "yes")];
        assert_eq!(sources[1].fields, fields.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert_eq!(sources[2].uris, ["http://mirror.example/debian-security"]);
    }

    #[test]
    fn suites_come_from_the_mirror_that_has_their_kind() {
        let text = other_suites(&deb822(DEB822), "bookworm", &["trixie", "trixie-security"], "amd64");
        let stanzas: Vec<_> = text.split("\n\n").filter(|stanza| !stanza.is_empty()).collect();
        assert_eq!(stanzas.len(), 2, "{text}");
        assert_eq!(
            stanzas[0],
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie\nComponents: main\n\
             Architectures: amd64\nSigned-By: /usr/share/keyrings/archive.gpg"
        );
        assert!(stanzas[1].contains("debian-security\nSuites: trixie-security\n"), "{text}");
        assert!(stanzas[1].contains("Check-Valid-Until: no\n"), "{text}");
        assert!(
            stanzas[1].ends_with("Signed-By: \n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc"),
            "{text}"
        );
    }

    #[test]
    fn mirror_is_found_by_release_without_updates() {
        let configured = one_line("deb http://mirror.example/debian bookworm main\n");
        let text = other_suites(&configured, "bookworm", &["trixie", "trixie-security"], "arm64");
        assert!(text.contains("Suites: trixie\n") && text.contains("Architectures: arm64\n"), "{text}");
        assert!(!text.contains("trixie-security"), "{text}");
    }
}
