//! The memory in a migration file of QEMU with the capability `mapped-ram`.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::pieces::{Origin, Pieces};
use super::{FileSource, PageSource};

/// The memory of a VM in a file that QEMU (9.0 and later) wrote with `migrate file:PATH` and the capability
/// `mapped-ram`.
///
/// The source has all blocks of RAM one behind the other, as they lie in the file; [`blocks`](Self::blocks) tells
/// where each is. Pages that aren't in the file are zero.
///
/// ```no_run
/// use userfaultfd::LazyMemory;
/// use userfaultfd::pager::MappedRamSource;
///
/// let source = MappedRamSource::open("vm.migration")?;
/// let ram = source.block("pc.ram").ok_or("no block of this name")?.clone();
/// println!("{} bytes, {} of them in the file", ram.len, ram.present);
/// let memory = LazyMemory::builder(source).build()?;
/// let guest = &memory[ram.offset as usize..][..ram.len as usize];
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// The places of all pages are read at creation. A read of a page takes one search, allocates nothing and takes no lock. What is said of
/// the file of a [`FileSource`] holds here, but for holes: which pages are there is told by the file's own bitmap.
///
/// # The format
///
/// After the name and the length of a block come 28 bytes, big-endian: u32 version, 1; u64 page size; u64 offset of a
/// bitmap; u64 offset of the pages, a multiple of 1 MiB. Page *i* lies at its place behind the latter, and is there if bit *i*
/// of the bitmap is set, in words of the machine that wrote it: this machine's order of bytes is taken for granted. The
/// section of RAM is looked for in the first 64 KiB of the file, and must be the first with such a name.
#[derive(Clone, Debug)]
pub struct MappedRamSource {
    pieces: Pieces,
    blocks: Vec<RamBlock>,
}

/// A block of RAM in a [`MappedRamSource`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RamBlock {
    /// QEMU's name of it: `pc.ram`, `mach-virt.ram`, `pc.bios`, that of a memory backend.
    pub name: String,
    /// Where it begins in the source, in bytes.
    pub offset: u64,
    /// Its length, in bytes.
    pub len: u64,
    /// Bytes of a page of the guest: what the file has all of, or nothing.
    pub page_size: u64,
    /// Bytes that are in the file. The others are zero.
    pub present: u64,
}

/// What a file begins with: a magic number, and the version of the format.
const MAGIC: [u8; 8] = *b"QEVM\0\0\0\x03";

/// Bytes from the start of the file within which the section of RAM begins.
const SEARCHED: usize = 64 << 10;

/// What the first part of a section begins with; its number follows.
const SECTION_START: u8 = 1;

/// The name of the section, its instance, and its version.
const RAM: [u8; 12] = *b"\x03ram\0\0\0\0\0\0\0\x04";

/// In the low bits of the first number of the section: the others are the length of all blocks.
const MEM_SIZE: u64 = 4;

/// Less than a page of any guest.
const FLAGS: u64 = 0x3ff;

/// Bytes of the header before a block's bitmap, its version, and what the offset of its pages is a multiple of.
const HEADER_BYTES: u64 = 28;
const HEADER_VERSION: u32 = 1;
const ALIGNMENT: u64 = 1 << 20;

/// Bytes of a bitmap that are read at once.
const BITMAP_BYTES: usize = 32 << 10;

fn damaged(text: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, text)
}

/// What is read of a file, from an offset on.
struct Reader<'a> {
    file: &'a File,
    len: u64,
    at: u64,
}

impl Reader<'_> {
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, self.at).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => cut_short(),
            _ => error,
        })?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u64(&mut self) -> io::Result<u64> {
        self.bytes().map(u64::from_be_bytes)
    }
}

fn cut_short() -> io::Error {
    damaged("the migration file is cut short".into())
}

/// The 28 bytes.
struct Header {
    page_size: u64,
    bitmap: u64,
    pages: u64,
}

