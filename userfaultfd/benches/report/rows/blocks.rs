//! What each operation of the kernel does in a second, by how much it is given at a time.

use std::time::Duration;

use memmap2::{Advice, MmapMut, MmapOptions, UncheckedAdvice};
use userfaultfd::{ContinueMode, FeatureFlags, MoveMode, RegisterMode, Support, Uffd, UffdBuilder};

use crate::contenders::cpus::{self, ALLOWED};
use crate::contenders::{memory, timed};
use crate::measure::{Round, Samples};
use crate::memfd::memfd;
use crate::options::Options;
use crate::picture::block;
use crate::table::{Section, Unit};

/// Memory of each contender.
const LEN: usize = 16 << 20;

const SIZES: [usize; 6] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20];

/// Makes what does one operation on all of its memory, in blocks of a size.
type Make = fn(usize) -> Round;

/// A name, what it needs, and how it is made.
const OPERATIONS: &[(&str, FeatureFlags, Make)] = &[
    ("COPY", FeatureFlags::empty(), copy),
    ("ZEROPAGE", FeatureFlags::empty(), zeropage),
    ("CONTINUE", FeatureFlags::MINOR_SHMEM, continue_),
    ("MOVE", FeatureFlags::MOVE, move_),
    ("POISON", FeatureFlags::POISON, poison),
    ("WRITEPROTECT", FeatureFlags::PAGEFAULT_FLAG_WP, write_protect),
    ("kernel, populate", FeatureFlags::empty(), populate),
    ("memcpy", FeatureFlags::empty(), memcpy),
];

pub(crate) fn run(options: &Options, mut section: Section) -> Section {
    let features = match Support::probe() {
        Ok(support) => support.features(),
        Err(error) => {
            section.notes.push(format!("Not measured: {error}."));
            return section;
        }
    };
    let page = userfaultfd::page_size();
    let sizes: Vec<usize> = SIZES.into_iter().filter(|size| size % page == 0).collect();
    let setup = || {
        cpus::stay_on(&ALLOWED[..1]);
        let all = OPERATIONS.iter().flat_map(|(_, needs, make)| {
            sizes.iter().map(|size| features.contains(*needs).then(|| make(*size)))
        });
        all.collect()
    };
    let samples = Samples::take(options.time, 6, setup);
    cpus::stay_on(&ALLOWED);
    section
        .matrix
        .push(std::iter::once(String::new()).chain(sizes.iter().map(|size| block(*size))).collect());
    for (at, (name, ..)) in OPERATIONS.iter().enumerate() {
        let of = |size: usize| samples.of(at * sizes.len() + size);
        let cells = (0..sizes.len())
            .map(|size| of(size).map_or("–".to_owned(), |summary| Unit::Bytes.format(summary.median)));
        section.matrix.push(std::iter::once((*name).to_owned()).chain(cells).collect());
        let points: Vec<_> =
            (0..sizes.len()).filter_map(|size| Some((sizes[size], of(size)?.median))).collect();
        if !points.is_empty() {
            section.curves.push(((*name).to_owned(), points));
        }
    }
    section.notes.push(
        "Memory is private and anonymous, that of CONTINUE a memfd's. `kernel, populate` is MADV_POPULATE_WRITE, \
         `memcpy` goes to pages that are there."
            .to_owned(),
    );
    section
}

/// A round over all of a memory, and what is done after it, which isn't timed.
fn round(size: usize, mut operate: impl FnMut(usize) + 'static, mut undo: impl FnMut() + 'static) -> Round {
    Box::new(move || {
        let time: Duration = timed(|| (0..LEN).step_by(size).for_each(&mut operate));
        undo();
        LEN as f64 / time.as_secs_f64()
    })
}

fn registered(mut memory: MmapMut, modes: RegisterMode) -> (Uffd, MmapMut) {
    let uffd = UffdBuilder::new().close_on_exec(true).non_blocking(true).create().expect("a userfaultfd");
    uffd.register_with_mode(memory.as_mut_ptr().cast(), memory.len(), modes).expect("a registered range");
    (uffd, memory)
}

/// Memory whose pages are all there.
fn present() -> MmapMut {
    let mut memory = memory(LEN);
    memory.fill(42);
    memory
}

