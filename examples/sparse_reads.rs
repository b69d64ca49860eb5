//! A byte here and there of a file that may be larger than memory, as one slice of bytes.
//!
//! ```sh
//! cargo run --release --example sparse_reads -- FILE
//! ```

use std::{env, error::Error};

use userfaultfd::{LazyMemory, pager::FileSource};

fn main() -> Result<(), Box<dyn Error>> {
    // The whole file, however large it is. Nothing of it is read yet.
    let path = env::args_os().nth(1).ok_or("which file?")?;
    let memory = LazyMemory::builder(FileSource::open(path)?).build()?;
    // A byte here and there: each brings its page in, and takes memory for that alone.
    let (mut random, mut sum) = (1_u64, 0);
    for _ in 0..1000 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        sum += u64::from(memory[((random >> 20) % memory.len() as u64) as usize]);
    }
    let statistics = memory.statistics();
    let (read, not) = (statistics.present_pages, statistics.missing_pages);
    println!("sum {sum}; {read} pages are in memory, {not} aren't");
    Ok(())
}
