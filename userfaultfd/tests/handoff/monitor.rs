//! A process that plays a virtual machine monitor: it hands its memory over, and reads the pages it is told.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use userfaultfd::handoff::{
    Dialect, Listener, MemoryRegion, Message, Offer, receive_memory, send, send_message,
};
use userfaultfd::pager::{PageData, PageSource};
use userfaultfd::{FeatureFlags, Uffd, UffdBuilder};

use crate::support::child::{self, Forked};
use crate::support::mapping::Mapping;
use crate::support::memory::{Kind, Memory};
use crate::support::page;

/// Pages of a monitor's memory, in two regions: the first of them has the second half of the image.
pub(crate) const PAGES: usize = 8;
pub(crate) const HALF: usize = PAGES / 2;

/// A command to a monitor: the number of a page to read, or one of these.
const REMOVE: u8 = 0x80;
const EXIT: u8 = 0xff;
const ADD: u8 = 0xfe;
const BABBLE: u8 = 0xfd;
const FLOOD: u8 = 0xfc;

/// The byte of a page of the image.
pub(crate) fn byte(number: usize) -> u8 {
    (number % 251 + 1) as u8
}

/// The byte that a page of a monitor's memory must show.
pub(crate) fn shown(page: usize) -> u8 {
    byte((page + HALF) % PAGES)
}

/// An image of some pages.
#[derive(Clone, Debug)]
pub(crate) struct Image(pub(crate) usize);

impl PageSource for Image {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<PageData> {
        let first = offset as usize / page();
        buffer.chunks_mut(page()).enumerate().for_each(|(at, bytes)| bytes.fill(byte(first + at)));
        Ok(PageData::Data)
    }

    fn len(&self) -> Option<u64> {
        Some((self.0 * page()) as u64)
    }
}

/// A path for a socket where nothing is yet.
pub(crate) fn path() -> PathBuf {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("userfaultfd-handoff-{}-{number}", std::process::id()))
}

/// How many descriptors this process has open.
pub(crate) fn descriptors() -> usize {
    crate::support::proc::open_descriptors()
}

/// The regions of memory at an address.
pub(crate) fn regions(start: usize) -> Vec<MemoryRegion> {
    let len = HALF * page();
    // One page of the system's size is all that the tests use.
    let region = |at: usize, offset: usize| {
        let region = MemoryRegion::new(start + at, len, offset as u64);
        region.guest_address((1 << 32) + at as u64).file_offset(at as u64)
    };
    vec![region(0, len), region(len, 0)]
}

/// How a monitor does it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    pub(crate) dialect: Dialect,
    pub(crate) kind: Kind,
}

impl Style {
    pub(crate) fn new(dialect: Dialect) -> Self {
        Self { dialect, kind: Kind::Anonymous }
    }
}

/// A monitor.
pub(crate) struct Monitor {
    pub(crate) process: Forked,
    pub(crate) socket: UnixStream,
    /// The address of its memory, if it has it from the start.
    pub(crate) start: usize,
}

impl Monitor {
    /// Starts one that connects to a path. Fork all before there are threads, then let each [`go`](Self::go).
    pub(crate) fn fork(style: Style, path: PathBuf) -> Self {
        let memory = Memory::new(style.kind, PAGES);
        let start = memory.start().expose_provenance();
        let (socket, there) = UnixStream::pair().unwrap();
        let process = child::fork(|| {
            assert_eq!((&there).read(&mut [0]).unwrap(), 1);
            let stream = UnixStream::connect(path).unwrap();
            match style.dialect {
                Dialect::CodeSandbox => {
                    let (file, len) = receive_memory(&stream).unwrap();
                    assert_eq!(len, (PAGES * page()) as u64);
                    let mapping = Mapping::shared(PAGES, std::os::fd::AsFd::as_fd(&file)).unwrap();
                    let at = mapping.start.expose_provenance();
                    let uffd = hand_over(style, &stream, at, None);
                    run((&there, &stream), (&uffd, at), |page| read(&mapping, page), |_| {});
                }
                _ => {
                    let uffd = hand_over(style, &stream, start, Some(&memory));
                    let remove = |page| memory.advise(page, 1, libc::MADV_DONTNEED).unwrap();
                    run((&there, &stream), (&uffd, start), |page| memory.read(page), remove);
                }
            }
        });
        Self { process, socket, start }
    }

