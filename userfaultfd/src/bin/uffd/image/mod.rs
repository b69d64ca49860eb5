//! `uffd image`: images of memory, copied from one format into another, checked, compared and merged.

mod open;
mod progress;

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde::Serialize;
use userfaultfd::pager::{PageSource, WorkingSet};
use userfaultfd::snapshot::{
    ChunkOptions, Compression, ImageCopy, ImageFormat, MemoryImage, SnapshotReader, SnapshotWriter,
    changed_ranges,
};

pub(crate) use self::open::{bytes, is_url};
use self::progress::Progress;
use crate::exit::{Count, Failure};

/// Copy, check, compare and merge images of memory
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Convert(Convert),
    Verify(Verify),
    Info(Info),
    Diff(Diff),
    Merge(Merge),
}

/// Copy an image into a snapshot file in chunks, or into a raw file
#[derive(Debug, clap::Args)]
struct Convert {
    /// The image: a file, the folder of a snapshot of Cloud Hypervisor, or the URL of a raw image or a snapshot file
    #[arg(value_name = "IMAGE")]
    input: String,

    /// The file to write. An existing file is replaced when the new one is complete
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// The format of the image; `firecracker` is the same as `raw`. By default it is detected
    #[arg(long, value_name = "FORMAT", value_parser = formats())]
    from: Option<ImageFormat>,

    /// A sparse file of the same length on top, such as a diff of Firecracker: what isn't a hole is its content. The last one is on
    /// top
    #[arg(long = "layer", value_name = "FILE")]
    layers: Vec<PathBuf>,

    /// The format to write
    #[arg(long, value_enum, default_value = "snapshot")]
    to: To,

    /// Put the pages of this working set first, and the set into the file, so that a restore begins with one long read
    #[arg(long, value_name = "FILE")]
    working_set: Option<PathBuf>,

    #[command(flatten)]
    chunks: Chunks,
}

/// How chunks are written.
#[derive(Debug, clap::Args)]
struct Chunks {
    /// How chunks are compressed
    #[arg(long, value_enum, default_value = "zstd")]
    compression: Way,

    /// The level of zstd
    #[arg(long, value_name = "NUMBER", default_value = "3", allow_negative_numbers = true)]
    level: i32,

    /// Bytes of content of a chunk, from 64K to 2M, a power of two
    #[arg(long, value_name = "BYTES", default_value = "128K", value_parser = bytes)]
    chunk: u64,
}

