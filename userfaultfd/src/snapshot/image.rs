//! Images of memory that other programs have written, and copies of them.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use super::file::format::{FormatError, MAGIC};
use super::file::reader::SnapshotReader;
use super::file::writer::SnapshotWriter;
use super::sink::{Content, Geometry, Region, Sink};
#[cfg(feature = "pager")]
use crate::pager::WorkingSet;
use crate::source::{self, FileSource, LayeredSource, MappedRamSource, PageData, PageSource};
use crate::{PendingFile, page_size};

/// Bytes that are read and written at a time.
const PIECE_BYTES: u64 = 1 << 20;

/// The file of a folder of Cloud Hypervisor that holds the memory.
const MEMORY_RANGES: &str = "memory-ranges";

/// The format of an image of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ImageFormat {
    /// The bytes of the memory and nothing else, one region after the other: the memory file of Firecracker, dumps.
    Raw,
    /// The folder of a snapshot of Cloud Hypervisor. Its `memory-ranges` has the ranges one after the other, in the order in
    /// which its `state.json` lists them; offsets of the image are those in that file.
    CloudHypervisor,
    /// A migration file of QEMU with the capability mapped-ram. Its blocks of RAM lie in the image one after the other, as in a
    /// [`MappedRamSource`].
    MappedRam,
    /// A snapshot file of this crate, of either version: see [`SnapshotReader`].
    Snapshot,
}

impl ImageFormat {
    /// The names of the formats, as [`FromStr`] takes them. `Display` prints the first of each.
    const NAMES: [(&str, Self); 5] = [
        ("raw", Self::Raw),
        ("firecracker", Self::Raw),
        ("cloud-hypervisor", Self::CloudHypervisor),
        ("mapped-ram", Self::MappedRam),
        ("snapshot", Self::Snapshot),
    ];

    /// Returns an iterator over the names that [`FromStr`] takes. `firecracker` is another name of [`Raw`](Self::Raw).
    #[must_use]
    pub fn names() -> impl ExactSizeIterator<Item = &'static str> {
        Self::NAMES.iter().map(|(name, _)| *name)
    }

    /// Returns the format of the image at a path, by its first bytes: [`Raw`](Self::Raw) if it is none of the others.
    ///
    /// # Errors
    ///
    /// Those of open(2) and read(2).
    pub fn detect(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        if path.is_dir() {
            return match path.join(MEMORY_RANGES).is_file() {
                true => Ok(Self::CloudHypervisor),
                false => Err(invalid(format!("the folder has no file {MEMORY_RANGES}"))),
            };
        }
        let mut start = Vec::new();
        File::open(path)?.take(8).read_to_end(&mut start)?;
        Ok(match start.as_slice() {
            start if start == MAGIC => Self::Snapshot,
            start if start.starts_with(b"QEVM") => Self::MappedRam,
            _ => Self::Raw,
        })
    }

    /// Returns the format of the image that a source has, by one read: [`Snapshot`](Self::Snapshot), or [`Raw`](Self::Raw).
    ///
    /// # Errors
    ///
    /// Those of the source.
    pub fn detect_in(source: &dyn PageSource) -> io::Result<Self> {
        let mut start = [0; MAGIC.len()];
        read_early(source, 0, &mut start)?;
        Ok(if start == MAGIC { Self::Snapshot } else { Self::Raw })
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = Self::NAMES.iter().find(|(_, format)| format == self);
        f.write_str(named.map_or("unnamed", |(name, _)| name))
    }
}

impl FromStr for ImageFormat {
    type Err = io::Error;

    /// Takes one of the [`names`](Self::names).
    ///
    /// # Errors
    ///
    /// `InvalidInput` for any other text.
    fn from_str(name: &str) -> io::Result<Self> {
        let named = Self::NAMES.iter().find(|(known, _)| *known == name);
        named.map(|(_, format)| *format).ok_or_else(|| {
            let known: Vec<_> = Self::names().collect();
            let text = format!("{name:?} is no format of images; there are {}", known.join(", "));
            io::Error::new(io::ErrorKind::InvalidInput, text)
        })
    }
}

