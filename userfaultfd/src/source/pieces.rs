//! Which bytes come from which source: ranges in order, of which a read takes one search.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::{PageData, PageSource, SourceBytes, invalid};

/// Ranges of several sources, one behind the other, as one source. What is made of parts is a way to fill this map:
/// parts in a row ([`push`](Self::push)), parts over others ([`cover`](Self::cover)).
///
/// A read allocates nothing and takes no lock.
#[derive(Clone, Default)]
pub(super) struct Pieces {
    /// In order, without gaps, none of them empty. Neighbours that continue each other are one.
    pieces: Vec<Piece>,
    sources: Vec<Arc<dyn PageSource>>,
}

/// One of the sources of a map, or zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Origin(u32);

impl Origin {
    pub(super) const ZEROS: Self = Self(u32::MAX);
}

#[derive(Clone, Copy)]
struct Piece {
    /// Where the next one begins.
    end: u64,
    /// Where it begins in its source. 0 of zeros.
    from: u64,
    origin: Origin,
}

impl Pieces {
    /// Adds a source, of which nothing is shown yet.
    pub(super) fn add(&mut self, source: impl PageSource + 'static) -> Origin {
        self.sources.push(Arc::new(source));
        Origin(self.sources.len() as u32 - 1)
    }

    /// Appends `len` bytes of a new source from offset `from` on. Nothing is changed by an error.
    pub(super) fn push_source(
        &mut self,
        source: impl PageSource + 'static,
        from: u64,
        len: u64,
    ) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let origin = self.add(source);
        self.push(origin, from, len).inspect_err(|_| drop(self.sources.pop()))
    }

    /// Where the last piece ends.
    pub(super) fn end(&self) -> u64 {
        self.pieces.last().map_or(0, |piece| piece.end)
    }

    /// Appends `len` bytes of a source from offset `from` on.
    pub(super) fn push(&mut self, origin: Origin, from: u64, len: u64) -> io::Result<()> {
        let start = self.end();
        let Some(end) = start.checked_add(len) else {
            return Err(invalid(format!("{len} bytes after {start} others")));
        };
        if len == 0 {
            return Ok(());
        }
        let before = self.pieces.len().checked_sub(2).map_or(0, |before| self.pieces[before].end);
        let goes_on = |last: &&mut Piece| {
            last.origin == origin && (origin == Origin::ZEROS || last.from + (start - before) == from)
        };
        if let Some(last) = self.pieces.last_mut().filter(goes_on) {
            last.end = end;
            return Ok(());
        }
        self.pieces.try_reserve(1).map_err(|_| io::ErrorKind::OutOfMemory)?;
        self.pieces.push(Piece { end, from: if origin == Origin::ZEROS { 0 } else { from }, origin });
        Ok(())
    }

    /// Shows a source, at the same offsets, in some ranges, which are in order, apart from each other, not empty, and
    /// within what there is.
    pub(super) fn cover(&mut self, origin: Origin, ranges: &[Range<u64>]) -> io::Result<()> {
        let len = self.end();
        let mut covered = Self::default();
        let mut below = self.pieces.iter().scan(0, |start, piece| {
            let here = *start;
            *start = piece.end;
            Some((here, piece))
        });
        let mut here = below.next();
        for range in ranges.iter().cloned().chain(std::iter::once(len..len)) {
            while let Some((start, piece)) = here {
                let (from, until) = (covered.end().max(start), piece.end.min(range.start));
                if from < until {
                    covered.push(piece.origin, piece.from + (from - start), until - from)?;
                }
                if piece.end > range.end {
                    break;
                }
                here = below.next();
            }
            covered.push(origin, range.start, range.end - range.start)?;
        }
        self.pieces = covered.pieces;
        Ok(())
    }

    fn source(&self, origin: Origin) -> Option<&dyn PageSource> {
        self.sources.get(origin.0 as usize).map(|source| &**source)
    }

    /// The pieces from the one that has byte `offset` on: the source, the offset in it, and how many bytes follow.
    fn from(&self, offset: u64) -> impl Iterator<Item = (Option<&dyn PageSource>, u64, u64)> {
        let first = self.pieces.partition_point(|piece| piece.end <= offset);
        let mut start = first.checked_sub(1).map_or(0, |before| self.pieces[before].end);
        self.pieces[first..].iter().map(move |piece| {
            let skipped = offset.saturating_sub(start);
            let rest = piece.end - start - skipped;
            start = piece.end;
            (self.source(piece.origin), piece.from + skipped, rest)
        })
    }

    fn read_by(
        &self,
        offset: u64,
        page: &mut [u8],
        read: impl Fn(&dyn PageSource, u64, &mut [u8]) -> io::Result<PageData>,
    ) -> io::Result<PageData> {
        let (mut done, mut data) = (0, PageData::Zero);
        for (source, from, rest) in self.from(offset) {
            if done == page.len() {
                break;
            }
            let end = usize::try_from(rest).map_or(page.len(), |rest| rest.min(page.len() - done) + done);
            let here = match source {
                Some(source) => read(source, from, &mut page[done..end])?,
                None => PageData::Zero,
            };
            match (data, here) {
                // What is before is written now that there is data.
                (PageData::Zero, PageData::Data) => page[..done].fill(0),
                (PageData::Data, PageData::Zero) => page[done..end].fill(0),
                _ => {}
            }
            if here == PageData::Data {
                data = here;
            }
            done = end;
        }
        if data == PageData::Data {
            page[done..].fill(0);
        }
        Ok(data)
    }
}

impl PageSource for Pieces {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.read_by(offset, page, |source, from, bytes| source.read(from, bytes))
    }

    fn read_early(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.read_by(offset, page, |source, from, bytes| source.read_early(from, bytes))
    }

    fn len(&self) -> Option<u64> {
        Some(self.end())
    }

    fn zeros(&self, offset: u64) -> u64 {
        let mut zeros = 0;
        for (source, from, rest) in self.from(offset) {
            let here = source.map_or(rest, |source| source.zeros(from).min(rest));
            zeros += here;
            if here < rest {
                return zeros;
            }
        }
        u64::MAX
    }

    fn bytes(&self, offset: u64, len: usize) -> Option<SourceBytes<'_>> {
        let (source, from, rest) = self.from(offset).next()?;
        source.filter(|_| len as u64 <= rest)?.bytes(from, len)
    }
}

impl fmt::Debug for Pieces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        struct Show(u64, Piece);
        impl fmt::Debug for Show {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let Self(start, Piece { end, from, origin }) = self;
                match origin {
                    &Origin::ZEROS => write!(f, "{start}..{end}: zeros"),
                    Origin(source) => write!(f, "{start}..{end}: source {source} from {from}"),
                }
            }
        }
        let starts = std::iter::once(0).chain(self.pieces.iter().map(|piece| piece.end));
        f.debug_list().entries(starts.zip(&self.pieces).map(|(start, piece)| Show(start, *piece))).finish()
    }
}
