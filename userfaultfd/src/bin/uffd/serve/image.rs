//! The image: a file or an object of a web server, with layers on top, and a cache in front.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use userfaultfd::pager::{ChunkCache, FileSource, HttpSource, LayeredSource, PageSource};
use userfaultfd::snapshot::{ImageFormat, MemoryImage};

use crate::exit::Failure;
use crate::image::{bytes, is_url};

#[derive(Debug, clap::Args)]
pub(crate) struct ImageOptions {
    /// The memory of the machines: a file, the folder of a snapshot of Cloud Hypervisor, or the URL of an object on a web server
    /// that supports range requests. Snapshot files and those of QEMU's mapped-ram are recognised
    #[arg(long, value_name = "FILE|URL")]
    image: String,

    /// A sparse file of the same length on top, such as a diff snapshot: what isn't a hole is its content. The last one is on
    /// top
    #[arg(long = "layer", value_name = "FILE")]
    layers: Vec<PathBuf>,

    /// Keep what was read from a URL in this directory, for all handlers of this host
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,

    /// Maximum size of the cache, in bytes; K, M, G and T are powers of 1024
    #[arg(long, value_name = "BYTES", default_value = "16G", value_parser = bytes, requires = "cache")]
    cache_limit: u64,
}

impl ImageOptions {
    /// What tells the image from others: its paths, or URL.
    pub(super) fn name(&self) -> Result<String, Failure> {
        let absolute = |path: &Path| fs::canonicalize(path).map_err(Failure::of(path.display()));
        let mut name = match is_url(&self.image) {
            true => self.image.clone(),
            false => absolute(Path::new(&self.image))?.display().to_string(),
        };
        for layer in &self.layers {
            name = format!("{name} + {}", absolute(layer)?.display());
        }
        Ok(name)
    }
}

/// The longest URL that is the name of an image in the cache.
const MAX_NAME_BYTES: usize = 200;

pub(super) fn open(options: &ImageOptions) -> Result<Arc<dyn PageSource>, Failure> {
    let image = &options.image;
    let is_url = is_url(image);
    let base: Arc<dyn PageSource> = match (&options.cache, is_url) {
        (None, true) => {
            let source = HttpSource::open(image).map_err(Failure::of(image))?;
            content(source).map_err(Failure::of(image))?
        }
        (None, false) => match ImageFormat::detect(image).map_err(Failure::of(image))? {
            // Its length may be any.
            ImageFormat::Raw => Arc::new(FileSource::open(image).map_err(Failure::of(image))?),
            format => Arc::new(MemoryImage::open_as(image, format).map_err(Failure::of(image))?),
        },
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
            let cached = cached.map_err(Failure::of(directory.display()))?;
            content(cached).map_err(Failure::of(image))?
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

/// What an object has: a snapshot's memory, or its own bytes.
fn content(source: impl PageSource + 'static) -> io::Result<Arc<dyn PageSource>> {
    let source = Arc::new(source);
    match ImageFormat::detect_in(&source)? {
        ImageFormat::Raw => Ok(source),
        _ => Ok(Arc::new(MemoryImage::open_source(source)?)),
    }
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
