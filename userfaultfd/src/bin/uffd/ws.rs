//! `uffd ws`: working sets, which `uffd serve --record` and the library write.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use serde::Serialize;
use userfaultfd::pager::{self, WorkingSet};

use crate::exit::Failure;

/// Inspect and merge working sets: the pages that machines accessed, in order
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Info(Info),
    Merge(Merge),
    Show(Show),
}

/// Print how large working sets are, and how much several have in common
#[derive(Debug, clap::Args)]
struct Info {
    /// Print JSON
    #[arg(long)]
    json: bool,

    /// The files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// Merge working sets: the pages of the first, then those that only later ones have
#[derive(Debug, clap::Args)]
struct Merge {
    /// The file to write. An existing file is replaced when the new one is complete
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// Keep only the pages that all sets have, in the order of the first
    #[arg(long)]
    common: bool,

    /// Adapt the others to the page size and the number of pages of the first, in place of refusing them
    #[arg(long)]
    adapt: bool,

    /// The files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// Draw a working set: places from left to right, the order of the accesses from top to bottom
#[derive(Debug, clap::Args)]
struct Show {
    /// Maximum width of a line, in characters
    #[arg(long, value_name = "NUMBER", default_value = "72")]
    columns: NonZeroUsize,

    /// Maximum number of lines
    #[arg(long, value_name = "NUMBER", default_value = "24")]
    rows: NonZeroUsize,

    /// The file
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    match &options.command {
        Command::Info(options) => info(options),
        Command::Merge(options) => merge(options),
        Command::Show(options) => show(options),
    }
}

fn load(path: &PathBuf) -> Result<WorkingSet, Failure> {
    WorkingSet::load(path).map_err(|error| {
        let path = path.display();
        let helps = match error.kind() {
            io::ErrorKind::InvalidData => "; `uffd serve --record FILE` writes working sets",
            _ => "",
        };
        Failure::Failed(format!("{path}: {error}{helps}"))
    })
}

fn print(text: &str) -> Result<(), Failure> {
    io::stdout().lock().write_all(text.as_bytes()).map_err(Failure::Output)
}

/// What `info` says of a file.
#[derive(Debug, Serialize)]
struct Summary {
    file: PathBuf,
    page_size: usize,
    region_pages: usize,
    pages: usize,
    bytes: usize,
    runs: usize,
    longest_run: usize,
}

/// What `info` says of all.
#[derive(Debug, Serialize)]
struct Report {
    files: Vec<Summary>,
    /// Pages that all have, and that any has. `None` if they are of regions of different sizes.
    in_all: Option<usize>,
    in_any: Option<usize>,
}

impl Summary {
    fn new(file: &Path, set: &WorkingSet) -> Self {
        Self {
            file: file.to_owned(),
            page_size: set.page_size(),
            region_pages: set.region_pages(),
            pages: set.len(),
            bytes: set.len() * set.page_size(),
            runs: set.runs().len(),
            longest_run: set.runs().iter().map(ExactSizeIterator::len).max().unwrap_or(0),
        }
    }
}

/// A share in percent.
fn percent(part: usize, whole: usize) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Puts sets together, or `None` if they are of regions of different sizes.
fn fold(
    sets: &[WorkingSet],
    with: impl Fn(&WorkingSet, &WorkingSet) -> pager::Result<WorkingSet>,
) -> Option<WorkingSet> {
    let (first, others) = sets.split_first()?;
    others.iter().try_fold(first.clone(), |all, set| with(&all, set).ok())
}

fn info(options: &Info) -> Result<(), Failure> {
    let sets = options.files.iter().map(load).collect::<Result<Vec<_>, _>>()?;
    let files = options.files.iter().zip(&sets).map(|(file, set)| Summary::new(file, set)).collect();
    let in_all = fold(&sets, WorkingSet::intersection).map(|set| set.len());
    let report = Report { files, in_all, in_any: fold(&sets, WorkingSet::union).map(|set| set.len()) };
    if options.json {
        let text = serde_json::to_string_pretty(&report).map_err(|error| Failure::Output(error.into()))?;
        return print(&(text + "\n"));
    }
    let head = ["pages", "MiB", "of", "share", "runs", "longest"];
    let mut text = format!(
        "{:>9} {:>9} {:>9} {:>7} {:>8} {:>8}  file\n",
        head[0], head[1], head[2], head[3], head[4], head[5]
    );
    for file in &report.files {
        let (size, of) = (mib(file.bytes), mib(file.region_pages * file.page_size));
        let share = percent(file.pages, file.region_pages);
        let name = file.file.display();
        let Summary { pages, runs, longest_run, .. } = file;
        let _never_fails = writeln!(
            text,
            "{pages:>9} {size:>9.1} {of:>9.1} {share:>6.1}% {runs:>8} {longest_run:>8}  {name}"
        );
    }
    let _never_fails = match (report.files.len(), report.in_all, report.in_any) {
        (1, ..) => Ok(()),
        (_, Some(all), Some(any)) => {
            writeln!(text, "{all} pages are in all, {:.1} % of the {any} that are in any", percent(all, any))
        }
        _ => writeln!(text, "they are of regions of different sizes"),
    };
    print(&text)
}

fn merge(options: &Merge) -> Result<(), Failure> {
    let sets = options.files.iter().map(load).collect::<Result<Vec<_>, _>>()?;
    let mut sets = options.files.iter().zip(sets);
    let Some((_, mut all)) = sets.next() else { return Err(Failure::Arguments("files are missing")) };
    for (path, set) in sets {
        let adapted = match options.adapt {
            true => set.with_page_size(all.page_size()).map(|set| set.with_region_pages(all.region_pages())),
            false => Ok(set),
        };
        let both = adapted.and_then(|set| match options.common {
            true => all.intersection(&set),
            false => all.union(&set),
        });
        all = both.map_err(|error| {
            let helps = if options.adapt { "" } else { "; --adapt makes it fit" };
            Failure::Failed(format!("{}: {error}{helps}", path.display()))
        })?;
    }
    all.save(&options.output).map_err(Failure::of(options.output.display()))
}

/// From few pages to many.
const SHADES: [char; 9] = ['.', ':', '-', '=', '+', '*', '#', '%', '@'];

fn show(options: &Show) -> Result<(), Failure> {
    let set = load(&options.file)?;
    let (pages, all) = (set.len(), set.region_pages());
    let page_size = set.page_size();
    let share = percent(pages, all);
    let mut text = format!(
        "{pages} of {all} pages of {} KiB ({share:.1} %): {:.1} MiB\n",
        page_size / 1024,
        mib(pages * page_size)
    );
    if pages == 0 {
        return print(&text);
    }
    let (columns, rows) = (options.columns.get().min(all), options.rows.get().min(pages));
    let place =
        |number: usize, parts: usize, whole: usize| (number as u128 * parts as u128 / whole as u128) as usize;
    let mut cells = vec![vec![0_usize; columns]; rows];
    for (order, page) in set.pages().enumerate() {
        cells[place(order, rows, pages)][place(page, columns, all)] += 1;
    }
    let most = cells.iter().flatten().copied().max().unwrap_or(1);
    let shade = |count: usize| match count {
        0 => ' ',
        count => SHADES[(count * SHADES.len()).div_ceil(most) - 1],
    };
    for row in &cells {
        let _never_fails = writeln!(text, "|{}|", row.iter().map(|count| shade(*count)).collect::<String>());
    }
    let each = all.div_ceil(columns);
    let _never_fails = writeln!(
        text,
        "a letter is {each} pages wide and up to {most} accesses deep; a line is {} accesses",
        pages.div_ceil(rows)
    );
    print(&text)
}
