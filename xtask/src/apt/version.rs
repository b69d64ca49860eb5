//! Names of packages that carry a version.

use std::cmp::Ordering;

/// Those of `names` that match `pattern`, in which one `*` stands for something that starts with a digit; the newest
/// first.
pub(super) fn matching<'a>(pattern: &str, names: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let matches = names.into_iter().filter_map(|name| Some((part(pattern, name)?, name)));
    let mut matches: Vec<_> = matches.collect();
    matches.sort_by(|(a, _), (b, _)| compare(b, a));
    matches.into_iter().map(|(_, name)| name).collect()
}

/// What `*` stands for.
fn part<'a>(pattern: &str, name: &'a str) -> Option<&'a str> {
    let Some((before, after)) = pattern.split_once('*') else {
        return (pattern == name).then_some("");
    };
    let part = name.strip_prefix(before)?.strip_suffix(after)?;
    part.starts_with(|c: char| c.is_ascii_digit()).then_some(part)
}

/// Debian's order of versions: digits by value; of the rest `~` first, even before the end, then the end, then
/// letters, then everything else.
fn compare(mut a: &str, mut b: &str) -> Ordering {
    while !(a.is_empty() && b.is_empty()) {
        let (text_a, text_b) = (take(&mut a, |c| !c.is_ascii_digit()), take(&mut b, |c| !c.is_ascii_digit()));
        let weights = |text: &str| text.chars().map(weight).chain([0]).collect::<Vec<_>>();
        let (number_a, number_b) =
            (take(&mut a, |c| c.is_ascii_digit()), take(&mut b, |c| c.is_ascii_digit()));
        let number = |text: &str| text.parse::<u64>().unwrap_or(0);
        let order = weights(text_a).cmp(&weights(text_b)).then(number(number_a).cmp(&number(number_b)));
        if order != Ordering::Equal {
            return order;
        }
    }
    Ordering::Equal
}

fn weight(c: char) -> i64 {
    match c {
        '~' => -1,
        c if c.is_ascii_alphabetic() => i64::from(u32::from(c)),
        c => i64::from(u32::from(c)) + 256,
    }
}

/// Takes the start of `text` for which `of` holds.
fn take<'a>(text: &mut &'a str, of: impl Fn(char) -> bool) -> &'a str {
    let end = text.find(|c| !of(c)).unwrap_or(text.len());
    let (start, rest) = text.split_at(end);
    *text = rest;
    start
}

#[cfg(test)]
mod tests {
    use super::*;

    fn newest<'a>(pattern: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
        matching(pattern, names).first().copied()
    }

    #[test]
    fn numbers_count_by_value() {
        let names =
            ["6.12.9-cloud", "6.12.117+deb13.1-cloud", "6.12.117+deb13-cloud", "6.12.90+deb13.1-cloud"];
        let names = names.map(|name| format!("linux-image-{name}-amd64"));
        let newest = newest("linux-image-6.12.*-cloud-amd64", names.iter().map(String::as_str));
        assert_eq!(newest, Some("linux-image-6.12.117+deb13.1-cloud-amd64"));
    }

    #[test]
    fn versions_are_in_debians_order() {
        let ordered = ["1.0~rc1", "1.0", "1.0a", "1.0+b1", "1.0.1", "1.9", "1.10", "2", "10"];
        for (i, a) in ordered.iter().enumerate() {
            for (j, b) in ordered.iter().enumerate() {
                assert_eq!(compare(a, b), i.cmp(&j), "{a} {b}");
            }
        }
    }

    #[test]
    fn other_flavours_do_not_match() {
        let names = [
            "linux-image-6.1-cloud-amd64",
            "linux-image-6.1.0-56-amd64",
            "linux-image-6.1.0-56-cloud-amd64-unsigned",
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-0.deb11.52-cloud-amd64",
            "linux-image-6.12.1-cloud-amd64",
        ];
        assert_eq!(newest("linux-image-6.1.*-cloud-amd64", names), Some("linux-image-6.1.0-9-cloud-amd64"));
        assert_eq!(newest("linux-image-6.2.*-cloud-amd64", names), None);
        assert_eq!(newest("linux-image-6.1.*-cloud-arm64", names), None);
        // A name in which both ends would overlap.
        assert_eq!(newest("linux-image-6.1.*-cloud-amd64", ["linux-image-6.1-cloud-amd64"]), None);
    }

    #[test]
    fn pattern_without_a_star_is_a_name() {
        assert_eq!(newest("busybox-static", ["busybox", "busybox-static"]), Some("busybox-static"));
    }
}
