//! Lines of the report, and how they are written.

use std::fmt::Write;

use crate::measure::Summary;

/// What a figure counts.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unit {
    /// Seconds.
    Time,
    /// Bytes in a second.
    Bytes,
    /// Something in a second.
    Rate,
    /// Something.
    Count,
}

impl Unit {
    /// A figure with three digits.
    pub(crate) fn format(self, value: f64) -> String {
        let scaled = |steps: &[(f64, &str)]| {
            let fits = steps.iter().find(|(least, _)| value >= *least).or(steps.last());
            let (least, name) = fits.expect("a unit has a step");
            let value = value / least;
            let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
            format!("{value:.decimals$}{name}")
        };
        match self {
            Self::Time => scaled(&[(1.0, " s"), (1e-3, " ms"), (1e-6, " µs"), (1e-9, " ns")]),
            Self::Bytes => scaled(&[(1e9, " GB/s"), (1e6, " MB/s"), (1e3, " kB/s")]),
            Self::Count => format!("{value:.0}"),
            Self::Rate => scaled(&[(1e6, " M/s"), (1e3, " k/s"), (1.0, " /s")]),
        }
    }

    fn with_spread(self, summary: &Summary) -> String {
        let [low, high] = summary.quartiles.map(|value| self.format(value));
        format!("{} ({}…{})", self.format(summary.median), low.split(' ').next().unwrap_or(""), high)
    }
}

/// The target of a ratio, or a figure.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// The ratio is at most this.
    AtMost(f64),
    /// The ratio is at least this.
    AtLeast(f64),
    /// The figure itself is at least this.
    Figure(f64),
    /// Nothing is asked.
    Shown,
}

/// A comparison.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) work: String,
    pub(crate) against: String,
    pub(crate) unit: Unit,
    pub(crate) ours: Option<Summary>,
    pub(crate) theirs: Option<Summary>,
    pub(crate) ratio: Option<Summary>,
    pub(crate) target: Target,
}

impl Line {
    fn verdict(&self) -> &'static str {
        let ratio = self.ratio.as_ref().map(|ratio| ratio.median);
        let met = match self.target {
            Target::AtMost(most) => ratio.map(|ratio| ratio <= most),
            Target::AtLeast(least) => ratio.map(|ratio| ratio >= least),
            Target::Figure(least) => self.ours.as_ref().map(|ours| ours.median >= least),
            Target::Shown => return "",
        };
        match met {
            Some(true) => "met",
            Some(false) => "NOT MET",
            None => "not measured",
        }
    }

    fn cells(&self) -> Vec<String> {
        let figure = |summary: &Option<Summary>| {
            summary.as_ref().map_or("–".to_owned(), |summary| self.unit.with_spread(summary))
        };
        let ratio = self.ratio.as_ref().map_or(String::new(), |ratio| match ratio.range {
            Some([low, high]) => format!("{:.3} ({low:.3}…{high:.3})", ratio.median),
            None => format!("{:.3} (too few)", ratio.median),
        });
        let target = match self.target {
            Target::AtMost(most) => format!("≤ {most}"),
            Target::AtLeast(least) => format!("≥ {least}"),
            Target::Figure(least) => format!("≥ {}", self.unit.format(least)),
            Target::Shown => "shown".to_owned(),
        };
        let against = if self.against.is_empty() { "–" } else { &self.against };
        vec![
            self.work.clone(),
            figure(&self.ours),
            against.to_owned(),
            figure(&self.theirs),
            ratio,
            target,
            self.verdict().to_owned(),
        ]
    }
}

/// What a row of the report came to.
#[derive(Debug, Default)]
pub(crate) struct Section {
    pub(crate) title: &'static str,
    pub(crate) lines: Vec<Line>,
    /// A table of figures with its header, for what isn't compared by pairs.
    pub(crate) matrix: Vec<Vec<String>>,
    /// Remarks on it, and what could not be had.
    pub(crate) notes: Vec<String>,
    /// Figures for the picture of latencies: a name, seconds, whether it is the library's.
    pub(crate) ladder: Vec<(String, Summary, bool)>,
    /// Lines for the picture of throughput: a name, and bytes in a second by block size.
    pub(crate) curves: Vec<(String, Vec<(usize, f64)>)>,
}

impl Section {
    /// As text that is Markdown, too.
    pub(crate) fn text(&self) -> String {
        let mut text = format!("\n## {}\n\n", self.title);
        if !self.lines.is_empty() {
            let header = ["work", "pager", "against", "that", "ratio (95 %)", "target", ""];
            let mut rows = vec![header.map(str::to_owned).to_vec()];
            rows.extend(self.lines.iter().map(Line::cells));
            text += &aligned(&rows);
        }
        if !self.matrix.is_empty() {
            text += if self.lines.is_empty() { "" } else { "\n" };
            text += &aligned(&self.matrix);
        }
        for note in &self.notes {
            let _ = write!(text, "\n{note}\n");
        }
        text
    }

    /// How many targets there are, and which were missed.
    pub(crate) fn missed(&self) -> impl Iterator<Item = String> {
        let missed = self.lines.iter().filter(|line| matches!(line.verdict(), "NOT MET" | "not measured"));
        missed.map(|line| format!("{}: {}, against {}", line.verdict(), line.work, line.against))
    }
}

fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(text, "| {cell:width$} ");
        }
        text += "|\n";
        if index == 0 {
            for width in &widths {
                let _ = write!(text, "| {} ", "-".repeat((*width).max(3)));
            }
            text += "|\n";
        }
    }
    text
}