    /// Starts one that connects at once.
    pub(crate) fn start(style: Style, path: PathBuf) -> Self {
        let mut monitor = Self::fork(style, path);
        monitor.go();
        monitor
    }

    /// Has it connect.
    pub(crate) fn go(&mut self) {
        self.socket.write_all(&[0]).unwrap();
    }

    pub(crate) fn ask(&mut self, command: u8) {
        self.socket.write_all(&[command]).unwrap();
    }

    pub(crate) fn answer(&mut self) -> u8 {
        let mut byte = [0];
        self.socket.read_exact(&mut byte).unwrap();
        byte[0]
    }

    pub(crate) fn read(&mut self, page: usize) -> u8 {
        self.ask(page as u8);
        self.answer()
    }

    pub(crate) fn remove(&mut self, page: usize) {
        self.ask(REMOVE | page as u8);
        self.answer();
    }

    /// Has it end by itself.
    pub(crate) fn exit(mut self) {
        self.ask(EXIT);
        self.process.succeed();
    }

    /// Has it send what is no message, and waits until it has.
    pub(crate) fn babble(&mut self) {
        self.ask(BABBLE);
        self.answer();
    }

    /// Has it send messages for ever.
    pub(crate) fn flood(&mut self) {
        self.ask(FLOOD);
    }

    /// Has it say that its second region is there, too.
    pub(crate) fn add_region(&mut self) {
        self.ask(ADD);
    }
}

/// Registers memory and hands it over.
fn hand_over(style: Style, stream: &UnixStream, start: usize, memory: Option<&Memory>) -> Uffd {
    let wanted = FeatureFlags::EVENT_REMOVE;
    let uffd =
        UffdBuilder::new().close_on_exec(true).non_blocking(true).request_features(wanted).create().unwrap();
    uffd.register(std::ptr::with_exposed_provenance_mut(start), PAGES * page()).unwrap();
    let mut regions = regions(start);
    if style.dialect == Dialect::CloudHypervisor {
        // The other one is added later.
        regions.truncate(1);
    }
    let file = memory.filter(|memory| memory.kind() == Kind::Memfd).map(Memory::file);
    let mut offer = Offer::new(&uffd, regions.clone());
    if style.dialect == Dialect::CloudHypervisorBackend {
        offer = regions.iter().zip(file.into_iter().cycle()).fold(offer, |offer, (_, file)| offer.file(file));
    } else if let Some(file) = file {
        offer = offer.file(file);
    }
    send(style.dialect, stream, &offer).unwrap();
    uffd
}

/// The first byte of a page.
fn read(mapping: &Mapping, number: usize) -> u8 {
    let place = mapping.start.wrapping_byte_add(number * page()).cast::<u8>();
    // SAFETY: the page lies in the mapping, which only raw pointers lead to.
    unsafe { place.read_volatile() }
}

/// Does what it is told. A userfaultfd that the monitor keeps lets accesses wait when the handler dies.
fn run(
    (there, stream): (&UnixStream, &UnixStream),
    (_uffd, start): (&Uffd, usize),
    read: impl Fn(usize) -> u8,
    remove: impl Fn(usize),
) {
    let mut command = [0];
    while (&*there).read(&mut command).unwrap() == 1 {
        match command[0] {
            EXIT => return,
            ADD => {
                let message = Message::AddRegions(vec![regions(start).remove(1)]);
                send_message(Dialect::CloudHypervisor, stream, &message).unwrap();
                let mut confirmation = [0];
                (&*stream).read_exact(&mut confirmation).unwrap();
                command[0] = confirmation[0];
            }
            FLOOD => {
                let messages = Dialect::Nydus.encode(&Message::Stat).unwrap().repeat(1000);
                while (&*stream).write_all(&messages).is_ok() {}
            }
            BABBLE => (&*stream).write_all(b"[{}]").unwrap(),
            page if page & REMOVE != 0 => remove((page & !REMOVE).into()),
            page => command[0] = read(page.into()),
        }
        (&*there).write_all(&command).unwrap();
    }
}

/// A listener at a new path.
pub(crate) fn listener() -> (Listener, PathBuf) {
    let path = path();
    (Listener::bind(&path).unwrap(), path)
}
