//! What a target and its keeper tell each other.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use userfaultfd::Uffd;
use userfaultfd_examples::{receive, send};

/// Kinds of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    /// Private anonymous.
    Anonymous,
    /// A private mapping of a memfd.
    PrivateFile,
    /// A shared mapping of one.
    Shared,
    /// The same, filled by mapping what is in the file.
    Minor,
    /// Shared, of huge pages.
    Huge,
    /// The same, filled by mapping what is in the file.
    HugeMinor,
    /// Private, of huge pages.
    HugePrivate,
}

impl Memory {
    pub(crate) const ALL: [Self; 7] = [
        Self::Anonymous,
        Self::PrivateFile,
        Self::Shared,
        Self::Minor,
        Self::Huge,
        Self::HugeMinor,
        Self::HugePrivate,
    ];

    pub(crate) fn is_shared(self) -> bool {
        !matches!(self, Self::Anonymous | Self::PrivateFile | Self::HugePrivate)
    }

    pub(crate) fn is_huge(self) -> bool {
        matches!(self, Self::Huge | Self::HugeMinor | Self::HugePrivate)
    }

    pub(crate) fn is_minor(self) -> bool {
        matches!(self, Self::Minor | Self::HugeMinor)
    }
}

/// What a keeper has to know of an arena. All of it is numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spec {
    pub(crate) memory: Memory,
    pub(crate) key: u64,
    pub(crate) page_size: usize,
    pub(crate) pages: usize,
    /// How many words the source has.
    pub(crate) words: usize,
    pub(crate) source: usize,
    pub(crate) has_bad: bool,
    /// In pages.
    pub(crate) block: usize,
    pub(crate) write_protected: bool,
    /// Whether nothing ever changes, so that no page may be read twice.
    pub(crate) is_still: bool,
}

/// A part of an arena, and where it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) address: usize,
    pub(crate) first: usize,
    pub(crate) pages: usize,
    /// What mremap(2) left behind, which is zero unless it is shared.
    pub(crate) is_left_behind: bool,
}

/// What a target asks for. Arenas are numbered.
#[derive(Debug)]
pub(crate) enum Request {
    /// Serve this descriptor.
    Add { arena: usize, spec: Spec, pieces: Vec<Piece>, uffd: Uffd, file: Option<File> },
    /// Serve one more region.
    AddRegion { arena: usize, piece: Piece },
    /// Serve it no more.
    Retire { arena: usize },
    /// Let another pager serve it.
    HandOver { arena: usize, pieces: Vec<Piece> },
    /// Detach the pager, and let another serve everything.
    Detach { arenas: Vec<Vec<Piece>> },
    /// Finish the arena's regions.
    FinishRegion { arena: usize },
    /// Finish the pager.
    Finish,
    /// Remove the arena's regions.
    RemoveRegion { arena: usize },
    /// Drop the pager.
    Drop,
}

/// Words of 8 bytes.
type Words = Vec<u64>;

fn push_pieces(words: &mut Words, pieces: &[Piece]) {
    words.push(pieces.len() as u64);
    for Piece { address, first, pages, is_left_behind } in pieces {
        words.extend([*address as u64, *first as u64, *pages as u64, u64::from(*is_left_behind)]);
    }
}

fn take_pieces(words: &mut impl Iterator<Item = u64>) -> Option<Vec<Piece>> {
    let count = words.next()? as usize;
    let piece = |_| {
        let [address, first, pages] = [words.next()?, words.next()?, words.next()?].map(|word| word as usize);
        Some(Piece { address, first, pages, is_left_behind: words.next()? != 0 })
    };
    (0..count).map(piece).collect()
}

impl Spec {
    fn push(&self, words: &mut Words) {
        let numbers = [self.page_size, self.pages, self.words, self.source, self.block];
        words.extend([self.memory as u64, self.key]);
        words.extend(numbers.map(|number| number as u64));
        words.extend([self.has_bad, self.write_protected, self.is_still].map(u64::from));
    }

