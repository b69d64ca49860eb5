//! What the program is asked to do.

use std::time::Duration;

/// For each row, unless told otherwise.
const SECONDS: f64 = 18.0;

pub(crate) const USAGE: &str = "\
cargo bench -p userfaultfd --bench report [-- OPTION...]

  --quick        an eighth of the time for each row, and less memory
  --row NAME     only the rows whose name contains this; may be given several times
  --seconds N    for each row; 18 otherwise
  --list         only names the rows";

#[derive(Debug)]
pub(crate) struct Options {
    /// For each row.
    pub(crate) time: Duration,
    /// With less memory.
    pub(crate) quick: bool,
    pub(crate) rows: Vec<String>,
    pub(crate) list: bool,
    /// Only see whether everything works.
    pub(crate) test: bool,
}

impl Options {
    pub(crate) fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self {
            time: Duration::ZERO,
            quick: false,
            rows: Vec::new(),
            list: false,
            // Cargo says what it runs this for.
            test: true,
        };
        let mut seconds = None;
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value\n\n{USAGE}"));
            match argument.as_str() {
                "--bench" => options.test = false,
                "--quick" => options.quick = true,
                "--list" => options.list = true,
                "--row" => options.rows.push(value()?),
                "--seconds" => {
                    let value = value()?;
                    let parsed = value.parse().ok().filter(|seconds: &f64| (0.0..1e6).contains(seconds));
                    seconds = Some(parsed.ok_or(format!("--seconds {value}: not a number of seconds"))?);
                }
                _ => return Err(format!("unexpected argument `{argument}`\n\n{USAGE}")),
            }
        }
        options.quick |= options.test;
        let usual = if options.quick { SECONDS / 8.0 } else { SECONDS };
        options.time = Duration::from_secs_f64(if options.test { 0.0 } else { seconds.unwrap_or(usual) });
        Ok(options)
    }

    pub(crate) fn wants(&self, row: &str) -> bool {
        self.rows.is_empty() || self.rows.iter().any(|part| row.contains(part.as_str()))
    }

    /// Bytes, or fewer where `--quick` was given.
    pub(crate) fn bytes(&self, usual: usize) -> usize {
        match (self.test, self.quick) {
            (true, _) => usual / 32,
            (_, true) => usual / 4,
            _ => usual,
        }
    }
}