/// Takes the name of an [`ImageFormat`].
fn formats() -> impl TypedValueParser<Value = ImageFormat> {
    PossibleValuesParser::new(ImageFormat::names()).try_map(|name| name.parse::<ImageFormat>())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum To {
    /// A snapshot file in chunks
    Snapshot,
    /// The bytes of the memory and nothing else, zeros as holes
    Raw,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Way {
    /// No compression
    None,
    /// LZ4: fast
    Lz4,
    /// zstd: small
    Zstd,
}

/// Read snapshot files and check all their content against the checksums
#[derive(Debug, clap::Args)]
struct Verify {
    /// The files or URLs. Name an increment after the snapshot that it follows
    #[arg(required = true, value_name = "FILE|URL")]
    files: Vec<String>,
}

/// Print format, size and content of images
#[derive(Debug, clap::Args)]
struct Info {
    /// Print JSON
    #[arg(long)]
    json: bool,

    /// The images: files, folders of Cloud Hypervisor, URLs
    #[arg(required = true, value_name = "IMAGE")]
    files: Vec<String>,
}

/// Write what has changed since a snapshot file as an increment that follows it
#[derive(Debug, clap::Args)]
struct Diff {
    /// The older snapshot file. It must hold all of the memory
    #[arg(value_name = "OLD")]
    old: String,

    /// The newer image, in any format
    #[arg(value_name = "NEW")]
    new: String,

    /// The file to write. An existing file is replaced when the new one is complete
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    #[command(flatten)]
    chunks: Chunks,
}

/// Merge snapshot files that follow each other into one
#[derive(Debug, clap::Args)]
struct Merge {
    /// The file to write. An existing file is replaced when the new one is complete
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// The files or URLs, the oldest first
    #[arg(required = true, value_name = "FILE|URL")]
    files: Vec<String>,

    #[command(flatten)]
    chunks: Chunks,
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    match &options.command {
        Command::Convert(options) => convert(options),
        Command::Verify(options) => verify(options),
        Command::Info(options) => info(options),
        Command::Diff(options) => diff(options),
        Command::Merge(options) => merge(options),
    }
}

impl Chunks {
    fn writer(&self, path: &Path) -> Result<SnapshotWriter<BufWriter<File>>, Failure> {
        let compression = match self.compression {
            Way::None => Compression::None,
            Way::Lz4 => Compression::Lz4,
            Way::Zstd => Compression::Zstd(self.level),
        };
        if !(64 << 10..=2 << 20).contains(&self.chunk) || !self.chunk.is_power_of_two() {
            return Err(Failure::Arguments("--chunk must be a power of two from 64K to 2M"));
        }
        let options = ChunkOptions::new().size(self.chunk as usize).compression(compression);
        let writer = SnapshotWriter::create(path).map_err(Failure::of(path.display()))?;
        Ok(writer.chunks(&options))
    }
}

/// An error of a copy, which may be that of its input or of its output.
fn copying(input: &str, output: &Path) -> impl FnOnce(io::Error) -> Failure {
    Failure::of(format!("{input} to {}", output.display()))
}

fn convert(options: &Convert) -> Result<(), Failure> {
    let (input, output) = (&options.input, &options.output);
    let mut image = open::image(input, options.from)?;
    for layer in &options.layers {
        let pushed = File::open(layer).and_then(|file| image.push_diff(file).map(drop));
        pushed.map_err(Failure::of(layer.display()))?;
    }
    let progress = Progress::new("copied");
    let copy = ImageCopy::new(&image).progress(|done, all| progress.tell(done, all));
    if options.to == To::Raw {
        if options.working_set.is_some() {
            return Err(Failure::Arguments("--working-set is for a snapshot file"));
        }
        return copy.write_raw(output).map(drop).map_err(copying(input, output));
    }
    let mut copy = copy.regions(image.regions().iter().cloned());
    if let Some(path) = &options.working_set {
        copy = copy.working_set(WorkingSet::load(path).map_err(Failure::of(path.display()))?);
    } else if let Some(set) = open::working_set(&image).map_err(Failure::of(input))? {
        copy = copy.working_set(set);
    }
    copy.write(options.chunks.writer(output)?).map(drop).map_err(copying(input, output))
}

fn verify(options: &Verify) -> Result<(), Failure> {
    let mut below: Option<SnapshotReader> = None;
    for (number, file) in options.files.iter().enumerate() {
        let reader = open::on(open::snapshot(file)?, below.take()).map_err(Failure::of(file))?;
        // With those that follow it, where some do.
        let next = options.files.get(number + 1).map(|next| open::snapshot(next)).transpose()?;
        if next.is_none_or(|next| next.parent() != Some(reader.id())) {
            reader.verify().map_err(Failure::of(file))?;
        }
        below = Some(reader);
    }
    Ok(())
}

fn diff(options: &Diff) -> Result<(), Failure> {
    let (old_name, new_name) = (&options.old, &options.new);
    let old = open::snapshot(old_name)?;
    let (id, new) = (old.id(), open::image(new_name, None)?);
    let old = MemoryImage::of_snapshot(old).map_err(|error| {
        Failure::Failed(format!("{old_name}: {error}; `uffd image merge` makes one file of both"))
    })?;
    let progress = Progress::new("compared");
    let changed = changed_ranges(&old, &new, |done, all| progress.tell(done, all));
    let changed = changed.map_err(Failure::of(format!("{old_name} and {new_name}")))?;
    drop(progress);
    let progress = Progress::new("copied");
    let copy = ImageCopy::new(&new).extents(changed).regions(old.regions().iter().cloned());
    let copy = copy.progress(|done, all| progress.tell(done, all));
    let writer = options.chunks.writer(&options.output)?.follows(id);
    copy.write(writer).map(drop).map_err(copying(new_name, &options.output))
}

fn merge(options: &Merge) -> Result<(), Failure> {
    let mut all: Option<SnapshotReader> = None;
    for file in &options.files {
        let reader = open::snapshot(file)?;
        all = Some(match all.take() {
            None => reader,
            Some(below) => reader.on(below).map_err(Failure::of(file))?,
        });
    }
    let Some(all) = all else { return Err(Failure::Arguments("files are missing")) };
    let writer = options.chunks.writer(&options.output)?;
    let output = options.output.display();
    all.merge_with(writer).map(drop).map_err(Failure::of(output))
}

/// What `info` says of an image.
#[derive(Debug, Serialize)]
struct Summary {
    image: String,
    format: String,
    bytes: u64,
    regions: usize,
    snapshot: Option<SnapshotSummary>,
}

/// What it says of a snapshot file, too.
#[derive(Debug, Serialize)]
struct SnapshotSummary {
    version: u32,
    id: String,
    parent: Option<String>,
    /// Bytes of pages with content, those that these take in the file, and those of pages that were lost.
    data: u64,
    stored: u64,
    gone: u64,
    chunk: Option<u64>,
    working_set_pages: Option<usize>,
}

impl Summary {
    fn of_snapshot(image: &str, reader: &SnapshotReader) -> io::Result<Self> {
        let snapshot = SnapshotSummary {
            version: reader.version(),
            id: reader.id().to_string(),
            parent: reader.parent().map(|parent| parent.to_string()),
            data: reader.data_len(),
            stored: reader.stored_len(),
            gone: reader.gone_len(),
            chunk: reader.chunk_size(),
            working_set_pages: reader.working_set()?.map(|set| set.len()),
        };
        Ok(Self {
            image: image.to_owned(),
            format: ImageFormat::Snapshot.to_string(),
            bytes: reader.len().unwrap_or_default(),
            regions: reader.regions().len(),
            snapshot: Some(snapshot),
        })
    }

    fn of_image(name: &str, image: &MemoryImage) -> Self {
        Self {
            image: name.to_owned(),
            format: image.format().to_string(),
            bytes: image.len().unwrap_or_default(),
            regions: image.regions().len(),
            snapshot: None,
        }
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn info(options: &Info) -> Result<(), Failure> {
    let mut summaries = Vec::new();
    for name in &options.files {
        let summary = match open::either(name)? {
            open::Either::Snapshot(reader) => {
                Summary::of_snapshot(name, &reader).map_err(Failure::of(name))?
            }
            open::Either::Other(image) => Summary::of_image(name, &image),
        };
        summaries.push(summary);
    }
    let text = if options.json {
        serde_json::to_string_pretty(&summaries).map_err(|error| Failure::Output(error.into()))? + "\n"
    } else {
        summaries.iter().map(described).collect()
    };
    io::stdout().lock().write_all(text.as_bytes()).map_err(Failure::Output)
}

fn described(summary: &Summary) -> String {
    let Summary { image, format, bytes, regions, snapshot } = summary;
    let regions = Count(*regions, "region");
    let mut text = format!("{image}: {format}, {:.1} MiB in {regions}\n", mib(*bytes));
    let Some(snapshot) = snapshot else { return text };
    let SnapshotSummary { version, id, data, stored, gone, .. } = snapshot;
    let mut line = |name: &str, value: &str| {
        let _never_fails = writeln!(text, "  {name:<12} {value}");
    };
    line("version", &version.to_string());
    line("id", id);
    line("follows", snapshot.parent.as_deref().unwrap_or("nothing"));
    line("data", &format!("{:.1} MiB, of which the file has {:.1}", mib(*data), mib(*stored)));
    line("lost", &format!("{:.1} MiB", mib(*gone)));
    if let Some(chunk) = snapshot.chunk {
        line("chunks", &format!("{} KiB", chunk >> 10));
    }
    let set = snapshot.working_set_pages.map_or("none".to_owned(), |pages| Count(pages, "page").to_string());
    line("working set", &set);
    text
}
