//! A file as memory, read by page faults; and whether it is what the file holds.
//!
//! ```sh
//! cargo run --release --example lazy_file -- FILE
//! ```
//!
//! Any file that isn't empty, however large; its own program if none is named. Any kernel; no rights from Linux 5.11
//! on.

use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::{env, io};

use userfaultfd::LazyMemory;
use userfaultfd::pager::FileSource;
use userfaultfd_examples::{HASHED_BYTES, Result, hash_memory, progress_bar};

fn main() -> ExitCode {
    userfaultfd_examples::run(|| {
        let path = env::args_os().nth(1).map_or_else(env::current_exe, |path| Ok(PathBuf::from(path)))?;
        compare(&path)
    })
}

fn compare(path: &Path) -> Result<()> {
    let source = FileSource::open(path)?;
    let memory = LazyMemory::builder(source).on_problem(|problem| eprintln!("{problem}")).build()?;
    println!("{} bytes of memory, and nothing is read yet", memory.len());

    let by_faults = hash_memory(&memory);
    println!("by page faults: {by_faults:016x}");
    let by_reads = hash_file(File::open(path)?, memory.len())?;
    println!("by read(2):     {by_reads:016x}");
    // A thread that reads a page may go on before it is counted.
    while memory.statistics().missing_pages > 0 {
        thread::yield_now();
    }
    println!("{:#}", memory.statistics());
    if by_faults == by_reads { Ok(()) } else { Err("the memory isn't what the file holds".into()) }
}

fn hash_file(mut file: File, len: usize) -> io::Result<u64> {
    let bar = progress_bar("read(2)", len);
    let mut hasher = DefaultHasher::new();
    let mut part = vec![0; HASHED_BYTES];
    let mut rest = len;
    while rest > 0 {
        let part = &mut part[..rest.min(HASHED_BYTES)];
        file.read_exact(part)?;
        hasher.write(part);
        bar.inc(part.len() as u64);
        rest -= part.len();
    }
    Ok(hasher.finish())
}
