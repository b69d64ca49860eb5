//! A base and diffs over it.

use std::fs::File;
use std::io;
use std::ops::Range;

use super::data_ranges::meaningful;
use super::pieces::{Origin, Pieces};
use super::{FileSource, PageSource, invalid};
#[cfg(feature = "snapshot")]
use crate::snapshot::SnapshotReader;

/// A base and any number of diffs over it: each page comes from the topmost layer that has it.
///
/// What a layer has is told by the holes of a sparse file ([`push_diff`](Self::push_diff)), by a list of extents
/// ([`push_extents`](Self::push_extents)), or by an incremental snapshot of this crate (`push_snapshot`). **Where a layer
/// has nothing, the layer below shows. Zeros that a layer has are data** and hide what is below.
///
/// ```
/// use std::os::unix::fs::FileExt;
/// use userfaultfd::pager::{BytesSource, LayeredSource, PageSource};
///
/// // A diff of a Firecracker VM: a sparse file as long as the memory.
/// let path = std::env::temp_dir().join(format!("diff-{}", std::process::id()));
/// let diff = std::fs::File::options().read(true).write(true).create_new(true).open(&path)?;
/// diff.set_len(3 << 16)?;
/// diff.write_all_at(&[2; 1 << 16], 1 << 16)?;
/// # std::fs::remove_file(&path)?;
///
/// let mut memory = LayeredSource::new(BytesSource::new(vec![1; 3 << 16]))?;
/// memory.push_diff(diff)?;
/// // The last page was written with zeros later.
/// let mut fork = memory.clone();
/// fork.push_zeros(std::iter::once(2 << 16..3 << 16))?;
///
/// let first_bytes = |source: &LayeredSource| {
///     [0, 1, 2].map(|part| {
///         let mut page = [0; 4096];
///         source.read(part << 16, &mut page).unwrap();
///         page[0]
///     })
/// };
/// assert_eq!(first_bytes(&memory), [1, 2, 1]);
/// assert_eq!(first_bytes(&fork), [1, 2, 0]);
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// The layers are flattened when they are added: a read searches one list, however many layers there are, takes no lock and
/// allocates nothing beside what the layers themselves do. The list takes 24 bytes for each run of pages that come from
/// one layer.
///
/// A clone shares the layers, and can get others: a fork of a fork costs its list.
///
/// # Files
///
/// The files of layers must not change. One that becomes shorter is an error of the pages that it had.
///
/// A hole doesn't survive every copy: `cp`, `tar` and object stores fill holes with zeros, which then hide the base, and
/// others make holes of zeros, which then show it. Nothing can be seen of either afterwards. Where a diff travels, make a
/// list with [`extents_of`](Self::extents_of) where it was written, and let it travel along.
///
/// Borders of extents may be anywhere. Where one isn't that of a page, the layers on both sides are asked for parts of
/// the page.
#[derive(Clone)]
pub struct LayeredSource {
    pieces: Pieces,
    /// How many were pushed.
    diffs: usize,
}

impl LayeredSource {
    /// Returns a source that shows all of a base.
    ///
    /// # Errors
    ///
    /// Of the kind [`InvalidInput`](io::ErrorKind::InvalidInput): the base has no [length](PageSource::len).
    pub fn new(base: impl PageSource + 'static) -> io::Result<Self> {
        let Some(len) = base.len() else {
            return Err(invalid("a base without a length: ConcatSource::push_part gives it one".into()));
        };
        let mut pieces = Pieces::default();
        pieces.push_source(base, 0, len)?;
        Ok(Self { pieces, diffs: 0 })
    }

    /// Puts a sparse file on top, such as a diff of Firecracker: what isn't a hole is its content. Moves the file's offset
    /// for a moment.
    ///
    /// # Errors
    ///
    /// Those of [`FileSource::new`] and [`extents_of`](Self::extents_of). Of the kind
    /// [`InvalidInput`](io::ErrorKind::InvalidInput): the file isn't as long as the base.
    pub fn push_diff(&mut self, diff: File) -> io::Result<&mut Self> {
        let extents = Self::extents_of(&diff)?;
        let diff = FileSource::new(diff)?.sparse(false);
        let (diff_len, len) = (diff.len().unwrap_or_default(), self.pieces.end());
        if diff_len != len {
            return Err(invalid(format!("a diff of {diff_len} bytes over a base of {len} bytes")));
        }
        self.push_extents(diff, extents)
    }

