//! [`CriuMemory`]: the memory of a process of a checkpoint, by address.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::image::Pagemap;
use crate::source::{PageData, PageSource};

/// The memory of a process of a checkpoint, as a source: the offset of a byte is its address. What no image has is zeros.
pub struct CriuMemory {
    /// By address.
    parts: Vec<Part>,
    /// The images with pages: the checkpoint, and those before it.
    pages: Vec<Arc<dyn PageSource>>,
}

/// Pages that follow each other in an image.
#[derive(Clone, Debug)]
struct Part {
    start: u64,
    end: u64,
    /// Which image has them, and where.
    image: usize,
    offset: u64,
}

impl fmt::Debug for CriuMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CriuMemory").field("parts", &self.parts).finish_non_exhaustive()
    }
}

impl CriuMemory {
    /// Of a checkpoint, and those before it.
    pub(super) fn new(layers: Vec<(Pagemap, Arc<dyn PageSource>)>) -> io::Result<Self> {
        let (mut below, mut pages) = (Vec::new(), Vec::new());
        // From the oldest on.
        for (image, (pagemap, source)) in layers.into_iter().rev().enumerate() {
            let (mut parts, mut offset) = (Vec::new(), 0);
            for entry in pagemap.entries {
                if entry.present {
                    parts.push(Part { start: entry.start, end: entry.end, image, offset });
                    offset += entry.end - entry.start;
                } else if entry.in_parent {
                    inherit(&below, entry.start..entry.end, &mut parts)?;
                }
            }
            if source.len().is_some_and(|len| len < offset) {
                return Err(io::Error::other("the image with its pages is too short"));
            }
            below = parts;
            pages.push(source);
        }
        Ok(Self { parts: below, pages })
    }

    /// The addresses of what the images have, in order.
    pub(super) fn parts(&self) -> impl Iterator<Item = Range<u64>> {
        self.parts.iter().map(|part| part.start..part.end)
    }

    /// The part at an address, or the next one.
    fn part_from(&self, address: u64) -> Option<&Part> {
        self.parts.get(self.parts.partition_point(|part| part.end <= address))
    }

    fn read_by(
        &self,
        address: u64,
        page: &mut [u8],
        read: impl Fn(&dyn PageSource, u64, &mut [u8]) -> io::Result<PageData>,
    ) -> io::Result<PageData> {
        let (mut at, mut data) = (0, PageData::Zero);
        while at < page.len() {
            let here = address + at as u64;
            let part = self.part_from(here).filter(|part| part.start < address + page.len() as u64);
            let Some(part) = part else {
                page[at..].fill(0);
                break;
            };
            if here < part.start {
                let gap = (part.start - here) as usize;
                page[at..at + gap].fill(0);
                at += gap;
                continue;
            }
            let len = (page.len() - at).min((part.end - here) as usize);
            let bytes = &mut page[at..at + len];
            match read(&*self.pages[part.image], part.offset + (here - part.start), bytes)? {
                PageData::Data => data = PageData::Data,
                PageData::Zero => bytes.fill(0),
            }
            at += len;
        }
        Ok(data)
    }
}

/// Adds what the checkpoint before has of a range, which must be all of it.
fn inherit(below: &[Part], range: Range<u64>, parts: &mut Vec<Part>) -> io::Result<()> {
    let mut at = range.start;
    for part in &below[below.partition_point(|part| part.end <= range.start)..] {
        if at >= range.end || part.start > at {
            break;
        }
        let end = part.end.min(range.end);
        parts.push(Part { start: at, end, image: part.image, offset: part.offset + (at - part.start) });
        at = end;
    }
    if at < range.end {
        return Err(io::Error::other(format!("the checkpoint before hasn't the page at {at:#x}")));
    }
    Ok(())
}

impl PageSource for CriuMemory {
    fn read(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.read_by(offset, page, |source, offset, page| source.read(offset, page))
    }

    fn read_early(&self, offset: u64, page: &mut [u8]) -> io::Result<PageData> {
        self.read_by(offset, page, |source, offset, page| source.read_early(offset, page))
    }