/// An image of memory in any [format](ImageFormat), with diffs on top: a [`PageSource`].
///
/// ```
/// use std::os::unix::fs::FileExt;
/// use userfaultfd::snapshot::{ChunkOptions, ImageCopy, MemoryImage, SnapshotReader, SnapshotWriter};
///
/// // What Firecracker has written: the memory, and a sparse diff of it.
/// let folder = std::env::temp_dir().join(format!("{}.images", std::process::id()));
/// std::fs::create_dir(&folder)?;
/// std::fs::write(folder.join("memory"), vec![1; 1 << 20])?;
/// let diff = std::fs::File::create(folder.join("diff"))?;
/// diff.set_len(1 << 20)?;
/// diff.write_all_at(&[2; 1 << 16], 1 << 16)?;
///
/// let mut image = MemoryImage::open(folder.join("memory"))?;
/// image.push_diff(std::fs::File::open(folder.join("diff"))?)?;
/// let writer = SnapshotWriter::create(folder.join("image"))?.chunks(&ChunkOptions::new());
/// ImageCopy::new(&image).write(writer)?;
///
/// let image = SnapshotReader::open(folder.join("image"))?;
/// ImageCopy::new(&image).write_raw(folder.join("raw"))?;
/// let raw = std::fs::read(folder.join("raw"))?;
/// assert_eq!((raw[0], raw[1 << 16], raw[2 << 16]), (1, 2, 1));
/// # std::fs::remove_dir_all(&folder)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct MemoryImage {
    format: ImageFormat,
    source: Arc<dyn PageSource>,
    snapshot: Option<Arc<SnapshotReader>>,
    regions: Vec<Region>,
}

impl MemoryImage {
    /// Opens an image of the format that it [has](ImageFormat::detect).
    ///
    /// # Errors
    ///
    /// Those of [`open_as`](Self::open_as).
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let format = ImageFormat::detect(&path)?;
        Self::open_as(path, format)
    }

    /// Opens an image of a format.
    ///
    /// # Errors
    ///
    /// Those of open(2) and read(2). Of the kind [`InvalidData`](ErrorKind::InvalidData): it isn't of this format, or damaged;
    /// an incremental snapshot needs its parents ([`SnapshotReader::on`]). Of the kind
    /// [`InvalidInput`](ErrorKind::InvalidInput): its length is no whole number of pages.
    pub fn open_as(path: impl AsRef<Path>, format: ImageFormat) -> io::Result<Self> {
        let path = path.as_ref();
        match format {
            ImageFormat::Raw => Self::of(format, FileSource::open(path)?),
            ImageFormat::CloudHypervisor => Self::of(format, FileSource::open(path.join(MEMORY_RANGES))?),
            ImageFormat::MappedRam => {
                let source = MappedRamSource::open(path)?;
                let regions = source.blocks().iter().map(|block| {
                    let page = block.page_size.max(page_size() as u64);
                    Region::new(block.offset..block.offset + block.len, page)
                });
                let regions = regions.collect();
                Self::with_regions(format, Arc::new(source), regions)
            }
            ImageFormat::Snapshot => Self::of_snapshot(SnapshotReader::open(path).map_err(into_io)?),
        }
    }

    /// Returns a snapshot as an image.
    ///
    /// # Errors
    ///
    /// Of the kind [`InvalidData`](ErrorKind::InvalidData): it is incremental, and doesn't stand on its parent.
    pub fn of_snapshot(snapshot: SnapshotReader) -> io::Result<Self> {
        if let Some(parent) = snapshot.needed_parent() {
            return Err(into_io(FormatError::NeedsParent { parent }));
        }
        let regions = snapshot.regions().to_vec();
        let snapshot = Arc::new(snapshot);
        let source = Arc::<SnapshotReader>::clone(&snapshot);
        let image = Self::with_regions(ImageFormat::Snapshot, source, regions)?;
        Ok(Self { snapshot: Some(snapshot), ..image })
    }

    /// Opens the image that any source has, of the format that it [has](ImageFormat::detect_in): an object behind HTTP, for
    /// one.
    ///
    /// # Errors
    ///
    /// Those of the source, of [`of_source`](Self::of_source), and of [`of_snapshot`](Self::of_snapshot). Of the kind
    /// [`InvalidData`](ErrorKind::InvalidData): a snapshot is damaged.
    pub fn open_source(source: impl PageSource + 'static) -> io::Result<Self> {
        match ImageFormat::detect_in(&source)? {
            ImageFormat::Snapshot => Self::of_snapshot(SnapshotReader::from_source(source).map_err(into_io)?),
            _ => Self::of_source(source),
        }
    }

    /// Returns a raw image that any source has.
    ///
    /// # Errors
    ///
    /// Of the kind [`InvalidInput`](ErrorKind::InvalidInput): the source has no length, or one that is no whole number of pages.
    pub fn of_source(source: impl PageSource + 'static) -> io::Result<Self> {
        Self::of(ImageFormat::Raw, source)
    }

    fn of(format: ImageFormat, source: impl PageSource + 'static) -> io::Result<Self> {
        let len = len_of(&source)?;
        let regions = if len == 0 { Vec::new() } else { vec![Region::new(0..len, page_size() as u64)] };
        Self::with_regions(format, Arc::new(source), regions)
    }

    fn with_regions(
        format: ImageFormat,
        source: Arc<dyn PageSource>,
        regions: Vec<Region>,
    ) -> io::Result<Self> {
        check_len(len_of(&source)?, page_size() as u64)?;
        Ok(Self { format, source, snapshot: None, regions })
    }

    /// Puts a sparse file on top, such as a diff of Firecracker: what isn't a hole is its content, also zeros. See
    /// [`LayeredSource`] about files whose holes didn't survive.
    ///
    /// # Errors
    ///
    /// Those of [`LayeredSource::push_diff`].
    pub fn push_diff(&mut self, diff: File) -> io::Result<&mut Self> {
        let mut layered = LayeredSource::new(Arc::clone(&self.source))?;
        layered.push_diff(diff)?;
        self.source = Arc::new(layered);
        Ok(self)
    }

    /// Returns the format of the image.
    #[must_use]
    pub fn format(&self) -> ImageFormat {
        self.format
    }

    /// Returns the snapshot that is below all diffs, if the image is one.
    #[must_use]
    pub fn snapshot(&self) -> Option<&SnapshotReader> {
        self.snapshot.as_deref()
    }

    /// Returns the regions of the memory, one behind the other. Where the format tells no addresses, these are the offsets.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }
}

