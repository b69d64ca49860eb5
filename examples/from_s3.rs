//! Memory that is written to an object of S3 and restored from there as it is touched; and what happens when the object
//! changes meanwhile.
//!
//! ```sh
//! AWS_ENDPOINT=http://127.0.0.1:5000 AWS_ALLOW_HTTP=true AWS_ACCESS_KEY_ID=any AWS_SECRET_ACCESS_KEY=any \
//!     cargo run --release --example from_s3 --features object-store -- BUCKET
//! ```
//!
//! The bucket must be there, and gets an object `userfaultfd/image`. Any kernel; no rights from Linux 5.11 on.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;
use std::{env, io};

use indicatif::{ProgressBar, ProgressStyle};
use object_store::aws::AmazonS3Builder;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, RetryConfig};
use userfaultfd::LazyMemory;
use userfaultfd::pager::{ObjectSource, PageSource, RemoteError};
use userfaultfd_examples::Result;

/// Bytes of the image: no whole number of pages.
const LEN: usize = 8_000_003;

fn main() -> ExitCode {
    userfaultfd_examples::run(|| {
        let bucket = env::args().nth(1).ok_or("usage: from_s3 BUCKET")?;
        restore(&bucket)
    })
}

/// An image, by which each byte is known.
fn image(seed: u64) -> Vec<u8> {
    (0..LEN as u64).map(|at| ((at / 5 + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

fn restore(bucket: &str) -> Result<()> {
    rustls::crypto::ring::default_provider().install_default().map_err(|_| "TLS has a provider already")?;
    // The source's own patience is made for faults.
    let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let store = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(retry).build()?;
    let (store, path) = (Arc::new(store), Path::from("userfaultfd/image"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(store.put(&path, image(0).into()))?;
    println!("written:  {LEN} bytes");

    let of_source: Arc<dyn ObjectStore> = Arc::<object_store::aws::AmazonS3>::clone(&store);
    let source = Arc::new(ObjectSource::open(of_source, path.clone())?);
    println!("version:  {}", source.etag().unwrap_or("unnamed"));
    let memory =
        LazyMemory::builder(Arc::clone(&source)).on_problem(|problem| eprintln!("{problem}")).build()?;
    let (start, expected) = (Instant::now(), image(0));
    let bar = ProgressBar::new(LEN as u64).with_style(ProgressStyle::with_template("{bar:40} {bytes}")?);
    for (at, chunk) in expected.chunks(1 << 20).enumerate() {
        let here = &memory[at << 20..(at << 20) + chunk.len()];
        if here != chunk {
            return Err(format!("the memory isn't what was written, within MiB {at}").into());
        }
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    let statistics = source.statistics();
    println!("restored: in {:.1?}, by {} requests", start.elapsed(), statistics.requests);

    // Another program writes another image there. What isn't read yet must not be mixed with it.
    runtime.block_on(store.put(&path, image(1).into()))?;
    let error = source.read(0, &mut [0; 16]).err();
    let error = error.as_ref().and_then(io::Error::get_ref).and_then(|error| error.downcast_ref());
    match error {
        Some(RemoteError::Changed { .. }) => println!("changed:  refused"),
        other => return Err(format!("a changed object was read: {other:?}").into()),
    }
    runtime.block_on(store.delete(&path))?;
    Ok(())
}