    /// Puts the parts of a source on top that lie in `extents`: ranges of bytes, in order, without overlap. Offsets are the
    /// same in the base and in the source.
    ///
    /// # Errors
    ///
    /// Of the kind [`InvalidInput`](io::ErrorKind::InvalidInput): an extent ends before it begins, or begins before
    /// the end of the one before; the base or the source ends before it.
    pub fn push_extents(
        &mut self,
        layer: impl PageSource + 'static,
        extents: impl IntoIterator<Item = Range<u64>>,
    ) -> io::Result<&mut Self> {
        let extents = self.check(extents, layer.len())?;
        let layer = self.pieces.add(layer);
        self.put(layer, &extents)
    }

    /// Puts ranges of zeros on top, given as in [`push_extents`](Self::push_extents).
    ///
    /// # Errors
    ///
    /// Those of [`push_extents`](Self::push_extents).
    pub fn push_zeros(&mut self, extents: impl IntoIterator<Item = Range<u64>>) -> io::Result<&mut Self> {
        let extents = self.check(extents, None)?;
        self.put(Origin::ZEROS, &extents)
    }

    /// Puts what a snapshot has [saved](SnapshotReader::extents) on top. Whether it follows the layer below isn't checked. Pages that were gone when they should have been saved are errors, and never
    /// show what is below.
    ///
    /// To read the chain of a [`Series`](crate::snapshot::Series) alone, use [`Chain`](crate::snapshot::Chain), which
    /// checks that its files belong together. It can be the base here.
    ///
    /// # Errors
    ///
    /// Of the kind [`InvalidInput`](io::ErrorKind::InvalidInput): it is of memory of another length.
    #[cfg(feature = "snapshot")]
    pub fn push_snapshot(&mut self, snapshot: SnapshotReader) -> io::Result<&mut Self> {
        let (snapshot_len, len) = (snapshot.len().unwrap_or_default(), self.pieces.end());
        if snapshot_len != len {
            return Err(invalid(format!("a snapshot of {snapshot_len} bytes over a base of {len} bytes")));
        }
        let extents: Vec<_> = snapshot.extents().collect();
        self.push_extents(snapshot, extents)
    }

    /// Returns the extents of a sparse file: what isn't a hole, in order. Moves the file's offset for a moment.
    ///
    /// # Errors
    ///
    /// Those of lseek(2). Of the kind [`InvalidInput`](io::ErrorKind::InvalidInput): the file system doesn't tell holes,
    /// or keeps blocks that are larger than a page (tmpfs with huge pages, file systems of networks), so that a hole isn't
    /// all that wasn't written.
    pub fn extents_of(file: &File) -> io::Result<Vec<Range<u64>>> {
        meaningful(file)
    }

    /// Returns the number of layers on top of the base.
    #[must_use]
    pub fn diffs(&self) -> usize {
        self.diffs
    }

    fn check(
        &self,
        extents: impl IntoIterator<Item = Range<u64>>,
        layer_len: Option<u64>,
    ) -> io::Result<Vec<Range<u64>>> {
        let (mut checked, mut last) = (Vec::new(), 0);
        let len = self.pieces.end();
        for Range { start, end } in extents {
            let why = if start > end {
                "it ends before it begins".to_owned()
            } else if start < last {
                format!("the one before ends at {last}")
            } else if end > len {
                format!("the base has {len} bytes")
            } else if let Some(layer_len) = layer_len.filter(|layer_len| end > *layer_len) {
                format!("the layer has {layer_len} bytes")
            } else {
                last = end;
                if start < end {
                    checked.push(start..end);
                }
                continue;
            };
            return Err(invalid(format!("the extent {start}..{end} can't be: {why}")));
        }
        Ok(checked)
    }

    fn put(&mut self, layer: Origin, extents: &[Range<u64>]) -> io::Result<&mut Self> {
        self.pieces.cover(layer, extents)?;
        self.diffs += 1;
        Ok(self)
    }
}

impl PageSource for LayeredSource {
    super::read_through!(self => self.pieces);
}