impl PageSource for MemoryImage {
    source::read_through!(self => self.source);
}

impl fmt::Debug for MemoryImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryImage")
            .field("format", &self.format)
            .field("regions", &self.regions)
            .finish_non_exhaustive()
    }
}

/// The function that is told how many bytes of how many are done.
type OnProgress<'a> = Box<dyn FnMut(u64, u64) -> io::Result<()> + 'a>;

/// Copies an image from any source to a snapshot file or a raw file.
#[must_use = "`write` or `write_raw` makes the copy"]
pub struct ImageCopy<'a> {
    source: &'a dyn PageSource,
    regions: Option<Vec<Region>>,
    extents: Option<Vec<Range<u64>>>,
    #[cfg(feature = "pager")]
    working_set: Option<WorkingSet>,
    progress: OnProgress<'a>,
}

impl<'a> ImageCopy<'a> {
    /// Returns a copy of all that a source has, which [`write`](Self::write) or [`write_raw`](Self::write_raw) makes.
    pub fn new(source: &'a dyn PageSource) -> Self {
        Self {
            source,
            regions: None,
            extents: None,
            #[cfg(feature = "pager")]
            working_set: None,
            progress: Box::new(|_, _| Ok(())),
        }
    }

    /// Sets the regions that the snapshot file names: together as long as the source. The default is one region at address 0.
    pub fn regions(mut self, regions: impl IntoIterator<Item = Region>) -> Self {
        self.regions = Some(regions.into_iter().collect());
        self
    }

    /// Copies some ranges alone, in order, of whole pages: an incremental snapshot, for a writer that
    /// [follows](SnapshotWriter::follows) another one. [`changed_ranges`] finds them, and
    /// [`LayeredSource::extents_of`] those of a sparse diff.
    pub fn extents(mut self, extents: impl IntoIterator<Item = Range<u64>>) -> Self {
        self.extents = Some(extents.into_iter().collect());
        self
    }

    /// Writes the pages of a working set first, in its order, and the set into the index, so that a restore begins with
    /// [one long read](SnapshotReader::preload). The set is of a region of the length of the source. The writer must write
    /// [chunks](SnapshotWriter::chunks).
    #[cfg(feature = "pager")]
    pub fn working_set(mut self, set: WorkingSet) -> Self {
        self.working_set = Some(set);
        self
    }

    /// Calls a function after each MiB or so with the bytes that are done and those of all. Its error ends the copy.
    pub fn progress(mut self, call: impl FnMut(u64, u64) -> io::Result<()> + 'a) -> Self {
        self.progress = Box::new(call);
        self
    }

