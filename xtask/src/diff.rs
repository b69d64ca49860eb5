//! A unified diff of two texts.

/// Lines of context around a change.
const CONTEXT: usize = 3;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Edit {
    Keep,
    Remove,
    Add,
}

/// The difference, or nothing where there is none.
pub(crate) fn unified(name: &str, old: &str, new: &str) -> String {
    let old: Vec<_> = old.lines().collect();
    let new: Vec<_> = new.lines().collect();
    let edits = edits(&old, &new);
    let changed: Vec<_> = (0..edits.len()).filter(|&i| edits[i].0 != Edit::Keep).collect();
    let Some(&first) = changed.first() else { return String::new() };

    let mut text = format!("--- {name}\n+++ {name} (regenerated)\n");
    let mut start = first.saturating_sub(CONTEXT);
    for (index, &change) in changed.iter().enumerate() {
        let next = changed.get(index + 1).copied().unwrap_or(usize::MAX);
        if next > change.saturating_add(2 * CONTEXT + 1) {
            let end = (change + CONTEXT + 1).min(edits.len());
            hunk(&mut text, &edits[..end], start);
            start = next.saturating_sub(CONTEXT);
        }
    }
    text
}

/// Appends the edits from `start` on.
fn hunk(text: &mut String, edits: &[(Edit, &str)], start: usize) {
    let count = |edits: &[(Edit, &str)], other| edits.iter().filter(|(edit, _)| *edit != other).count();
    let (before, within) = edits.split_at(start);
    *text += &format!(
        "@@ -{},{} +{},{} @@\n",
        count(before, Edit::Add) + 1,
        count(within, Edit::Add),
        count(before, Edit::Remove) + 1,
        count(within, Edit::Remove)
    );
    for (edit, line) in within {
        let sign = match edit {
            Edit::Keep => ' ',
            Edit::Remove => '-',
            Edit::Add => '+',
        };
        *text += &format!("{sign}{line}\n");
    }
}

/// The shortest way from one text to the other, by the table of longest common subsequences: quadratic, for texts of
/// some hundred lines.
fn edits<'a>(old: &[&'a str], new: &[&'a str]) -> Vec<(Edit, &'a str)> {
    let mut common = vec![vec![0_usize; new.len() + 1]; old.len() + 1];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            common[i][j] = if old[i] == new[j] {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    let mut edits = Vec::new();
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            edits.push((Edit::Keep, old[i]));
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || i < old.len() && common[i + 1][j] >= common[i][j + 1] {
            edits.push((Edit::Remove, old[i]));
            i += 1;
        } else {
            edits.push((Edit::Add, new[j]));
            j += 1;
        }
    }
    edits
}

#[cfg(test)]
mod tests {
    use super::unified;

    #[test]
    fn equal_texts_have_no_difference() {
        assert_eq!(unified("x", "a\nb\n", "a\nb\n"), "");
    }

    #[test]
    fn change_has_its_context() {
        let old: String = (1..=10).map(|n| format!("{n}\n")).collect();
        let new = old.replace("5\n", "five\n");
        let expected = "--- x\n+++ x (regenerated)\n@@ -2,7 +2,7 @@\n 2\n 3\n 4\n-5\n+five\n 6\n 7\n 8\n";
        assert_eq!(unified("x", &old, &new), expected);
    }

    #[test]
    fn far_changes_are_hunks_of_their_own() {
        let old: String = (1..=20).map(|n| format!("{n}\n")).collect();
        let new = old.replace("1\n2\n", "2\n").replace("20\n", "20\n21\n");
        let expected = "--- x\n+++ x (regenerated)\n@@ -1,4 +1,3 @@\n-1\n 2\n 3\n 4\n@@ -18,3 +17,4 @@\n 18\n 19\n 20\n+21\n";
        assert_eq!(unified("x", &old, &new), expected);
    }
}