impl std::fmt::Debug for LayeredSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LayeredSource {:?}", self.pieces)
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::iter;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::source::model::{Random, byte, check, check_all, random_range};
    use crate::source::{BytesSource, PageData, ZeroSource};
    use crate::support::mapping::memfd_of_bytes;
    use crate::support::require;

    /// An unlinked file where temporary ones are, and one in memory.
    fn files() -> [File; 2] {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("userfaultfd-layered-{}-{count}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        [file, File::from(memfd_of_bytes(0, 0))]
    }

    fn as_u64(range: &Range<usize>) -> Range<u64> {
        range.start as u64..range.end as u64
    }

    /// Ranges apart from each other, in order.
    fn ranges(random: &mut Random, len: usize, unit: usize) -> Vec<Range<usize>> {
        let (mut ranges, mut at) = (Vec::new(), 0);
        while at < len && ranges.len() < 20 {
            let found = random_range(random, len - at, unit);
            let range = at + found.start..at + found.end;
            at = range.end + random.below(2) * random.below(unit);
            ranges.push(range);
        }
        ranges
    }

    /// Layers of every kind in any order, forks on the way, against an array that each layer was written to.
    #[test]
    fn random_layers_show_what_was_written_last() {
        require!();
        let page = crate::page_size();
        for seed in 0..40 {
            let mut random = Random::new(seed);
            let len = (1 + random.below(12)) * page - random.below(2) * random.below(page);
            let mut expected: Vec<u8> = (0..len).map(|at| byte(0, at)).collect();
            let zeros = random_range(&mut random, len, page);
            expected[zeros].fill(0);
            let mut source = LayeredSource::new(BytesSource::new(expected.clone())).unwrap();
            let mut forks: Vec<(LayeredSource, Vec<u8>)> = Vec::new();
            for layer in 1..=random.below(8) {
                let kind = random.below(4);
                match kind {
                    0 | 1 => {
                        let diff = files().into_iter().nth(kind).unwrap();
                        diff.set_len(len as u64).unwrap();
                        for _ in 0..random.below(6) {
                            // Whole pages, as a VM monitor writes them; some of zeros.
                            let range = random_range(&mut random, len, page);
                            let range = range.start / page * page..range.end.next_multiple_of(page).min(len);
                            let zero = random.below(4) == 0;
                            let bytes: Vec<u8> =
                                range.clone().map(|at| if zero { 0 } else { byte(layer, at) }).collect();
                            diff.write_all_at(&bytes, range.start as u64).unwrap();
                            expected[range].copy_from_slice(&bytes);
                        }
                        source.push_diff(diff).unwrap();
                    }
                    2 => {
                        let extents = ranges(&mut random, len, page);
                        let end = extents.last().map_or(0, |last| last.end);
                        let bytes: Vec<u8> = (0..end).map(|at| byte(layer, at)).collect();
                        source.push_extents(BytesSource::new(bytes), extents.iter().map(as_u64)).unwrap();
                        let mut all = extents.into_iter().flatten();
                        all.by_ref().for_each(|at| expected[at] = byte(layer, at));
                    }
                    _ => {
                        let extents = ranges(&mut random, len, page);
                        source.push_zeros(extents.iter().map(as_u64)).unwrap();
                        extents.into_iter().for_each(|range| expected[range].fill(0));
                    }
                }
                if random.below(3) == 0 {
                    forks.push((source.clone(), expected.clone()));
                }
            }
            println!("seed {seed}: {source:?}");
            for (source, expected) in forks.iter().chain([&(source, expected)]) {
                check_all(source, expected, &mut random, page);
            }
        }
    }

    /// A layer that has all pages, every second one, and the same again by a source that knows its zeros.
    #[test]
    fn zeros_of_a_layer_hide_the_base_and_holes_do_not() {
        require!();
        let page = crate::page_size();
        for diff in files() {
            diff.set_len(6 * page as u64).unwrap();
            diff.write_all_at(&vec![0; 2 * page], page as u64).unwrap();
            diff.write_all_at(&vec![9; page], 4 * page as u64).unwrap();
            let extents = LayeredSource::extents_of(&diff).unwrap();
            assert_eq!(extents, [(1, 3), (4, 5)].map(|(start, end)| start * page as u64..end * page as u64));
            let base = vec![1; 6 * page];
            let expected = [[1, 0, 0, 1, 9, 1].map(|byte| vec![byte; page])].concat().concat();
            let mut source = LayeredSource::new(BytesSource::new(base)).unwrap();
            source.push_diff(diff).unwrap();
            assert_eq!(source.diffs(), 1);
            check_all(&source, &expected, &mut Random::new(1), page);
            // Those of a source that isn't a file.
            let mut source = LayeredSource::new(source).unwrap();
            source.push_extents(ZeroSource, iter::once(page as u64..5 * page as u64)).unwrap();
            let zeros = [vec![1; page], vec![0; 4 * page], vec![1; page]].concat();
            check_all(&source, &zeros, &mut Random::new(2), page);
            assert_eq!(source.zeros(page as u64), 4 * page as u64);
        }
    }

    #[test]
    fn a_read_asks_only_the_layers_that_show() {
        require!();
        type Asked = Arc<std::sync::Mutex<Vec<(usize, u64, usize)>>>;
        let asked = Asked::default();
        let layer = |layer: usize| {
            let asked = Arc::clone(&asked);
            move |offset: u64, page: &mut [u8]| {
                asked.lock().unwrap().push((layer, offset, page.len()));
                page.fill(layer as u8 + 1);
                Ok(PageData::Data)
            }
        };
        let mut base = crate::source::ConcatSource::new();
        base.push_part(layer(0), 0..100).unwrap();
        let mut source = LayeredSource::new(base).unwrap();
        source.push_extents(layer(1), [10..20, 20..30, 50..60]).unwrap();
        source.push_extents(layer(2), iter::once(15..55)).unwrap();
        let mut bytes = [0; 100];
        source.read(0, &mut bytes).unwrap();
        let expected = [(0, 0, 10), (1, 10, 5), (2, 15, 40), (1, 55, 5), (0, 60, 40)];
        assert_eq!(*asked.lock().unwrap(), expected);
        let content: Vec<u8> =
            expected.iter().flat_map(|(layer, _, len)| vec![*layer as u8 + 1; *len]).collect();
        assert_eq!(content, bytes);
        check(&source, &content, 12..57);
    }

    #[test]
    fn an_error_of_a_layer_is_that_of_its_pages_alone() {
        require!();
        let fails = |_: u64, _: &mut [u8]| -> io::Result<PageData> { Err(io::Error::other("lost")) };
        let mut source = LayeredSource::new(BytesSource::new(vec![1; 100])).unwrap();
        source.push_extents(fails, iter::once(40..50)).unwrap();
        for range in [30..41, 40..41, 49..60, 0..100] {
            let error =
                source.read(range.start, &mut vec![0; (range.end - range.start) as usize]).unwrap_err();
            assert_eq!(error.to_string(), "lost", "{range:?}");
        }
        for range in [0..40, 50..100] {
            check(&source, &[1; 100], range);
        }
    }

    #[test]
    fn shortened_diff_is_an_error_and_never_the_base() {
        require!();
        let page = crate::page_size() as u64;
        let diff = File::from(memfd_of_bytes(0, 0));
        diff.set_len(4 * page).unwrap();
        diff.write_all_at(&vec![2; page as usize], 2 * page).unwrap();
        let mut source = LayeredSource::new(BytesSource::new(vec![1; 4 * page as usize])).unwrap();
        source.push_diff(diff.try_clone().unwrap()).unwrap();
        diff.set_len(page).unwrap();
        let error = source.read(2 * page, &mut vec![0; page as usize]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn offset_of_a_diff_stays() {
        require!();
        use std::io::{Seek, SeekFrom};
        for mut diff in files() {
            diff.set_len(1 << 20).unwrap();
            diff.write_all_at(&[1], 1 << 19).unwrap();
            diff.seek(SeekFrom::Start(17)).unwrap();
            assert_eq!(LayeredSource::extents_of(&diff).unwrap().len(), 1);
            assert_eq!(diff.stream_position().unwrap(), 17);
        }
    }

    #[test]
    fn layers_that_cannot_be_are_refused_and_leave_it_as_it_was() {
        require!();
        let base = || BytesSource::new(vec![1; 100]);
        assert_eq!(
            LayeredSource::new(ZeroSource).unwrap_err().to_string(),
            "a base without a length: ConcatSource::push_part gives it one"
        );
        let mut source = LayeredSource::new(base()).unwrap();
        let diff = File::from(memfd_of_bytes(0, 0));
        diff.set_len(99).unwrap();
        #[expect(clippy::reversed_empty_ranges, reason = "what is refused")]
        let backwards = 5..4;
        let texts = [
            source.push_diff(diff).map(drop).unwrap_err(),
            source.push_extents(base(), iter::once(backwards)).map(drop).unwrap_err(),
            source.push_extents(base(), [0..10, 9..12]).map(drop).unwrap_err(),
            source.push_zeros(iter::once(0..101)).map(drop).unwrap_err(),
            source.push_extents(BytesSource::new("short"), [0..5, 7..8]).map(drop).unwrap_err(),
        ]
        .map(|error| {
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            error.to_string()
        });
        assert_eq!(
            texts,
            [
                "a diff of 99 bytes over a base of 100 bytes",
                "the extent 5..4 can't be: it ends before it begins",
                "the extent 9..12 can't be: the one before ends at 10",
                "the extent 0..101 can't be: the base has 100 bytes",
                "the extent 7..8 can't be: the layer has 5 bytes",
            ]
        );
        assert_eq!(source.diffs(), 0);
        check(&source, &[1; 100], 0..100);
        // As files of /proc and /sys, all of which is data, and nothing allocated.
        let told = File::open("/sys/kernel/notes").and_then(|file| LayeredSource::extents_of(&file));
        assert!(told.is_ok_and(|extents| extents.iter().map(|extent| extent.end).sum::<u64>() <= 4096));
    }

    #[test]
    fn holes_of_a_file_system_with_large_blocks_are_refused() {
        require!();
        // Huge pages are the blocks of hugetlbfs, and none needs to be free.
        let file = File::from(crate::support::mapping::memfd(libc::MFD_HUGETLB, 0));
        let error = LayeredSource::extents_of(&file).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        let text = error.to_string();
        assert!(
            text.starts_with("the file system keeps blocks of ") && text.ends_with("give the extents"),
            "{text}"
        );
    }

    /// A snapshot file with these parts, of blocks of 4096 bytes.
    #[cfg(feature = "snapshot")]
    fn snapshot(len: u64, parts: &[(u64, crate::snapshot::Content<'_>)]) -> SnapshotReader {
        use crate::snapshot::{Geometry, Region, Sink, SnapshotId, SnapshotWriter};
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name =
            format!("userfaultfd-layer-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        let writer = SnapshotWriter::create(&path).unwrap();
        let mut writer = writer.named(SnapshotId([1; 16]), Some(SnapshotId([2; 16])), 4096);
        let regions = vec![Region { addresses: 0..len, page: 4096 }];
        writer.begin(&Geometry { regions, incremental: true }).unwrap();
        parts.iter().for_each(|(offset, content)| writer.write(*offset, *content).unwrap());
        writer.finish().unwrap();
        let reader = SnapshotReader::open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        reader
    }

    #[cfg(feature = "snapshot")]
    #[test]
    fn gone_pages_of_a_snapshot_on_top_hide_the_base() {
        require!();
        use crate::snapshot::Content;
        const PAGE: usize = 4096;
        let len = 8 * PAGE;
        let mut source = LayeredSource::new(BytesSource::new(vec![1; len])).unwrap();
        let at = |page: usize| (page * PAGE) as u64;
        let two = vec![2; 2 * PAGE];
        let first =
            [(at(1), Content::Data(&two)), (at(4), Content::Zero(at(1))), (at(6), Content::Gone(at(1)))];
        let first = snapshot(len as u64, &first);
        assert_eq!(first.extents().collect::<Vec<_>>(), [at(1)..at(3), at(4)..at(5), at(6)..at(7)]);
        source.push_snapshot(first).unwrap();
        let expected = [[1, 2, 2, 1, 0, 1, 9, 1].map(|byte| vec![byte; PAGE])].concat().concat();
        check(&source, &expected, 0..6 * PAGE);
        check(&source, &expected, 7 * PAGE..len + 1);
        // Pages smaller than blocks.
        check(&source, &expected, PAGE / 2..PAGE + 512);
        let error = source.read(at(6), &mut [0; PAGE]).unwrap_err();
        assert_eq!(error.to_string(), "the page was gone before the snapshot could save it");
        // The next one has it.
        let nine = vec![9; PAGE];
        source.push_snapshot(snapshot(len as u64, &[(at(6), Content::Data(&nine))])).unwrap();
        check_all(&source, &expected, &mut Random::new(1), PAGE);
        let error = source.push_snapshot(snapshot(at(7), &[])).map(drop).unwrap_err();
        assert_eq!(error.to_string(), "a snapshot of 28672 bytes over a base of 32768 bytes");
    }
}