    /// Writes a snapshot file. Returns the writer.
    ///
    /// # Errors
    ///
    /// Those of the source, the writer, and the progress function. Of the kind [`InvalidInput`](ErrorKind::InvalidInput): the source has no
    /// length, or one that isn't that of the regions, or no whole number of pages; extents that overlap, aren't in order or not of
    /// whole pages, or without a writer that follows a snapshot; a working set of another length, with extents, or for a writer
    /// without chunks.
    pub fn write<W: Write + Send>(self, mut writer: SnapshotWriter<W>) -> io::Result<SnapshotWriter<W>> {
        let (len, block) = (len_of(self.source)?, page_size() as u64);
        check_len(len, block)?;
        let regions = match &self.regions {
            Some(regions) => regions.clone(),
            None if len == 0 => Vec::new(),
            None => vec![Region::new(0..len, block)],
        };
        let geometry = Geometry { regions, incremental: self.extents.is_some() };
        let regions_len = geometry.regions.iter().try_fold(0_u64, |sum, region| {
            sum.checked_add(region.addresses.end.checked_sub(region.addresses.start)?)
        });
        if regions_len != Some(len) {
            let text = format!("regions that have other than the {len} bytes of the image");
            return Err(invalid(text));
        }
        let extents = self.checked_extents(len, block)?;
        let total = extents.iter().map(|extent| extent.end - extent.start).sum();
        #[cfg(feature = "pager")]
        let first = self.first_ranges(len, block, writer.has_chunks())?;
        #[cfg(not(feature = "pager"))]
        let first: Vec<Range<u64>> = Vec::new();
        writer.begin(&geometry)?;
        let Self { source, mut progress, .. } = self;
        let mut done = 0;
        let mut copy = |range: &Range<u64>, writer: &mut SnapshotWriter<W>| {
            read_pieces(source, range, block, |at, content| {
                writer.write(at, content)?;
                done += content.len();
                progress(done, total)
            })
        };
        for range in &first {
            copy(range, &mut writer)?;
        }
        #[cfg(feature = "pager")]
        if let Some(set) = &self.working_set {
            writer.end_working_set(set.encode());
        }
        let mut written = first;
        written.sort_unstable_by_key(|range| range.start);
        for extent in &extents {
            let mut at = extent.start;
            for range in written.iter().filter(|range| range.start < extent.end && range.end > extent.start) {
                copy(&(at..range.start.max(at)), &mut writer)?;
                at = range.end;
            }
            copy(&(at..extent.end.max(at)), &mut writer)?;
        }
        writer.finish()?;
        Ok(writer)
    }

    /// Writes the bytes of the memory and nothing else: a sparse file, in which zeros are holes, and which takes its name when
    /// it is complete ([`PendingFile`]). Returns how many bytes aren't holes.
    ///
    /// # Errors
    ///
    /// Those of the source, the file, and the progress function. Of the kind [`InvalidInput`](ErrorKind::InvalidInput): the source has no
    /// length, or the copy has extents, which a raw file doesn't tell.
    pub fn write_raw(mut self, path: impl AsRef<Path>) -> io::Result<u64> {
        let len = len_of(self.source)?;
        if self.extents.is_some() {
            return Err(invalid("a raw file of extents alone".into()));
        }
        let file = PendingFile::create(path)?;
        file.file().set_len(len)?;
        let (block, mut done, mut written) = (page_size() as u64, 0, 0);
        read_pieces(self.source, &(0..len), block, |at, content| {
            if let Content::Data(bytes) = content {
                // Runs of blocks that aren't zeros.
                let mut from = at;
                for run in bytes.chunks(block as usize).collect::<Vec<_>>().chunk_by(both_have_data) {
                    let run_len: u64 = run.iter().map(|block| block.len() as u64).sum();
                    if !source::is_zero(run[0]) {
                        let into = (from - at) as usize;
                        file.file().write_all_at(&bytes[into..into + run_len as usize], from)?;
                        written += run_len;
                    }
                    from += run_len;
                }
            }
            done += content.len();
            (self.progress)(done, len)
        })?;
        file.commit()?;
        Ok(written)
    }

    fn checked_extents(&self, len: u64, block: u64) -> io::Result<Vec<Range<u64>>> {
        let Some(extents) = &self.extents else { return Ok(std::iter::once(0..len).collect()) };
        let mut last = 0;
        for Range { start, end } in extents {
            if *start < last || end < start || *end > len || start % block != 0 || end % block != 0 {
                let text = format!("the extent {start}..{end} isn't of whole pages in order");
                return Err(invalid(text));
            }
            last = *end;
        }
        Ok(extents.clone())
    }

    /// The ranges of the working set, in its order.
    #[cfg(feature = "pager")]
    fn first_ranges(&self, len: u64, block: u64, has_chunks: bool) -> io::Result<Vec<Range<u64>>> {
        let Some(set) = &self.working_set else { return Ok(Vec::new()) };
        if self.extents.is_some() || !has_chunks {
            return Err(invalid("a working set is for all of an image, in chunks".into()));
        }
        let set_len = set.region_pages() as u64 * set.page_size() as u64;
        if set_len != len {
            let text = format!("a working set of {set_len} bytes, and an image of {len} bytes");
            return Err(invalid(text));
        }
        let pages = match set.page_size() as u64 {
            page if page < block => set.with_page_size(block as usize).map_err(io::Error::other)?,
            _ => set.clone(),
        };
        let page = pages.page_size() as u64;
        Ok(pages.runs().iter().map(|run| run.start as u64 * page..run.end as u64 * page).collect())
    }
}

