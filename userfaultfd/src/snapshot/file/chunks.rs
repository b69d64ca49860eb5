//! Chunks of a file of version 2: where they lie, and what is in them.
//!
//! The content of all pages, in the order in which it was written, is one stream. A chunk is a part of it, compressed by itself
//! and with a checksum; all but the last have the same length.

use std::fmt;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::codec::{Codec, Decoder};
use super::format::{CHUNK_BYTES, FormatError, HEADER_BYTES, decode_chunk};
use super::input::Input;
use crate::source::frames::Frames;

/// Bytes of chunks that are kept for the next reads of them.
const KEPT_BYTES: usize = 16 << 20;

/// Stored bytes that are read at once for several chunks.
const READ_BYTES: u64 = 4 << 20;

/// Bytes of a working set that are read at once.
const PRELOAD_BYTES: u64 = 64 << 20;

/// One chunk, as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Where it begins in the file.
    pub(crate) at: u64,
    pub(crate) stored: u32,
    pub(crate) codec: Codec,
    /// The first bytes of the BLAKE3 of its content.
    pub(crate) hash: [u8; 16],
}

/// The first bytes of the BLAKE3 of a chunk's content.
pub(crate) fn chunk_hash(content: &[u8]) -> [u8; 16] {
    let hash = blake3::hash(content);
    *hash.as_bytes().first_chunk().expect("it has 32")
}

/// All chunks of a file.
pub(crate) struct Chunks {
    table: Vec<Chunk>,
    /// Bytes of content of each but the last.
    size: u64,
    /// Bytes of content of all.
    pub(crate) len: u64,
    /// Bytes of content of the working set, which come first.
    working_set: u64,
    kept: Frames,
    decoders: Mutex<Vec<Decoder>>,
    preloaded: Mutex<Option<Preloaded>>,
}

/// The chunks of the working set as they are stored, until each was needed.
struct Preloaded {
    bytes: Arc<Vec<u8>>,
    /// Which weren't needed yet, and how many.
    waiting: Vec<bool>,
    left: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn room(bytes: &mut Vec<u8>, len: usize) -> io::Result<()> {
    bytes.clear();
    bytes.try_reserve(len).map_err(|_| ErrorKind::OutOfMemory)?;
    bytes.resize(len, 0);
    Ok(())
}

/// Reads a table of chunks, one after the other.
pub(crate) struct TableReader {
    pub(crate) size: u64,
    pub(crate) len: u64,
    pub(crate) index: u64,
    pub(crate) at: u64,
    pub(crate) number: u64,
}

impl TableReader {
    /// The next chunk; `None` if it can't be one.
    pub(crate) fn next(&mut self, bytes: &[u8]) -> Result<Option<Chunk>, FormatError> {
        debug_assert_eq!(bytes.len(), CHUNK_BYTES);
        let (stored, codec, hash) = decode_chunk(bytes);
        let codec = Codec::of(codec)?;
        let content = self.len.saturating_sub(self.number * self.size).min(self.size);
        let is_sound = match codec {
            Codec::Raw => u64::from(stored) == content,
            _ => stored > 0 && u64::from(stored) < content,
        };
        let chunk = Chunk { at: self.at, stored, codec, hash };
        self.at += u64::from(stored);
        self.number += 1;
        Ok((is_sound && content > 0 && self.at <= self.index).then_some(chunk))
    }
}

impl Chunks {
    pub(crate) fn new(table: Vec<Chunk>, size: u64, len: u64, working_set: u64) -> Self {
        let kept = Frames::new(KEPT_BYTES);
        let (decoders, preloaded) = (Mutex::default(), Mutex::default());
        Self { table, size, len, working_set, kept, decoders, preloaded }
    }

    /// Bytes that all take in the file.
    pub(crate) fn stored_len(&self) -> u64 {
        self.table.last().map_or(0, |last| last.at + u64::from(last.stored) - HEADER_BYTES as u64)
    }

    fn content_of(&self, chunk: usize) -> Range<u64> {
        let start = chunk as u64 * self.size;
        start..(start + self.size).min(self.len)
    }

    /// The bytes of some chunks in the file.
    fn stored(&self, chunks: &Range<usize>) -> Range<u64> {
        let last = &self.table[chunks.end - 1];
        self.table[chunks.start].at..last.at + u64::from(last.stored)
    }

    /// The number of chunks that have content of the working set.
    fn working_set_chunks(&self) -> usize {
        self.working_set.div_ceil(self.size) as usize
    }

    /// Reads all of the working set, in one long read, and keeps it until it is needed. Returns how many bytes were read.
    pub(crate) fn preload(&self, input: &Input) -> io::Result<u64> {
        let count = self.working_set_chunks();
        if count == 0 {
            return Ok(0);
        }
        let stored = self.stored(&(0..count));
        let len = stored.end - stored.start;
        let mut bytes = Vec::new();
        room(&mut bytes, usize::try_from(len).map_err(|_| ErrorKind::OutOfMemory)?)?;
        let mut at = stored.start;
        for part in bytes.chunks_mut(PRELOAD_BYTES as usize) {
            input.read_exact_at(part, at, false)?;
            at += part.len() as u64;
        }
        let waiting = vec![true; count];
        *lock(&self.preloaded) = Some(Preloaded { bytes: Arc::new(bytes), waiting, left: count });
        Ok(len)
    }

    /// Checks all chunks.
    pub(crate) fn verify(&self, input: &Input) -> Result<(), FormatError> {
        let mut content = Vec::new();
        for chunk in 0..self.table.len() {
            let range = self.content_of(chunk);
            room(&mut content, (range.end - range.start) as usize)?;
            self.load(input, chunk..chunk + 1, true, |_, stored, decoder| {
                self.decode(chunk, stored, decoder, &mut content)
            })?;
        }
        Ok(())
    }