impl MappedRamSource {
    /// Opens a file.
    ///
    /// # Errors
    ///
    /// Those of open(2), and those of [`new`](Self::new).
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::new(File::open(path)?)
    }

    /// Reads where the pages of an open file lie.
    ///
    /// # Errors
    ///
    /// Those of [`FileSource::new`] and pread(2). Of the kind [`InvalidData`](ErrorKind::InvalidData): the file is no
    /// migration of QEMU, was written without `mapped-ram`, is of another version, is cut short or contradicts itself. The
    /// text says which.
    pub fn new(file: File) -> io::Result<Self> {
        let mut source = Self { pieces: Pieces::default(), blocks: Vec::new() };
        let pages = FileSource::new(file.try_clone()?)?.sparse(false);
        let len = pages.len().unwrap_or_default();
        let pages = source.pieces.add(pages);
        let mut reader = Reader { file: &file, len, at: 0 };
        let total = find_ram(&mut reader)?;
        while source.pieces.end() < total {
            source.read_block(&mut reader, pages)?;
        }
        if source.pieces.end() == total {
            Ok(source)
        } else {
            let len = source.pieces.end();
            Err(damaged(format!("the blocks of RAM have {len} bytes, and {total} together")))
        }
    }

    /// Returns the blocks, in the order in which they lie in the source.
    #[must_use]
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// Returns the block with a name, or `None` if there is none.
    #[must_use]
    pub fn block(&self, name: &str) -> Option<&RamBlock> {
        self.blocks.iter().find(|block| block.name == name)
    }

    fn read_block(&mut self, reader: &mut Reader<'_>, pages: Origin) -> io::Result<()> {
        let [name_len] = reader.bytes()?;
        let mut name = vec![0; name_len.into()];
        reader.fill(&mut name)?;
        let name = String::from_utf8_lossy(&name).into_owned();
        let len = reader.u64()?;
        let header = read_header(reader, &name)?;
        let wrong = |what: &str| damaged(format!("the block {name} of the migration file: {what}"));
        let Header { page_size, bitmap, pages: start } = header;
        if !page_size.is_power_of_two() || len == 0 || len % page_size != 0 {
            return Err(wrong(&format!("{len} bytes in pages of {page_size} bytes")));
        }
        let count = len / page_size;
        let words = count.div_ceil(usize::BITS.into()) * size_of::<usize>() as u64;
        let end = start.checked_add(len);
        let Some(end) = end.filter(|_| start % ALIGNMENT == 0 && start >= bitmap.saturating_add(words))
        else {
            return Err(wrong(&format!("its pages can't be at {start}")));
        };
        let (offset, file_len, mut present) = (self.pieces.end(), reader.len, 0);
        reader.at = bitmap;
        for_each_run(reader, count, |run, is_present| {
            let (len, from) = ((run.end - run.start) * page_size, start + run.start * page_size);
            if !is_present {
                return self.pieces.push(Origin::ZEROS, 0, len);
            }
            if from + len > file_len {
                return Err(cut_short());
            }
            present += len;
            self.pieces.push(pages, from, len)
        })?;
        reader.at = end;
        self.blocks.push(RamBlock { name, offset, len, page_size, present });
        Ok(())
    }
}

/// Finds the section of RAM, and returns the length of all blocks.
fn find_ram(reader: &mut Reader<'_>) -> io::Result<u64> {
    let mut start = vec![0; usize::try_from(reader.len).map_or(SEARCHED, |len| len.min(SEARCHED))];
    reader.fill(&mut start)?;
    if !start.starts_with(&MAGIC) {
        return Err(damaged("the file is no migration of QEMU, or of another version".into()));
    }
    let is_ram = |window: &[u8]| window[0] == SECTION_START && window[5..] == RAM;
    let Some(at) = start.windows(5 + RAM.len()).position(is_ram) else {
        return Err(damaged("the migration file has no section of RAM".into()));
    };
    reader.at = (at + 5 + RAM.len()) as u64;
    let total = reader.u64()?;
    match total & FLAGS {
        MEM_SIZE => Ok(total - MEM_SIZE),
        _ => Err(damaged("the section of RAM doesn't begin with the length of the memory".into())),
    }
}

/// The header of a block. Up to two numbers may stand before it, by other capabilities: the size of huge pages, an address.
/// It names itself: its bitmap follows.
fn read_header(reader: &mut Reader<'_>, name: &str) -> io::Result<Header> {
    let from = reader.at;
    for numbers in 0..3 {
        reader.at = from + numbers * 8;
        let version = reader.bytes().map(u32::from_be_bytes)?;
        let header = Header { page_size: reader.u64()?, bitmap: reader.u64()?, pages: reader.u64()? };
        if header.bitmap != from + numbers * 8 + HEADER_BYTES {
            continue;
        }
        if version != HEADER_VERSION {
            let known = HEADER_VERSION;
            return Err(damaged(format!(
                "mapped-ram of version {version}, which isn't known here; {known} is"
            )));
        }
        return Ok(header);
    }
    Err(damaged(format!("the block {name} of the migration file was written without mapped-ram")))
}

