//! Opening what a name on the command line leads to.

use std::io;

use userfaultfd::pager::{HttpSource, WorkingSet};
use userfaultfd::snapshot::{FormatError, ImageFormat, MemoryImage, SnapshotReader};

use crate::exit::Failure;

/// A number of bytes, perhaps with a letter.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let shift = match text.bytes().last() {
        Some(b'K') => 10,
        Some(b'M') => 20,
        Some(b'G') => 30,
        Some(b'T') => 40,
        _ => 0,
    };
    let number = if shift == 0 { text } else { &text[..text.len() - 1] };
    let number: u64 = number.parse().map_err(|_| "it isn't a number of bytes, such as 512M".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "it is too large".to_owned())
}

pub(crate) fn is_url(name: &str) -> bool {
    name.starts_with("http://") || name.starts_with("https://")
}

/// A snapshot file, perhaps an increment, or another image.
pub(super) enum Either {
    Snapshot(Box<SnapshotReader>),
    Other(MemoryImage),
}

pub(super) fn either(name: &str) -> Result<Either, Failure> {
    let image = if is_url(name) {
        let image = MemoryImage::open_source(HttpSource::open(name).map_err(Failure::of(name))?);
        let image = image.map_err(Failure::of(name))?;
        if image.format() != ImageFormat::Snapshot {
            return Ok(Either::Other(image));
        }
        return snapshot(name).map(|reader| Either::Snapshot(Box::new(reader)));
    } else if ImageFormat::detect(name).map_err(Failure::of(name))? == ImageFormat::Snapshot {
        return snapshot(name).map(|reader| Either::Snapshot(Box::new(reader)));
    } else {
        MemoryImage::open(name)
    };
    image.map(Either::Other).map_err(Failure::of(name))
}

/// An image that has all of its memory.
pub(super) fn image(name: &str, format: Option<ImageFormat>) -> Result<MemoryImage, Failure> {
    let opened = match format {
        _ if is_url(name) => {
            let source = HttpSource::open(name).map_err(Failure::of(name))?;
            match format {
                None => MemoryImage::open_source(source),
                Some(ImageFormat::Raw) => MemoryImage::of_source(source),
                Some(ImageFormat::Snapshot) => SnapshotReader::from_source(source)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
                    .and_then(MemoryImage::of_snapshot),
                Some(_) => {
                    return Err(Failure::Arguments("a URL is of a raw image or of a snapshot file"));
                }
            }
        }
        None => MemoryImage::open(name),
        Some(format) => MemoryImage::open_as(name, format),
    };
    opened.map_err(Failure::of(name))
}

/// A snapshot file, perhaps an increment.
pub(super) fn snapshot(name: &str) -> Result<SnapshotReader, Failure> {
    let opened = if is_url(name) {
        SnapshotReader::from_source(HttpSource::open(name).map_err(Failure::of(name))?)
    } else {
        SnapshotReader::open(name)
    };
    opened.map_err(|error| {
        let helps = match error {
            FormatError::NotASnapshot => "; `uffd image convert` makes one of it",
            _ => "",
        };
        Failure::Failed(format!("{name}: {error}{helps}"))
    })
}

/// A snapshot on the one below it, if it follows that.
pub(super) fn on(
    snapshot: SnapshotReader,
    below: Option<SnapshotReader>,
) -> Result<SnapshotReader, FormatError> {
    match below {
        Some(below) if snapshot.parent() == Some(below.id()) => snapshot.on(below),
        _ => Ok(snapshot),
    }
}

/// The working set that an image has.
pub(super) fn working_set(image: &MemoryImage) -> io::Result<Option<WorkingSet>> {
    image.snapshot().map_or(Ok(None), SnapshotReader::working_set)
}