    fn zeros(&self, offset: u64) -> u64 {
        self.part_from(offset).map_or(u64::MAX, |part| part.start.saturating_sub(offset))
    }
}

#[cfg(test)]
mod tests {
    use super::super::CriuImages;
    use super::super::image::tests::{pagemap, record};
    use super::*;
    use crate::source::BytesSource;
    use crate::support::require;

    fn pages(bytes: &[u8]) -> Vec<u8> {
        bytes.iter().flat_map(|byte| std::iter::repeat_n(*byte, 4096)).collect()
    }

    fn images(files: Vec<(&'static str, Vec<u8>)>) -> CriuImages {
        CriuImages::with(move |name| {
            let file = files.iter().find(|(known, _)| *known == name);
            let (_, bytes) = file.ok_or(io::ErrorKind::NotFound)?;
            Ok(Arc::new(BytesSource::new(bytes.clone())))
        })
    }

    /// The byte of each page.
    fn content(memory: &CriuMemory, addresses: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![99; (addresses.end - addresses.start) as usize];
        if memory.read(addresses.start, &mut bytes).unwrap() == PageData::Zero {
            assert!(bytes.iter().all(|byte| *byte == 0));
        }
        bytes.chunks(4096).map(|page| page[0]).collect()
    }

    #[test]
    fn pages_come_from_the_checkpoints_before() {
        require!();
        let old = pagemap(3, &[record(&[(1, 0x1000), (2, 4), (4, 6)])]);
        let middle = pagemap(
            2,
            &[
                record(&[(1, 0x1000), (2, 2), (4, 1)]),
                record(&[(1, 0x3000), (2, 1), (4, 6)]),
                record(&[(1, 0x4000), (2, 1), (4, 1)]),
            ],
        );
        let new = pagemap(
            1,
            &[
                record(&[(1, 0x1000), (2, 1), (4, 6)]),
                record(&[(1, 0x2000), (2, 3), (4, 1)]),
                record(&[(1, 0x8000), (2, 1), (4, 6)]),
            ],
        );
        let images = images(vec![
            ("pagemap-5.img", new),
            ("pages-1.img", pages(&[31, 32])),
            ("parent/pagemap-5.img", middle),
            ("parent/pages-2.img", pages(&[21])),
            ("parent/parent/pagemap-5.img", old),
            ("parent/parent/pages-3.img", pages(&[11, 12, 13, 14])),
        ]);
        let memory = images.memory(5).unwrap();
        assert_eq!(content(&memory, 0..0xa000), [0, 31, 12, 21, 14, 0, 0, 0, 32, 0]);
        assert_eq!(content(&memory, 0x5000..0x7000), [0, 0]);
        assert_eq!((memory.zeros(0x5000), memory.zeros(0x9000), memory.zeros(0x2000)), (0x3000, u64::MAX, 0));
    }

    #[test]
    fn images_that_lack_pages_are_refused() {
        require!();
        let files = |pagemap, pages| vec![("pagemap-5.img", pagemap), ("pages-1.img", pages)];
        let short = pagemap(1, &[record(&[(1, 0x1000), (2, 2), (4, 6)])]);
        let error = images(files(short, pages(&[1]))).memory(5).unwrap_err().to_string();
        assert!(error.contains("pagemap-5.img") && error.contains("too short"), "{error}");
        let orphan = pagemap(1, &[record(&[(1, 0x1000), (2, 2), (4, 1)])]);
        let error = images(files(orphan, Vec::new())).memory(5).unwrap_err().to_string();
        assert!(error.starts_with("parent/pagemap-5.img: "), "{error}");
        let endless = pagemap(1, &[record(&[(1, 0x1000), (2, 2), (4, 1)])]);
        let own_parent = CriuImages::with(move |name| {
            let bytes = if name.contains("pagemap") { endless.clone() } else { Vec::new() };
            Ok(Arc::new(BytesSource::new(bytes)))
        });
        let error = own_parent.memory(5).unwrap_err().to_string();
        assert!(error.contains("parents without end"), "{error}");
    }
}