/// Reads a bitmap of `count` pages. Calls for each run of pages that are there, or aren't.
fn for_each_run(
    reader: &mut Reader<'_>,
    count: u64,
    mut call: impl FnMut(Range<u64>, bool) -> io::Result<()>,
) -> io::Result<()> {
    const WORD: usize = size_of::<usize>();
    let (mut page, mut start, mut is_present) = (0, 0, false);
    let mut buffer = [0; BITMAP_BYTES];
    while page < count {
        let words = usize::try_from((count - page).div_ceil(usize::BITS.into())).unwrap_or(usize::MAX);
        let bytes = &mut buffer[..words.min(BITMAP_BYTES / WORD) * WORD];
        reader.fill(bytes)?;
        for word in bytes.chunks_exact(WORD) {
            let word = usize::from_ne_bytes(*word.first_chunk().expect("a whole word"));
            let bits = (count - page).min(usize::BITS.into()) as u32;
            for bit in 0..bits {
                let here = word >> bit & 1 == 1;
                if here != is_present {
                    let at = page + u64::from(bit);
                    if start < at {
                        call(start..at, is_present)?;
                    }
                    (start, is_present) = (at, here);
                }
            }
            if bits < usize::BITS && word >> bits != 0 {
                return Err(damaged(
                    "a bitmap of the migration file has pages beyond the end of its block".into(),
                ));
            }
            page += u64::from(bits);
        }
    }
    call(start..count, is_present)
}

impl PageSource for MappedRamSource {
    super::read_through!(self => self.pieces);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::model::{Random, byte, check, check_all};
    use crate::support::mapping::memfd_of_bytes;
    use crate::support::require;

    /// A block to write.
    struct Block {
        name: &'static str,
        page: u64,
        /// Which pages are in the file.
        present: Vec<bool>,
        /// Numbers between its length and its header.
        more: Vec<u64>,
    }

    impl Block {
        fn new(name: &'static str, page: u64, present: Vec<bool>) -> Self {
            Self { name, page, present, more: Vec::new() }
        }

        fn len(&self) -> u64 {
            self.page * self.present.len() as u64
        }
    }

    /// Writes a file as QEMU does, from the description of the format alone. Returns what memory it holds, too.
    fn write(blocks: &[Block]) -> (File, Vec<u8>) {
        let file = File::from(memfd_of_bytes(0, 0));
        let mut at = 0;
        let put = |at: &mut u64, bytes: &[u8]| {
            file.write_all_at(bytes, *at).unwrap();
            *at += bytes.len() as u64;
        };
        put(&mut at, b"QEVM");
        put(&mut at, &3u32.to_be_bytes());
        // The configuration: the name of the machine, and something of the same name as the section.
        put(&mut at, &[7, 0, 0, 0, 0xb]);
        put(&mut at, b"\x03ram-q35-9.0");
        put(&mut at, &[1, 0, 0, 0, 2]);
        put(&mut at, b"\x03ram");
        put(&mut at, &[0u32.to_be_bytes(), 4u32.to_be_bytes()].concat());
        let total: u64 = blocks.iter().map(Block::len).sum();
        put(&mut at, &(total | 4).to_be_bytes());
        let mut memory = Vec::new();
        for (number, block) in blocks.iter().enumerate() {
            put(&mut at, &[block.name.len() as u8]);
            put(&mut at, block.name.as_bytes());
            put(&mut at, &block.len().to_be_bytes());
            block.more.iter().for_each(|number| put(&mut at, &number.to_be_bytes()));
            let mut words = vec![0usize; block.present.len().div_ceil(usize::BITS as usize)];
            for (page, _) in block.present.iter().enumerate().filter(|(_, present)| **present) {
                words[page / usize::BITS as usize] |= 1 << (page % usize::BITS as usize);
            }
            let bitmap = at + 28;
            let pages = (bitmap + 8 * words.len() as u64).next_multiple_of(1 << 20);
            put(&mut at, &1u32.to_be_bytes());
            [block.page, bitmap, pages].into_iter().for_each(|number| put(&mut at, &number.to_be_bytes()));
            words.iter().for_each(|word| put(&mut at, &word.to_ne_bytes()));
            for (page, present) in block.present.iter().enumerate() {
                let first = page as u64 * block.page;
                let bytes: Vec<u8> =
                    (first..first + block.page).map(|at| byte(number + 1, at as usize)).collect();
                // A page that isn't there may have old bytes.
                file.write_all_at(&bytes, pages + first).unwrap();
                memory.extend(if *present { bytes } else { vec![0; bytes.len()] });
            }
            at = pages + block.len();
        }
        // The end of the section, and what devices say.
        put(&mut at, &0x10u64.to_be_bytes());
        put(&mut at, &[0xee; 1000]);
        (file, memory)
    }