/// Makes all pages missing.
fn empty(memory: &MmapMut) {
    // SAFETY: nothing refers to the content, and any other is as good.
    unsafe { memory.unchecked_advise(UncheckedAdvice::DontNeed) }.expect("dropped pages");
}

fn copy(size: usize) -> Round {
    let (uffd, memory) = registered(memory(LEN), RegisterMode::MISSING);
    let (content, start) = (present(), memory.as_ptr().cast_mut());
    let operate = move |at: usize| {
        let (from, to) = (content[at..].as_ptr().cast(), start.wrapping_add(at).cast());
        // SAFETY: the content lives on, and nothing refers to the memory.
        assert_eq!(unsafe { uffd.copy(from, to, size, true) }.expect("a copy"), size);
    };
    round(size, operate, move || empty(&memory))
}

fn zeropage(size: usize) -> Round {
    let (uffd, memory) = registered(memory(LEN), RegisterMode::MISSING);
    let start = memory.as_ptr().cast_mut();
    let operate = move |at: usize| {
        // SAFETY: nothing refers to the memory.
        let done = unsafe { uffd.zeropage(start.wrapping_add(at).cast(), size, true) };
        assert_eq!(done.expect("zero pages"), size);
    };
    round(size, operate, move || empty(&memory))
}

fn poison(size: usize) -> Round {
    let (uffd, memory) = registered(memory(LEN), RegisterMode::MISSING);
    let start = memory.as_ptr().cast_mut();
    let operate = move |at: usize| {
        // SAFETY: nothing refers to the memory.
        let done = unsafe { uffd.poison(start.wrapping_add(at).cast(), size, true) };
        assert_eq!(done.expect("poison"), size);
    };
    round(size, operate, move || empty(&memory))
}

fn continue_(size: usize) -> Round {
    let file = memfd();
    file.set_len(LEN as u64).expect("a memfd");
    let map = || {
        // SAFETY: nobody else knows the file, and its length stays.
        unsafe { MmapOptions::new().map_mut(&file) }.expect("a mapping")
    };
    map().fill(42);
    let (uffd, memory) = registered(map(), RegisterMode::MINOR);
    let start = memory.as_ptr().cast_mut();
    let operate = move |at: usize| {
        let mapped = uffd.continue_with(start.wrapping_add(at).cast(), size, ContinueMode::empty());
        assert_eq!(mapped.expect("mapped pages"), size as u64);
    };
    // The pages stay in the cache.
    round(size, operate, move || empty(&memory))
}

fn move_(size: usize) -> Round {
    let (uffd, memory) = registered(memory(LEN), RegisterMode::MISSING);
    let content = present();
    let (from, to) = (content.as_ptr().cast_mut(), memory.as_ptr().cast_mut());
    let operate = move |at: usize| {
        let (from, to) = (from.wrapping_add(at).cast(), to.wrapping_add(at).cast());
        // SAFETY: nothing refers to either memory.
        let moved = unsafe { uffd.move_pages(from, to, size, MoveMode::empty()) };
        assert_eq!(moved.expect("moved pages"), size);
    };
    let mut content = content;
    round(size, operate, move || {
        empty(&memory);
        content.fill(42);
    })
}

fn write_protect(size: usize) -> Round {
    let (uffd, memory) = registered(present(), RegisterMode::WRITE_PROTECT);
    let uffd = std::rc::Rc::new(uffd);
    let (protecting, start) = (std::rc::Rc::clone(&uffd), memory.as_ptr().cast_mut());
    let operate = move |at: usize| {
        protecting.write_protect(start.wrapping_add(at).cast(), size).expect("protected pages");
    };
    round(size, operate, move || {
        let (start, len) = (memory.as_ptr().cast_mut(), memory.len());
        uffd.remove_write_protection(start.cast(), len, true).expect("pages without protection");
    })
}

fn populate(size: usize) -> Round {
    let memory = std::rc::Rc::new(memory(LEN));
    let populated = std::rc::Rc::clone(&memory);
    let operate = move |at: usize| {
        populated.advise_range(Advice::PopulateWrite, at, size).expect("populated pages");
    };
    round(size, operate, move || empty(&memory))
}

fn memcpy(size: usize) -> Round {
    let (content, mut memory) = (present(), present());
    let operate = move |at: usize| {
        memory[at..][..size].copy_from_slice(&content[at..][..size]);
        std::hint::black_box(&memory);
    };
    round(size, operate, || ())
}
