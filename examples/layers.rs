//! Two clones of a VM's memory, from a base image and what has changed since: a sparse diff, a fork of it, and a few
//! bytes that each clone has for itself. No layer is copied together with another.
//!
//! ```sh
//! cargo run --release --example layers
//! ```
//!
//! Any kernel; no rights from Linux 5.11 on.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;
use std::{env, process};

use userfaultfd::pager::{FileSource, LayeredSource, OverlaySource};
use userfaultfd::{LazyMemory, page_size};
use userfaultfd_examples::Result;

const PAGES: usize = 1024;

/// Where the VM looks for the number of its generation: random numbers are made anew when it changes.
const GENERATION: usize = 77_777;

fn main() -> ExitCode {
    userfaultfd_examples::run(|| {
        let directory = env::temp_dir().join(format!("layers-{}", process::id()));
        fs::create_dir(&directory)?;
        let done = clones(&directory);
        fs::remove_dir_all(&directory)?;
        done
    })
}

fn clones(directory: &Path) -> Result<()> {
    // The memory as it must be, which each layer is written to as well.
    let mut expected: Vec<u8> = (0..PAGES).flat_map(|page| vec![page as u8 | 1; page_size()]).collect();
    fs::write(directory.join("base"), &expected)?;
    println!("base:    {PAGES} pages");

    // As Firecracker writes it: as long as the memory, with holes where nothing has changed. Zeros are a change, too.
    let diff = create(&directory.join("diff"))?;
    for page in (3..PAGES).step_by(10) {
        write_page(&diff, &mut expected, page, if page % 20 == 3 { 0 } else { 200 })?;
    }
    let extents = LayeredSource::extents_of(&diff)?;
    println!("diff:    {} pages, some of zeros, in a sparse file", pages_of(&extents));

    // A fork of that. It may be copied to where holes are lost, since a list of its extents goes along.
    let fork = create(&directory.join("fork"))?;
    for page in (3..PAGES).step_by(20) {
        write_page(&fork, &mut expected, page, 100)?;
    }
    let extents = LayeredSource::extents_of(&fork)?;
    println!("fork:    {} pages by their extents", pages_of(&extents));
    let copied = directory.join("copied");
    fs::write(&copied, fs::read(directory.join("fork"))?)?;

    let mut memory = LayeredSource::new(FileSource::open(directory.join("base"))?)?;
    memory.push_diff(diff)?.push_extents(FileSource::open(copied)?, extents)?;

    for clone in 0..2_u64 {
        let generation = (0x1234_5678 + clone).to_ne_bytes();
        let mut source = OverlaySource::new(memory.clone());
        source.patch(GENERATION as u64, generation)?;
        let memory = LazyMemory::builder(source).build()?;

        expected[GENERATION..GENERATION + generation.len()].copy_from_slice(&generation);
        if memory[..] != expected[..] {
            return Err(format!("clone {clone} has other memory").into());
        }
        println!("clone {clone}: {PAGES} pages are right");
    }
    Ok(())
}

fn create(path: &Path) -> Result<File> {
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    file.set_len((PAGES * page_size()) as u64)?;
    Ok(file)
}

fn write_page(layer: &File, expected: &mut [u8], page: usize, byte: u8) -> Result<()> {
    let bytes = &mut expected[page * page_size()..][..page_size()];
    bytes.fill(byte);
    layer.write_all_at(bytes, (page * page_size()) as u64)?;
    Ok(())
}

fn pages_of(extents: &[std::ops::Range<u64>]) -> usize {
    extents.iter().map(|extent| (extent.end - extent.start) as usize / page_size()).sum()
}
