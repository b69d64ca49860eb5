//! [`Decoder`]: messages from bytes that arrive in any parts. It knows no socket.

use super::dialect::Begins;
use super::framing::{NoFrame, Scan};
use super::limits::Limit;
use super::{Dialect, Message, PeerError};

/// Bytes of a message that an error shows at most.
const MAX_SHOWN: usize = 120;

/// Decodes the messages of a peer, however its bytes arrive: in parts, or several messages at once.
///
/// The dialect is one of those that are allowed. If several are, the first bytes decide; see
/// [`Dialect::is_recognised`].
///
/// ```
/// use userfaultfd::handoff::{Decoder, Dialect, Message};
///
/// let mut decoder = Decoder::new(Dialect::ALL.iter().copied());
/// decoder.push(br#"[{"base_host_virt_addr":65536,"size":1"#);
/// assert_eq!(decoder.next_message()?, None);
/// decoder.push(br#"31072,"offset":0,"page_size":65536,"new_field":1}]"#);
/// let Some(Message::Handoff { regions, .. }) = decoder.next_message()? else { panic!("a hand-over") };
/// assert_eq!((regions[0].address, regions[0].len), (65536, 131072));
/// assert_eq!(decoder.dialect(), Some(Dialect::Firecracker));
/// # Ok::<(), userfaultfd::handoff::PeerError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Decoder {
    allowed: Vec<Dialect>,
    dialect: Option<Dialect>,
    bytes: Vec<u8>,
    scan: Scan,
    limit: Limit,
}

impl Decoder {
    /// Returns a decoder of the messages of some dialects.
    pub fn new(allowed: impl IntoIterator<Item = Dialect>) -> Self {
        let allowed: Vec<_> = allowed.into_iter().collect();
        let dialect = match &allowed[..] {
            [only] => Some(*only),
            _ => None,
        };
        Self { allowed, dialect, bytes: Vec::new(), scan: Scan::default(), limit: Limit::default() }
    }

    /// Sets the length of the longest message, in bytes. The default is 1 MiB.
    #[must_use]
    pub fn limit(mut self, bytes: usize) -> Self {
        self.limit = Limit { bytes };
        self
    }

    /// Adds bytes that have arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Returns the next message, or `None` if it isn't complete.
    ///
    /// # Errors
    ///
    /// After an error the stream has no messages any more.
    ///
    /// - [`Unrecognised`](PeerError::Unrecognised): the bytes begin no message of the allowed dialects.
    /// - [`Message`](PeerError::Message): the bytes are no message of the dialect.
    /// - [`TooLong`](PeerError::TooLong): the message exceeds the limit.
    pub fn next_message(&mut self) -> Result<Option<Message>, PeerError> {
        let Some(dialect) = self.recognise()? else { return Ok(None) };
        let wire = dialect.wire();
        let end = wire.framing.find_end(&self.bytes, &mut self.scan, self.limit);
        let end = end.map_err(|error| match error {
            NoFrame::TooLong => PeerError::TooLong { limit: self.limit.bytes },
            NoFrame::Malformed(reason) => self.refused(dialect, reason.to_owned(), self.bytes.len()),
        })?;
        let Some(end) = end else { return Ok(None) };
        let message =
            (wire.decode)(&self.bytes[..end]).map_err(|reason| self.refused(dialect, reason, end))?;
        self.bytes.drain(..end);
        self.scan = Scan::default();
        Ok(Some(message))
    }

    /// Returns the dialect, once it is known.
    #[must_use]
    pub fn dialect(&self) -> Option<Dialect> {
        self.dialect
    }

    /// Returns whether a message has begun and isn't complete.
    #[must_use]
    pub fn has_rest(&self) -> bool {
        !self.bytes.iter().all(u8::is_ascii_whitespace)
    }

    /// Settles the dialect by what came beside the bytes.
    pub(super) fn set_dialect(&mut self, dialect: Dialect) {
        self.dialect = Some(dialect);
    }

    /// The number of descriptors beside a userfaultfd that come with a message at most: of the dialect, or of those that it may be.
    pub(super) fn max_files(&self) -> usize {
        let may_be = |dialect: &&Dialect| match self.dialect {
            None => true,
            Some(known) => known == **dialect || known.wire().with_memory_file == Some(**dialect),
        };
        self.allowed.iter().filter(may_be).map(|dialect| dialect.wire().max_files).max().unwrap_or(0)
    }

    /// Whether a dialect is allowed.
    pub(super) fn allows(&self, dialect: Dialect) -> bool {
        self.allowed.contains(&dialect)
    }

    fn recognise(&mut self) -> Result<Option<Dialect>, PeerError> {
        if self.dialect.is_some() || self.bytes.is_empty() {
            return Ok(self.dialect);
        }
        let begins = |dialect: &Dialect| (dialect.wire().begins)(&self.bytes);
        if let Some(found) = self.allowed.iter().find(|dialect| begins(dialect) == Begins::Yes) {
            self.dialect = Some(*found);
        } else if !self.allowed.iter().any(|dialect| begins(dialect) == Begins::Perhaps) {
            return Err(PeerError::Unrecognised { shown: shown(&self.bytes) });
        } else if self.bytes.len() > self.limit.bytes {
            return Err(PeerError::TooLong { limit: self.limit.bytes });
        }
        Ok(self.dialect)
    }

    fn refused(&self, dialect: Dialect, reason: String, end: usize) -> PeerError {
        PeerError::Message { dialect, reason, shown: shown(&self.bytes[..end]) }
    }
}

/// The beginning of a message, readable whatever it is.
fn shown(bytes: &[u8]) -> String {
    let first = bytes.get(..MAX_SHOWN).unwrap_or(bytes);
    let more = if first.len() < bytes.len() { format!("… ({} bytes)", bytes.len()) } else { String::new() };
    format!("{}{more}", first.escape_ascii())
}

#[cfg(test)]
mod tests;