    /// Reads content from a place of the stream on.
    pub(crate) fn read(&self, input: &Input, at: u64, bytes: &mut [u8], early: bool) -> io::Result<()> {
        let end = at + bytes.len() as u64;
        let mut done = 0;
        while done < bytes.len() {
            let from = at + done as u64;
            let chunk = (from / self.size) as usize;
            if let Some(content) = self.kept.find(chunk) {
                done += self.copy_part(chunk, &content, from, &mut bytes[done..]);
                continue;
            }
            let run = self.run(chunk, end);
            let first = self.content_of(chunk);
            if run.len() == 1 && (from > first.start || end < first.end) {
                let content = self.kept.get(chunk, || self.load_one(input, chunk, early))?;
                done += self.copy_part(chunk, &content, from, &mut bytes[done..]);
                continue;
            }
            self.load(input, run, early, |chunk, stored, decoder| {
                let range = self.content_of(chunk);
                let len = (range.end - range.start) as usize;
                let from = at + done as u64;
                if from == range.start && bytes.len() - done >= len {
                    self.decode(chunk, stored, decoder, &mut bytes[done..done + len])?;
                    done += len;
                    return Ok(());
                }
                let mut content = Vec::new();
                room(&mut content, len)?;
                self.decode(chunk, stored, decoder, &mut content)?;
                done += self.copy_part(chunk, &content, from, &mut bytes[done..]);
                self.kept.insert(chunk, Arc::new(content));
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Copies what a chunk has of the bytes from a place of the stream on. Returns how many these are.
    fn copy_part(&self, chunk: usize, content: &[u8], from: u64, bytes: &mut [u8]) -> usize {
        let into = (from - self.content_of(chunk).start) as usize;
        let len = (content.len() - into).min(bytes.len());
        bytes[..len].copy_from_slice(&content[into..into + len]);
        len
    }

    /// The chunks from one on, up to an end of the stream, that aren't kept, as many as one read takes.
    fn run(&self, first: usize, end: u64) -> Range<usize> {
        let mut run = first..first + 1;
        while self.content_of(run.end - 1).end < end && self.kept.find(run.end).is_none() {
            let stored = self.stored(&(run.start..run.end + 1));
            if stored.end - stored.start > READ_BYTES {
                break;
            }
            run.end += 1;
        }
        run
    }

    fn load_one(&self, input: &Input, chunk: usize, early: bool) -> io::Result<Vec<u8>> {
        let range = self.content_of(chunk);
        let mut content = Vec::new();
        room(&mut content, (range.end - range.start) as usize)?;
        self.load(input, chunk..chunk + 1, early, |_, stored, decoder| {
            self.decode(chunk, stored, decoder, &mut content)
        })?;
        Ok(content)
    }

    /// Reads chunks as they are stored, in one read.
    fn load(
        &self,
        input: &Input,
        chunks: Range<usize>,
        early: bool,
        mut each: impl FnMut(usize, &[u8], &mut Decoder) -> io::Result<()>,
    ) -> io::Result<()> {
        let range = self.stored(&chunks);
        let mut decoder = lock(&self.decoders).pop().unwrap_or_default();
        let preloaded = self.take_preloaded(&chunks);
        let mut stored = std::mem::take(&mut decoder.stored);
        let read = match &preloaded {
            Some(_) => Ok(()),
            None => room(&mut stored, (range.end - range.start) as usize)
                .and_then(|()| input.read_exact_at(&mut stored, range.start, early)),
        };
        let result = read.and_then(|()| {
            let (bytes, base) = match &preloaded {
                Some(bytes) => (&***bytes, HEADER_BYTES as u64),
                None => (&*stored, range.start),
            };
            chunks.clone().try_for_each(|chunk| {
                let range = self.stored(&(chunk..chunk + 1));
                let stored = &bytes[(range.start - base) as usize..(range.end - base) as usize];
                each(chunk, stored, &mut decoder)
            })
        });
        decoder.stored = stored;
        lock(&self.decoders).push(decoder);
        result
    }

    /// The preloaded bytes, if they have these chunks and none was needed before: what wasn't good is read again. When each was
    /// needed once they are let go.
    fn take_preloaded(&self, chunks: &Range<usize>) -> Option<Arc<Vec<u8>>> {
        let mut guard = lock(&self.preloaded);
        let preloaded = guard.as_mut()?;
        let len = preloaded.waiting.len();
        let waiting = &mut preloaded.waiting[chunks.start.min(len)..chunks.end.min(len)];
        let needed = waiting.iter().filter(|waiting| **waiting).count();
        waiting.fill(false);
        preloaded.left -= needed;
        let bytes = (needed == chunks.len()).then(|| Arc::clone(&preloaded.bytes));
        if preloaded.left == 0 {
            *guard = None;
        }
        bytes
    }

    /// Decompresses a chunk, and checks it.
    fn decode(
        &self,
        chunk: usize,
        stored: &[u8],
        decoder: &mut Decoder,
        content: &mut [u8],
    ) -> io::Result<()> {
        let Chunk { codec, hash, .. } = self.table[chunk];
        let is_right = decoder.decode(codec, stored, content)? && chunk_hash(content) == hash;
        let damaged = FormatError::Damaged("a chunk doesn't have its checksum");
        if is_right { Ok(()) } else { Err(io::Error::new(ErrorKind::InvalidData, damaged)) }
    }
}

impl fmt::Debug for Chunks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, size, len, working_set, .. } = self;
        f.debug_struct("Chunks")
            .field("count", &table.len())
            .field("size", size)
            .field("len", len)
            .field("working_set", working_set)
            .finish_non_exhaustive()
    }
}