impl fmt::Debug for ImageCopy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("ImageCopy");
        debug
            .field("len", &self.source.len())
            .field("regions", &self.regions)
            .field("extents", &self.extents);
        #[cfg(feature = "pager")]
        debug.field("working_set", &self.working_set.as_ref().map(WorkingSet::len));
        debug.finish_non_exhaustive()
    }
}

/// Returns the ranges in which an image differs from an older one of the same length, of whole pages, in order. `progress` is
/// told the bytes that are done and those of all; its error ends the search.
///
/// # Errors
///
/// Those of the sources and of `progress`. Of the kind [`InvalidInput`](ErrorKind::InvalidInput): they have no length, or not the
/// same.
pub fn changed_ranges(
    old: &dyn PageSource,
    new: &dyn PageSource,
    mut progress: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<Vec<Range<u64>>> {
    let (old_len, len, block) = (len_of(old)?, len_of(new)?, page_size() as u64);
    if old_len != len {
        return Err(invalid(format!("an image of {old_len} bytes and one of {len} bytes")));
    }
    check_len(len, block)?;
    let (mut changed, mut at): (Vec<Range<u64>>, u64) = (Vec::new(), 0);
    let mut older = Vec::new();
    while at < len {
        let zeros = old.zeros(at).min(new.zeros(at)).min(len - at) / block * block;
        if zeros > 0 {
            at += zeros;
            progress(at, len)?;
            continue;
        }
        let end = (at + PIECE_BYTES).min(len);
        older.resize((end - at) as usize, 0);
        read_early(old, at, &mut older)?;
        read_pieces(new, &(at..end), block, |from, content| {
            let into = (from - at) as usize;
            let older = older[into..into + content.len() as usize].chunks(block as usize);
            for (page, older) in (from..).step_by(block as usize).zip(older) {
                let is_same = match content {
                    Content::Data(bytes) => &bytes[(page - from) as usize..][..block as usize] == older,
                    _ => source::is_zero(older),
                };
                match changed.last_mut() {
                    _ if is_same => {}
                    Some(last) if last.end == page => last.end += block,
                    _ => changed.push(page..page + block),
                }
            }
            Ok(())
        })?;
        at = end;
        progress(at, len)?;
    }
    Ok(changed)
}

/// Reads a range in pieces of whole pages.
fn read_pieces(
    source: &dyn PageSource,
    range: &Range<u64>,
    block: u64,
    mut each: impl FnMut(u64, Content<'_>) -> io::Result<()>,
) -> io::Result<()> {
    let (mut at, mut bytes) = (range.start, Vec::new());
    while at < range.end {
        let left = range.end - at;
        let zeros = source.zeros(at);
        let zeros = if zeros >= left { left } else { zeros / block * block };
        if zeros > 0 {
            each(at, Content::Zero(zeros))?;
            at += zeros;
            continue;
        }
        // Not over the border of a piece: chunks of what is read are whole then.
        let len = (PIECE_BYTES - at % PIECE_BYTES).min(left);
        bytes.resize(len as usize, 0);
        match source.read_early(at, &mut bytes)? {
            PageData::Data => each(at, Content::Data(&bytes))?,
            PageData::Zero => each(at, Content::Zero(len))?,
        }
        at += len;
    }
    Ok(())
}

fn read_early(source: &dyn PageSource, at: u64, bytes: &mut [u8]) -> io::Result<()> {
    if source.read_early(at, bytes)? == PageData::Zero {
        bytes.fill(0);
    }
    Ok(())
}

fn both_have_data(one: &&[u8], other: &&[u8]) -> bool {
    source::is_zero(one) == source::is_zero(other)
}

fn len_of(source: &(impl PageSource + ?Sized)) -> io::Result<u64> {
    source.len().ok_or_else(|| invalid("the source has no length, which an image needs".into()))
}

fn check_len(len: u64, block: u64) -> io::Result<()> {
    if len % block == 0 {
        return Ok(());
    }
    Err(invalid(format!("an image of {len} bytes, which is no whole number of pages of {block} bytes")))
}

fn into_io(error: FormatError) -> io::Error {
    match error {
        FormatError::Io(error) => error,
        error => io::Error::new(ErrorKind::InvalidData, error),
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, text)
}
