//! What a guest says: lines that are found again in a log into which the kernel writes, too.
//!
//! The kernel may write at any byte, so that a line can come out in pieces. Every line carries its number and a
//! checksum, and everything is said twice: a line is lost only if both copies are broken, and that is noticed.

use std::collections::{BTreeMap, BTreeSet};

use crate::User;

/// Starts a line, wherever it stands.
const MARK: &str = "=guest= ";

/// Something that a guest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// The kernel's release, and the features that its userfaultfd offers or why it has none.
    Kernel {
        /// As uname(2) has it.
        release: String,
        /// The mask, or what the kernel said instead.
        features: Result<u64, String>,
    },
    /// Something about the guest that a reader should know.
    Note(String),
    /// A binary is started.
    Start {
        /// As whom.
        user: User,
        /// Its path.
        binary: String,
    },
    /// A line of what the running binary prints.
    Output(String),
    /// The running binary has ended.
    Done {
        /// How.
        ending: Ending,
        /// How long it ran.
        milliseconds: u64,
    },
    /// A warning, or worse, from the kernel.
    Log(String),
    /// All is said. What follows is said for the second time.
    End,
}

/// How a program ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It exited.
    Exit(i32),
    /// A signal killed it.
    Signal(i32),
    /// It ran for too long and was killed.
    Limit,
    /// It could not be run.
    NotRun(String),
}

impl Record {
    fn words(&self) -> String {
        match self {
            Record::Kernel { release, features: Ok(features) } => format!("kernel {release} {features:#x}"),
            Record::Kernel { release, features: Err(reason) } => format!("kernel {release} {reason}"),
            Record::Note(text) => format!("note {text}"),
            Record::Start { user, binary } => format!("start {user} {binary}"),
            Record::Output(text) => format!("out {text}"),
            Record::Done { ending, milliseconds } => {
                let (word, detail) = match ending {
                    Ending::Exit(code) => ("exit", code.to_string()),
                    Ending::Signal(number) => ("signal", number.to_string()),
                    Ending::Limit => ("limit", String::new()),
                    Ending::NotRun(reason) => ("not-run", reason.clone()),
                };
                format!("done {milliseconds} {word} {detail}")
            }
            Record::Log(text) => format!("log {text}"),
            Record::End => "end ".to_owned(),
        }
    }

    fn from_words(words: &str) -> Option<Self> {
        let (kind, rest) = words.split_once(' ')?;
        Some(match kind {
            "kernel" => {
                let (release, features) = rest.split_once(' ')?;
                let mask = features.strip_prefix("0x").map(|mask| u64::from_str_radix(mask, 16).ok());
                let features = mask.map_or_else(|| Some(Err(features.to_owned())), |mask| mask.map(Ok))?;
                Record::Kernel { release: release.to_owned(), features }
            }
            "note" => Record::Note(rest.to_owned()),
            "start" => {
                let (user, binary) = rest.split_once(' ')?;
                Record::Start { user: user.parse().ok()?, binary: binary.to_owned() }
            }
            "out" => Record::Output(rest.to_owned()),
            "done" => {
                let mut words = rest.splitn(3, ' ');
                let milliseconds = words.next()?.parse().ok()?;
                let (word, detail) = (words.next()?, words.next()?);
                let ending = match word {
                    "exit" => Ending::Exit(detail.parse().ok()?),
                    "signal" => Ending::Signal(detail.parse().ok()?),
                    "limit" => Ending::Limit,
                    "not-run" => Ending::NotRun(detail.to_owned()),
                    _ => return None,
                };
                Record::Done { ending, milliseconds }
            }
            "log" => Record::Log(rest.to_owned()),
            "end" => Record::End,
            _ => return None,
        })
    }
}

/// The line that says `record`, the `number`th of a guest, counted from 0. It has no end of line.
#[must_use]
pub fn encode(number: u32, record: &Record) -> String {
    let body = format!("{number} {}", escape(&record.words()));
    format!("{MARK}{:08x} {body}", checksum(&body))
}

/// The number and the record of a line, if one is whole in it.
fn decode(line: &str) -> Option<(u32, Record)> {
    line.match_indices(MARK).find_map(|(at, _)| {
        let (sum, body) = line[at + MARK.len()..].split_once(' ')?;
        if u32::from_str_radix(sum, 16).ok()? != checksum(body) {
            return None;
        }
        let (number, words) = body.split_once(' ')?;
        Some((number.parse().ok()?, Record::from_words(&unescape(words)?)?))
    })
}

/// FNV-1a.
fn checksum(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |sum, byte| (sum ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// Leaves nothing in it that a terminal would take for its own.
fn escape(text: &str) -> String {
    let escaped = |byte: u8| match byte {
        b'\\' => "\\\\".to_owned(),
        b' '..=b'~' => char::from(byte).to_string(),
        _ => format!("\\x{byte:02x}"),
    };
    text.bytes().map(escaped).collect()
}

fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'\\' {
            bytes.push(byte);
        } else if rest.next()? == b'\\' {
            bytes.push(b'\\');
        } else {
            let digits = [rest.next()?, rest.next()?];
            bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        }
    }
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// What a guest has said, taken from the log of its console.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transcript {
    records: BTreeMap<u32, Record>,
}