    #[test]
    fn random_files_show_their_memory() {
        require!();
        for seed in 0..20 {
            let mut random = Random::new(seed);
            let names = ["pc.ram", "pc.bios", "", "0000:00:02.0/vga.vram"];
            let blocks: Vec<Block> = (0..=random.below(3))
                .map(|block| {
                    let page = 1024 << random.below(3);
                    let count = [1, 63, 64, 65, 130][random.below(5)];
                    let run = 1 + random.below(20);
                    let present = (0..count).map(|page| page / run % 2 == seed as usize % 2).collect();
                    let mut block = Block::new(names[block], page, present);
                    // The size of huge pages, and an address, each by a capability.
                    block.more = [vec![], vec![2 << 20], vec![2 << 20, 1 << 32]][random.below(3)].clone();
                    block
                })
                .collect();
            let (file, memory) = write(&blocks);
            let source = MappedRamSource::new(file).unwrap();
            println!("seed {seed}: {:?}", source.blocks());
            let mut offset = 0;
            for (block, found) in blocks.iter().zip(source.blocks()) {
                let present = block.present.iter().filter(|present| **present).count() as u64 * block.page;
                let expected = RamBlock {
                    name: block.name.into(),
                    offset,
                    len: block.len(),
                    page_size: block.page,
                    present,
                };
                assert_eq!(*found, expected);
                assert_eq!(source.block(block.name), Some(found));
                offset += block.len();
            }
            assert_eq!((source.blocks().len(), source.len()), (blocks.len(), Some(offset)));
            assert_eq!(source.block("another"), None);
            check_all(&source, &memory, &mut random, 4096);
        }
    }

    #[test]
    fn pages_that_are_not_in_the_file_are_known_zeros() {
        require!();
        let present = [vec![false; 100], vec![true; 3], vec![false; 5000]].concat();
        let (file, memory) = write(&[Block::new("pc.ram", 4096, present)]);
        let source = MappedRamSource::new(file).unwrap();
        assert_eq!(
            (source.zeros(0), source.zeros(100 << 12), source.zeros(103 << 12)),
            (100 << 12, 0, u64::MAX)
        );
        check(&source, &memory, 99 << 12..104 << 12);
    }

    /// Each byte of the head changed in turn: an error, or the same blocks, but nothing else and no panic.
    #[test]
    fn damaged_heads_are_errors_by_name() {
        require!();
        let blocks =
            || [Block::new("pc.ram", 4096, vec![true; 70]), Block::new("pc.bios", 4096, vec![true; 2])];
        let (file, _) = write(&blocks());
        let mut texts = std::collections::BTreeSet::new();
        // Up to the end of the first bitmap.
        for at in 0..93 + 16 {
            for flip in [1, 0x80] {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ flip], at).unwrap();
                match MappedRamSource::new(file.try_clone().unwrap()) {
                    Ok(source) => assert_eq!(source.len(), Some(72 << 12), "{at}"),
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::InvalidData, "{at}: {error}");
                        texts.insert(error.to_string().replace(|c: char| c.is_ascii_digit(), ""));
                    }
                }
                file.write_all_at(&byte, at).unwrap();
            }
        }
        for text in [
            "the file is no migration of QEMU, or of another version",
            "the migration file has no section of RAM",
            "the section of RAM doesn't begin with the length of the memory",
            "the migration file is cut short",
            "mapped-ram of version , which isn't known here;  is",
            "the block pc.ram of the migration file was written without mapped-ram",
            "the block pc.ram of the migration file:  bytes in pages of  bytes",
            "the block pc.ram of the migration file: its pages can't be at ",
            "a bitmap of the migration file has pages beyond the end of its block",
        ] {
            assert!(texts.contains(text), "{text} of {texts:#?}");
        }
    }

    #[test]
    fn files_that_are_cut_short_are_refused() {
        require!();
        for len in [0, 4, 8, 30, 70, 90, 100, (1 << 20) + 4095] {
            let (file, _) = write(&[Block::new("pc.ram", 4096, vec![true])]);
            file.set_len(len).unwrap();
            let error = MappedRamSource::new(file).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidData, "{len}: {error}");
        }
        // What isn't there need not be in the file.
        let (file, _) = write(&[Block::new("pc.ram", 4096, vec![true, false])]);
        file.set_len((1 << 20) + 4096).unwrap();
        assert_eq!(MappedRamSource::new(file.try_clone().unwrap()).unwrap().len(), Some(8192));
        // It became shorter later.
        let source = MappedRamSource::new(file.try_clone().unwrap()).unwrap();
        file.set_len(1 << 20).unwrap();
        let error = source.read(0, &mut [0; 4096]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
        assert_eq!(MappedRamSource::open("/nowhere").unwrap_err().kind(), ErrorKind::NotFound);
    }
}