    fn take(words: &mut impl Iterator<Item = u64>) -> Option<Self> {
        let (memory, key) = (*Memory::ALL.get(words.next()? as usize)?, words.next()?);
        let mut number = || words.next().map(|word| word as usize);
        Some(Self {
            memory,
            key,
            page_size: number()?,
            pages: number()?,
            words: number()?,
            source: number()?,
            block: number()?,
            has_bad: number()? != 0,
            write_protected: number()? != 0,
            is_still: number()? != 0,
        })
    }
}

/// Asks, and waits until it is done.
pub(crate) fn ask(mut socket: &UnixStream, request: &Request) -> io::Result<()> {
    let mut words = Words::new();
    let (number, arena) = match request {
        Request::Add { arena, spec, pieces, .. } => {
            spec.push(&mut words);
            push_pieces(&mut words, pieces);
            (0, *arena)
        }
        Request::AddRegion { arena, piece } => {
            push_pieces(&mut words, &[*piece]);
            (1, *arena)
        }
        Request::Retire { arena } => (2, *arena),
        Request::HandOver { arena, pieces } => {
            push_pieces(&mut words, pieces);
            (3, *arena)
        }
        Request::Detach { arenas } => {
            arenas.iter().for_each(|pieces| push_pieces(&mut words, pieces));
            (4, arenas.len())
        }
        Request::FinishRegion { arena } => (5, *arena),
        Request::Finish => (6, 0),
        Request::RemoveRegion { arena } => (7, *arena),
        Request::Drop => (8, 0),
    };
    let mut all = vec![number, arena as u64, words.len() as u64];
    all.append(&mut words);
    let bytes: Vec<u8> = all.into_iter().flat_map(u64::to_ne_bytes).collect();
    socket.write_all(&bytes)?;
    if let Request::Add { uffd, file, .. } = request {
        send(socket, [u64::from(file.is_some())], uffd.as_fd())?;
        if let Some(file) = file {
            send(socket, [0], file.as_fd())?;
        }
    }
    let mut answer = [0];
    socket.read_exact(&mut answer)?;
    if answer == [1] { Ok(()) } else { Err(io::Error::other("the keeper couldn't do it")) }
}

/// Tells that it is done.
pub(crate) fn answer(mut socket: &UnixStream) -> io::Result<()> {
    socket.write_all(&[1])
}

/// What is asked for. `None` once the target has ended.
pub(crate) fn next(mut socket: &UnixStream) -> io::Result<Option<Request>> {
    let mut head = [[0; 8]; 3];
    match socket.read_exact(head.as_flattened_mut()) {
        Err(error)
            if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) =>
        {
            return Ok(None);
        }
        other => other?,
    }
    let [number, arena, len] = head.map(|word| u64::from_ne_bytes(word) as usize);
    let mut words = vec![[0; 8]; len];
    socket.read_exact(words.as_flattened_mut())?;
    let mut words = words.into_iter().map(u64::from_ne_bytes);
    let request = match number {
        0 => Spec::take(&mut words).zip(take_pieces(&mut words)).map(|(spec, pieces)| {
            let closed = || io::Error::from(io::ErrorKind::UnexpectedEof);
            let ([has_file], uffd) = receive(socket)?.ok_or_else(closed)?;
            let file = match has_file {
                0 => None,
                _ => Some(File::from(receive::<1>(socket)?.ok_or_else(closed)?.1)),
            };
            io::Result::Ok(Request::Add { arena, spec, pieces, uffd: Uffd::from(uffd), file })
        }),
        1 => take_pieces(&mut words).map(|pieces| Ok(Request::AddRegion { arena, piece: pieces[0] })),
        2 => Some(Ok(Request::Retire { arena })),
        3 => take_pieces(&mut words).map(|pieces| Ok(Request::HandOver { arena, pieces })),
        4 => {
            let arenas: Option<_> = (0..arena).map(|_| take_pieces(&mut words)).collect();
            arenas.map(|arenas| Ok(Request::Detach { arenas }))
        }
        5 => Some(Ok(Request::FinishRegion { arena })),
        6 => Some(Ok(Request::Finish)),
        7 => Some(Ok(Request::RemoveRegion { arena })),
        8 => Some(Ok(Request::Drop)),
        _ => None,
    };
    request.transpose()?.map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
