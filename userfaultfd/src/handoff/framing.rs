//! Where a message ends, in bytes that arrive in any parts. Each byte is looked at once.

use super::limits::Limit;

/// In the place of a process id: all tasks are restored. No process has such an id.
pub(super) const CRIU_COMPLETE: [u8; 4] = 0x5253_5446_u32.to_ne_bytes();

/// How a dialect says where its messages end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// An array or object of JSON: it ends with its last bracket.
    Json,
    /// A length of 32 bits, little-endian, and as many bytes.
    Length32,
    /// Sixteen bytes, of which the last eight are a length, little-endian, and as many bytes.
    Header16,
    /// A process id of 32 bits of this machine. If it is positive, a byte follows with the descriptor.
    Criu,
}

/// How far the bytes of an unfinished message were looked at.
#[derive(Clone, Debug, Default)]
pub(super) struct Scan {
    at: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

/// Why there is no message in the bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoFrame {
    /// The message is longer than the limit.
    TooLong,
    /// No message begins so.
    Malformed(&'static str),
}

impl Framing {
    /// Returns the length of the first message, or `None` if it isn't complete.
    pub(super) fn find_end(
        self,
        bytes: &[u8],
        scan: &mut Scan,
        limit: Limit,
    ) -> Result<Option<usize>, NoFrame> {
        let end = match self {
            Self::Json => scan.json(bytes)?,
            Self::Length32 => bytes.first_chunk().map(|len| u64::from(u32::from_le_bytes(*len)) + 4),
            Self::Header16 => {
                let len = bytes.get(8..).and_then(|rest| rest.first_chunk());
                len.map(|len| u64::from_le_bytes(*len).saturating_add(16))
            }
            Self::Criu => match bytes.first_chunk() {
                Some(pid) if i32::from_ne_bytes(*pid) > 0 && *pid != CRIU_COMPLETE => Some(5),
                Some(_) => Some(4),
                None => None,
            },
        };
        match end {
            Some(end) if end > limit.bytes as u64 => Err(NoFrame::TooLong),
            None if bytes.len() > limit.bytes => Err(NoFrame::TooLong),
            Some(end) => Ok(usize::try_from(end).ok().filter(|end| *end <= bytes.len())),
            None => Ok(None),
        }
    }
}

impl Scan {
    /// Looks for the bracket that closes the first one. What lies between may be anything: the parser sees it.
    fn json(&mut self, bytes: &[u8]) -> Result<Option<u64>, NoFrame> {
        while let Some(byte) = bytes.get(self.at) {
            self.at += 1;
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' if self.depth > 0 => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'[' | b'{' => self.depth += 1,
                b']' | b'}' if self.depth > 0 => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return Ok(Some(self.at as u64));
                    }
                }
                _ if self.depth > 0 || byte.is_ascii_whitespace() => {}
                _ => return Err(NoFrame::Malformed("it is no array and no object of JSON")),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::require;

    const LIMIT: Limit = Limit { bytes: 64 };

    /// The end of the first message, when all bytes come at once, and when they come one by one.
    fn end(framing: Framing, bytes: &[u8]) -> Result<Option<usize>, NoFrame> {
        let at_once = framing.find_end(bytes, &mut Scan::default(), LIMIT);
        let mut scan = Scan::default();
        let one_by_one = (0..=bytes.len()).map(|len| framing.find_end(&bytes[..len], &mut scan, LIMIT));
        let first = one_by_one.into_iter().find(|found| *found != Ok(None)).unwrap_or(Ok(None));
        // Of a message that ends, and one that is known too early to be bad, both say the same.
        assert_eq!(at_once, first, "{framing:?} of {}", bytes.escape_ascii());
        at_once
    }

    #[test]
    fn end_of_each_kind_of_message_is_found() {
        require!();
        for (text, expected) in [
            (&b"[]"[..], Some(2)),
            (b" \n[{\"a\":1},2]rest", Some(13)),
            (br#"{"]":"}","\"]":"\\"}x"#, Some(20)),
            (b"[[[]", None),
            (b"  ", None),
            (b"", None),
            (br#"["]"#, None),
        ] {
            assert_eq!(end(Framing::Json, text), Ok(expected), "{}", text.escape_ascii());
        }
        assert!(matches!(end(Framing::Json, b"hello"), Err(NoFrame::Malformed(_))));
        assert!(matches!(end(Framing::Json, b"]"), Err(NoFrame::Malformed(_))));
        assert_eq!(end(Framing::Length32, &[3, 0, 0, 0, 1, 2, 3, 4]), Ok(Some(7)));
        assert_eq!(end(Framing::Length32, &[3, 0, 0, 0, 1, 2]), Ok(None));
        assert_eq!(end(Framing::Length32, &[0xff; 4]), Err(NoFrame::TooLong));
        let mut header = [0; 17];
        header[8] = 1;
        assert_eq!(end(Framing::Header16, &header), Ok(Some(17)));
        assert_eq!(end(Framing::Header16, &[0xff; 16]), Err(NoFrame::TooLong));
        assert_eq!(end(Framing::Criu, &[&7_i32.to_ne_bytes()[..], &[0]].concat()), Ok(Some(5)));
        assert_eq!(end(Framing::Criu, &7_i32.to_ne_bytes()), Ok(None));
        assert_eq!(end(Framing::Criu, &(-7_i32).to_ne_bytes()), Ok(Some(4)));
    }

    #[test]
    fn message_without_an_end_meets_the_limit() {
        require!();
        let mut scan = Scan::default();
        let endless = vec![b'['; LIMIT.bytes + 1];
        assert_eq!(Framing::Json.find_end(&endless[1..], &mut scan, LIMIT), Ok(None));
        assert_eq!(Framing::Json.find_end(&endless, &mut scan, LIMIT), Err(NoFrame::TooLong));
    }
}