impl Transcript {
    /// Finds everything that a guest has said so far.
    #[must_use]
    pub fn read(log: &[u8]) -> Self {
        let log = String::from_utf8_lossy(log);
        // A terminal ends lines by carriage return and line feed.
        Self { records: log.split(['\r', '\n']).filter_map(decode).collect() }
    }

    /// The records that came, in the order in which they were said.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    /// The log for readers: what the guest said as plain text and once, between what the kernel said.
    #[must_use]
    pub fn readable(log: &[u8]) -> String {
        let mut seen = BTreeSet::new();
        let log = String::from_utf8_lossy(log);
        let plain = |line: &str| match decode(line) {
            Some((number, record)) => seen.insert(number).then(|| record.words()),
            None => Some(line.to_owned()).filter(|line| !line.is_empty()),
        };
        let lines: Vec<String> = log.split(['\r', '\n']).filter_map(plain).collect();
        lines.join("\n") + "\n"
    }

    /// Whether the guest came to its end.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.records.last_key_value().is_some_and(|(_, record)| *record == Record::End)
    }

    /// How many records are known to have been said but did not come.
    #[must_use]
    pub fn lost(&self) -> usize {
        let said = self.records.last_key_value().map_or(0, |(last, _)| *last as usize + 1);
        said - self.records.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> Vec<Record> {
        vec![
            Record::Kernel { release: "6.1.0-1".to_owned(), features: Ok(0x1fff) },
            Record::Kernel { release: "4.2".to_owned(), features: Err("ENOSYS: not there".to_owned()) },
            Record::Note(String::new()),
            Record::Start { user: User::Nobody, binary: "/tests/kernel".to_owned() },
            Record::Output("test a ... ok: back\\slash, tab\t, r\r, \u{1b}[1m, =guest= , größe".to_owned()),
            Record::Done { ending: Ending::Exit(101), milliseconds: 12 },
            Record::Done { ending: Ending::Signal(6), milliseconds: 0 },
            Record::Done { ending: Ending::Limit, milliseconds: 60_000 },
            Record::Done { ending: Ending::NotRun("no such file".to_owned()), milliseconds: 1 },
            Record::Log("BUG: ".to_owned()),
            Record::End,
        ]
    }

    fn lines() -> Vec<String> {
        (0..).zip(&records()).map(|(number, record)| encode(number, record)).collect()
    }

    #[test]
    fn records_are_read_as_they_were_written() {
        for (number, record) in (7..).zip(records()) {
            let line = encode(number, &record);
            assert!(line.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{line}");
            assert_eq!(decode(&line), Some((number, record)));
        }
    }

    #[test]
    fn log_has_them_among_other_lines() {
        let log =
            format!("SeaBIOS\r\n[  0.1] early\r\n{}\r\n[  1.2] late\r\n", lines().join("\r\nnoise\r\n"));
        let transcript = Transcript::read(log.as_bytes());
        assert!(transcript.records().eq(&records()));
        assert!(transcript.has_ended());
        assert_eq!(transcript.lost(), 0);
    }

    #[test]
    fn readable_log_has_everything_once() {
        let log = format!("SeaBIOS\r\n\r\n{0}\r\nPANIC\r\n{0}\r\n", lines()[3]);
        assert_eq!(Transcript::readable(log.as_bytes()), "SeaBIOS\nstart nobody /tests/kernel\nPANIC\n");
    }

    #[test]
    fn kernel_text_before_a_line_does_not_hide_it() {
        let log = format!("[  1.0] cut off here{}\r\n", lines()[3]);
        assert!(Transcript::read(log.as_bytes()).records().eq(&records()[3..4]));
    }

    #[test]
    fn kernel_text_inside_line_is_mended_by_copy() {
        let whole = lines();
        for cut in 1..whole[4].len() {
            let mut first = whole.clone();
            first[4].insert_str(cut, "[  1.0] BUG: something\r\n");
            let log = first.join("\r\n");
            let transcript = Transcript::read(log.as_bytes());
            assert_eq!(transcript.lost(), 1, "{log}");
            let log = format!("{log}\r\n{}", whole.join("\r\n"));
            let transcript = Transcript::read(log.as_bytes());
            assert!(transcript.records().eq(&records()), "{log}");
            assert_eq!(transcript.lost(), 0);
        }
    }

    #[test]
    fn changed_byte_is_noticed() {
        let line = encode(3, &Record::Output("test a ... ok".to_owned()));
        assert_eq!(decode(&line.replace("ok", "ko")), None);
        assert_eq!(decode(&line.replace(" 3 ", " 4 ")), None);
        assert_eq!(decode(&line[..line.len() - 1]), None);
    }

    #[test]
    fn log_that_stops_is_not_at_its_end() {
        let log = lines()[..5].join("\r\n");
        assert!(!Transcript::read(log.as_bytes()).has_ended());
        assert!(!Transcript::read(b"").has_ended());
        assert_eq!(Transcript::read(b"").lost(), 0);
    }
}
