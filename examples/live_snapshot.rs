//! A store in memory is saved while it serves writes, and restored lazily in a new process, which verifies it.
//!
//! ```sh
//! cargo run --release --example live_snapshot -- [MIB]
//! ```
//!
//! A put writes its number to a slot, then to the head of the store. So the snapshot is right if it holds, for the number
//! at its head, what all puts up to that one have written, and of later ones nothing but the first, which may have been
//! half-way.
//!
//! Linux 5.7, on architectures with write protection: x86-64, arm64, some riscv64. No rights from Linux 5.11 on.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, process, thread};

use memmap2::{MmapMut, MmapRaw};
use userfaultfd::pager::PageSource;
use userfaultfd::snapshot::{Finished, SnapshotReader, SnapshotWriter};
use userfaultfd::{LazyMemory, Snapshot, page_size};
use userfaultfd_examples::{Result, progress_bar};

/// Tells this program, executed once more, to restore and verify a file.
const VERIFY: &str = "--verify";

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    if let [flag, path] = &arguments[..] {
        if flag == VERIFY {
            return userfaultfd_examples::run(|| verify(Path::new(path)));
        }
    }
    let mib = match &arguments[..] {
        [] => Some(64),
        [mib] => mib.to_str().and_then(|mib| mib.parse::<usize>().ok()).filter(|mib| *mib > 0),
        _ => None,
    };
    let Some(bytes) = mib.and_then(|mib| mib.checked_mul(1 << 20)) else {
        eprintln!("usage: cargo run --example live_snapshot -- [MIB]");
        return ExitCode::FAILURE;
    };
    userfaultfd_examples::run(|| {
        let path = Removed(env::temp_dir().join(format!("live-{}.snapshot", process::id())));
        save(bytes, &path.0)?;
        // A new process, which has nothing but the file.
        let verified = Command::new(env::current_exe()?).arg(VERIFY).arg(&path.0).status()?;
        if verified.success() { Ok(()) } else { Err("the new process can't verify the snapshot".into()) }
    })
}

/// A file that is removed in the end.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        // It may not be there yet.
        let _removed = fs::remove_file(&self.0);
    }
}

/// The slot that a put goes to. The first word is the head of the store.
fn slot(put: u64, words: usize) -> usize {
    let mixed = put.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    1 + ((mixed >> 20) as usize) % (words - 1)
}

struct Store(MmapRaw);

impl Store {
    fn words(&self) -> usize {
        self.0.len() / 8
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.words());
        #[expect(clippy::cast_ptr_alignment, reason = "a mapping begins with a page")]
        let word = self.0.as_mut_ptr().cast::<AtomicU64>().wrapping_add(index);
        // SAFETY: aligned, inside the mapping, which lives as long as self and is accessed by atomics alone.
        unsafe { &*word }
    }

    fn put(&self, number: u64) {
        self.word(slot(number, self.words())).store(number, Ordering::SeqCst);
        self.word(0).store(number, Ordering::SeqCst);
    }
}

fn save(bytes: usize, path: &Path) -> Result<()> {
    let store = Store(MmapRaw::from(MmapMut::map_anon(bytes)?));
    let start = store.0.as_ptr().addr();
    let filled = store.words() as u64;
    (1..=filled).for_each(|number| store.put(number));

    let done = AtomicBool::new(false);
    let longest = thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            for number in filled + 1.. {
                let begin = Instant::now();
                store.put(number);
                longest = longest.max(begin.elapsed());
                if done.load(Ordering::SeqCst) {
                    break;
                }
            }
            longest
        });
        let saved = save_while_serving(&store, start..start + bytes, path);
        done.store(true, Ordering::SeqCst);
        let longest = serving.join().expect("a put doesn't panic");
        saved.map(|()| longest)
    })?;
    println!("the longest that a put took: {longest:.1?}");
    Ok(())
}

fn save_while_serving(store: &Store, range: std::ops::Range<usize>, path: &Path) -> Result<()> {
    let bytes = range.len();
    let before = store.word(0).load(Ordering::SeqCst);
    let snapshot = Snapshot::begin(range, SnapshotWriter::create(path)?)?;
    let bar = progress_bar("saving", bytes);
    while !snapshot.is_finished() {
        bar.set_position(snapshot.progress().saved);
        thread::sleep(Duration::from_millis(10));
    }
    bar.finish_and_clear();
    let Finished { sink: writer, progress, .. } = snapshot.wait()?;
    let puts = store.word(0).load(Ordering::SeqCst) - before;
    println!("saved {} MiB as {} bytes while {puts} puts were served", bytes >> 20, writer.written());
    println!("writers stood still for {:.1?}", progress.pause);
    println!(
        "{} pages were saved because they were about to be written",
        progress.on_write / page_size() as u64
    );
    Ok(())
}

fn verify(path: &Path) -> Result<()> {
    let reader = SnapshotReader::open(path)?;
    let len = usize::try_from(reader.len().expect("a snapshot has an end"))?;
    // Nothing is read yet: each page is when it is touched.
    let restored = LazyMemory::new(len, reader)?;
    let word = |index: usize| {
        let bytes = restored[8 * index..].first_chunk().expect("a word is in the memory");
        u64::from_ne_bytes(*bytes)
    };
    let words = len / 8;
    let head = word(0);
    let mut expected = vec![0; words];
    expected[0] = head;
    (1..=head).for_each(|number| expected[slot(number, words)] = number);
    // The put that was on its way.
    let next = slot(head + 1, words);
    if word(next) == head + 1 {
        expected[next] = head + 1;
    }
    let bar = progress_bar("verifying", len);
    for (index, expected) in expected.iter().enumerate() {
        if word(index) != *expected {
            return Err(format!("word {index} is {} and not {expected}", word(index)).into());
        }
        if index % (1 << 17) == 0 {
            bar.set_position(8 * index as u64);
        }
    }
    bar.finish_and_clear();
    println!("restored in another process: put {head} and all before it are there, and none behind");
    Ok(())
}
