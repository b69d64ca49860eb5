//! The image: a file or an object of a web server, with layers on top, and a cache in front.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use userfaultfd::pager::{ChunkCache, FileSource, HttpSource, LayeredSource, PageSource};

use crate::exit::Failure;

#[derive(Debug, clap::Args)]
pub(crate) struct ImageOptions {
    /// The memory of the machines: a file, or the URL of an object on a web server that answers ranges
    #[arg(long, value_name = "FILE|URL")]
    image: String,

    /// A sparse file of the same length on top, such as a diff snapshot: what isn't a hole is its content. The last one is on
    /// top
    #[arg(long = "layer", value_name = "FILE")]
    layers: Vec<PathBuf>,

    /// Keep what was read from a URL in this directory, for all handlers of this host
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,

    /// The most bytes of the cache; K, M, G and T are powers of 1024
    #[arg(long, value_name = "BYTES", default_value = "16G", value_parser = bytes, requires = "cache")]
    cache_limit: u64,
}

/// The longest URL that is the name of an image in the cache.
const MAX_NAME_BYTES: usize = 200;

/// A number of bytes, perhaps with a letter.
fn bytes(text: &str) -> Result<u64, String> {
    let shift = match text.bytes().last() {
        Some(b'K') => 10,
        Some(b'M') => 20,
        Some(b'G') => 30,
        Some(b'T') => 40,
        _ => 0,
    };
    let number = if shift == 0 { text } else { &text[..text.len() - 1] };
    let number: u64 = number.parse().map_err(|_| "it isn't a number of bytes, such as 512M".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "it is too large".to_owned())
}

pub(super) fn open(options: &ImageOptions) -> Result<Arc<dyn PageSource>, Failure> {
    let image = &options.image;
    let is_url = image.starts_with("http://") || image.starts_with("https://");
    let base: Arc<dyn PageSource> = match (&options.cache, is_url) {
        (None, true) => Arc::new(HttpSource::open(image).map_err(Failure::of(image))?),
        (None, false) => Arc::new(FileSource::open(image).map_err(Failure::of(image))?),
        (Some(directory), true) => {
            let source = HttpSource::open(image).map_err(Failure::of(image))?;
            let Some(etag) = source.etag() else {
                let text = format!(
                    "{image}: the server gives no ETag, by which a cache could know its image; leave --cache out"
                );
                return Err(Failure::Failed(text));
            };
            let identity = format!("{image} {etag}");
            let cache = ChunkCache::open(directory, options.cache_limit);
            let cache = cache.map_err(Failure::of(directory.display()))?;
            let cached = cache.image(name(image)).identity(identity).open(source);
            Arc::new(cached.map_err(Failure::of(directory.display()))?)
        }
        (Some(_), false) => return Err(Failure::Arguments("--cache is for an image that is a URL")),
    };
    if options.layers.is_empty() {
        return Ok(base);
    }
    let mut layered = LayeredSource::new(base).map_err(Failure::of(image))?;
    for path in &options.layers {
        let pushed: io::Result<()> = File::open(path).and_then(|file| layered.push_diff(file).map(drop));
        pushed.map_err(Failure::of(path.display()))?;
    }
    Ok(Arc::new(layered))
}

/// The name of a URL's image in the cache. If it is too long, its end with a checksum of all: the identity tells apart what has
/// the same.
fn name(url: &str) -> String {
    // Those that are escaped take three bytes.
    if url.len() <= MAX_NAME_BYTES / 3 {
        return url.to_owned();
    }
    let end: Vec<char> = url.chars().rev().filter(char::is_ascii_alphanumeric).take(100).collect();
    format!("{:08x}-{}", crc32fast::hash(url.as_bytes()), end.iter().rev().collect::<String>())
}
