//! Snapshots: the content of memory at one moment, saved while the program goes on writing.
//!
//! [`Snapshot::begin`] protects memory against writes and returns. Then a thread reads it page by page and passes the
//! pages to a [`Sink`] on another thread. When the program writes to a page that isn't saved yet, the thread reads that
//! page first, and then the write goes on.
//!
//! - A [`SnapshotWriter`] is a sink that writes a file. A [`SnapshotReader`] reads the file: it is a
//!   [`PageSource`](crate::pager::PageSource), from which [`LazyMemory`](crate::LazyMemory) and a
//!   [`Pager`](crate::pager::Pager) restore memory page by page on first access.
//! - [`LazyMemory::snapshot`](crate::LazyMemory::snapshot) saves memory that is being restored.
//! - A [`Series`] takes one snapshot after the other of the same memory, each of the changes since the one before.
//!   [`Series::begin_in`] names and links their files, [`Chain`] finds them.
//!
//! ```
//! use userfaultfd::snapshot::{Error, SnapshotReader, SnapshotWriter};
//! use userfaultfd::{LazyMemory, Snapshot, page_size};
//!
//! let mut memory = memmap2::MmapMut::map_anon(16 * page_size())?;
//! memory[..5].copy_from_slice(b"hello");
//! let range = memory.as_ptr().addr()..memory.as_ptr().addr() + memory.len();
//!
//! let path = std::env::temp_dir().join(format!("{}.snapshot", std::process::id()));
//! let snapshot = match Snapshot::begin(range, SnapshotWriter::create(&path)?) {
//!     Ok(snapshot) => snapshot,
//!     Err(Error::Kernel(error)) => return Ok(println!("{error}")), // no write protection here
//!     Err(error) => return Err(error.into()),
//! };
//! memory[..5].copy_from_slice(b"later"); // goes on at once
//! snapshot.wait()?;
//!
//! let restored = LazyMemory::new(memory.len(), SnapshotReader::open(&path)?)?;
//! assert_eq!(&restored[..5], b"hello"); // read from the file now
//! # drop(restored);
//! # std::fs::remove_file(&path)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it promises
//!
//! - **One moment.** Most memory is protected while writers go on; then the pages that they have written meanwhile are
//!   protected while they wait ([`Progress::pause`]). No write goes on before all memory is protected, so a write is in the
//!   snapshot only if all writes before it are.
//! - **Each page once.** Each page comes to the sink exactly once, as it was at that moment.
//! - **A writer waits only for the copy of its page**, while the sink keeps up. If the sink doesn't, at most
//!   [`Options::buffer`] bytes are buffered, and writers wait.
//! - **Every end frees the memory**: after an error, a panic of the sink, [`abort`](Snapshot::abort) or a drop, protection
//!   is lifted, and all writers go on.
//! - **No wrong content.** Where the kernel shows protection (Linux 5.13), each page is checked after it was read: one that
//!   is no longer protected is [`Content::Gone`], and counted in [`Progress::gone`]. A page is delivered only if the layout
//!   was still the known one when it was read, so that a page that was moved or mapped in its place isn't mistaken for it.
//!   (On Linux 6.1 private hugetlb pages of another process that are still shared with its parent since a fork are gone,
//!   too: reading them ends their protection there.)
//!   Not covered: one thread moves pages by mremap(2) to a place that another thread's mremap(2) has just left, before that
//!   returned. The kernel may report the two changes in the other order, and a page may come with the other's content.
//!   Nor is a page of shared memory that goes more than two seconds after its removal was read, as where madvise(2) waits
//!   that long for the file: the kernel tells no more, and the next member of a [`Series`] may not have it.
//! - **A page that isn't protected when a snapshot of a [`Series`] begins counts as changed**, whatever has ended its
//!   protection: a write, a drop, a guard page, `UFFDIO_MOVE`, the merging of equal pages. The check takes some nanoseconds
//!   a page since Linux 6.7, and some hundred before.
//!
//! A snapshot, and a [`Series`], work in the process that began them. In a forked child their methods fail with
//! [`Error::OtherProcess`](crate::Error::OtherProcess), and dropping them leaves the parent's alone.
//!
//! How changes of the memory during a snapshot show:
//!
//! | | |
//! | --- | --- |
//! | it drops pages: `MADV_DONTNEED`, `MADV_FREE`, `MADV_REMOVE` | saved before that, or zeros: [`Removal`]. What is dropped at the very moment at which other memory is unmapped or moved may be gone; so may what is dropped by a call that is under way while the snapshot begins. Pages that were dropped of other than private anonymous memory are in every member of a [`Series`] that begins in the next two to four seconds: nothing tells when they go |
//! | munmap(2), another mapping in its place | what isn't saved yet is gone: the kernel tells too late. What was unmapped before a snapshot of a [`Series`] begins is gone, too, until the end of the series |
//! | mremap(2) | followed to its new place. It returns when all of the snapshot has been read, unless [`Removal::Zero`]. |
//! | mprotect(2) to `PROT_NONE` | what isn't saved yet can't be read, and is gone if that lasts |
//! | fork(2) | the child is another process; the snapshot goes on. From Linux 5.19 to 6.3 a child that writes to protected [hugetlb memory](crate::Uffd::write_protect) hangs |
//! | a write through another mapping of the same file, write(2) to the file, a write to [pinned memory](crate::dirty#pinned-memory) | isn't held up: it may be in the snapshot or not |
//! | a hole punched into the file | zeros are in the snapshot, if the page isn't saved yet; a [`Series`] doesn't notice it |
//! | guard pages, pages moved away by `UFFDIO_MOVE` | what isn't saved yet is gone |
//!
//! Memory may be private anonymous, shared (memfd, tmpfs, shared anonymous) and hugetlb memory that is readable and
//! writable. Reading empty shared memory allocates it.
//!
//! # What is safe, and why
//!
//! All of it is safe. Protection decides when a thread waits, not what it reads. The kernel reads the memory
//! (process_vm_readv(2)), never a reference of Rust, so other threads may write it meanwhile.
//!
//! A snapshot of memory that the sink, or the snapshot's own threads, write to waits for itself: leave stacks and the heap
//! out, unless the sink writes to neither.
//!
//! # The file
//!
//! There are two versions of the format. All numbers are little-endian; a block is the page size of the machine that wrote it. A
//! reader may have another one.
//!
//! | | version 1 | version 2 |
//! | --- | --- | --- |
//! | written by | [`SnapshotWriter`] | [`SnapshotWriter::chunks`] |
//! | unit of a read | a page | a chunk of 64 KiB to 2 MiB of content |
//! | compressed | no | each chunk by itself, if it becomes smaller |
//! | checksum | CRC-32 of each page | BLAKE3 of each chunk, and of the index |
//! | a fault costs | one read of the page and one of its checksum | the read of a chunk, for all pages in it |
//! | a read allocates | no | yes: not for memory whose descriptor reports forks |
//! | for | snapshots on a local disk | images that are stored, sent, read over a network |
//!
//! [`ImageCopy`] writes either of what other programs have saved, and a raw file of either.
//!
//! ## Version 1
//!
//! | bytes | |
//! | --- | --- |
//! | one block | the header, then zeros |
//! | blocks | pages with content, in the order in which they were saved; a page of zeros isn't there |
//! | | the index: regions, extents, checksums |
//! | 64 | the footer, the last bytes of the file |
//!
//! | header, at | |
//! | --- | --- |
//! | 0 | `UFFDSNAP` |
//! | 8 | u32: version, 1 |
//! | 12 | u32: the logarithm of the block size to base 2 |
//! | 16 | 16 bytes: the id of the snapshot, random |
//! | 32 | 16 bytes: the id of the one that it follows; zeros if it holds everything |
//! | 48 | u32: of version 2 the logarithm of the content of a chunk to base 2; then zeros |
//! | 60 | u32: CRC-32 of the 60 bytes before |
//!
//! | footer, at | |
//! | --- | --- |
//! | 0 | `UFFDSEND`, of version 2 `UFFDSEN2` |
//! | 8, 48 | the first and the second 8 bytes of the id |
//! | 16 | u64: where the index begins |
//! | 24, 32, 40 | u64: how many regions, extents, checksums; of version 2 how many chunks |
//! | 56 | u32: CRC-32 of the index; of version 2 zeros |
//! | 60 | u32: CRC-32 of the 60 bytes before |
//!
//! A region is three u64: the addresses where it begins and ends, and the size of its pages. The regions lie in the
//! snapshot one behind the other. An extent is three u64: its first block in the snapshot, how many blocks, and the
//! offset in the file of their content; 0 there means zeros, 1 that it couldn't be told. Extents are in order and don't
//! overlap; those of a snapshot that follows none cover all. A checksum is a u32 for each block with content, in the
//! order of the snapshot: CRC-32 (IEEE 802.3) of the block.
//!
//! ## Version 2
//!
//! The content of all blocks but those of zeros is one stream, in the order in which they were saved: first those of the
//! working set, if there is one. A chunk is a part of the stream; all but the last have the same length. Chunks lie in the file side
//! by side, as they are or compressed, and nothing lies between them.
//!
//! | bytes | |
//! | --- | --- |
//! | 64 | the header |
//! | | the chunks |
//! | 32 | BLAKE3 of all of the index that follows |
//! | 64 | the header once more, so that a reader that begins with the end needs no other read |
//! | 24 | three u64: the length of the stream; of its first part, the working set's; of the working set itself, below |
//! | | regions and extents as in version 1; the content of an extent begins in the stream at its number, less one block |
//! | 20 each | the chunks: u32, of which the low 24 bits are the bytes that it takes in the file, and the high 8 are 0 as it is, 1 an LZ4 block, 2 a zstd frame; then the first 16 bytes of the BLAKE3 of its content |
//! | | the working set, as in the file of a [`WorkingSet`](crate::pager::WorkingSet) |
//! | 64 | the footer, the last bytes of the file |
//!
//! A file without its footer was never finished, or is cut short; [`FormatError`] says so, and what else can be wrong.

mod copy;
mod error;
mod file;
mod handle;
mod image;
mod maker;
mod options;
#[cfg(all(test, feature = "tracking"))]
mod races;
mod sink;

pub use self::error::{Error, Result};
pub use self::file::chain::Chain;
pub use self::file::chunk_writer::ChunkOptions;
pub use self::file::codec::Compression;
pub use self::file::format::{FormatError, SnapshotId};
pub use self::file::reader::SnapshotReader;
pub use self::file::writer::SnapshotWriter;
pub use self::handle::{Finished, Progress, Series, Snapshot};
pub use self::image::{ImageCopy, ImageFormat, MemoryImage, changed_ranges};
pub use self::options::{Options, Removal};
pub use self::sink::{Content, Geometry, Region, Sink};
