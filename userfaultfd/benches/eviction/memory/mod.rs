//! Real memory: a file of four times the memory that there is, beside mmap(2) under the same limit, and what eviction costs.

mod contender;
mod group;
mod inside;

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use self::contender::{Contender, Figures, ROOM_BYTES, Setting, Work, measure};
use self::group::Group;
use crate::candidates::Fifo;
use crate::replay::with_accesses;
use crate::traces;

pub(crate) use self::contender::run as run_contender;

/// Rounds of each row, in which both take turns: an odd number, of which the median counts.
const ROUNDS: usize = 3;

/// What a ratio must be.
#[derive(Clone, Copy)]
enum Target {
    AtLeast(f64),
    AtMost(f64),
}

/// A row of the table.
struct Row {
    work: &'static str,
    against: &'static str,
    ours: String,
    theirs: String,
    /// What each round came to: ours by theirs.
    ratios: Vec<f64>,
    target: Target,
}

impl Row {
    fn cells(&mut self) -> Vec<String> {
        self.ratios.sort_by(f64::total_cmp);
        let (ratios, last) = (&self.ratios, self.ratios.len() - 1);
        let ratio = ratios[last / 2];
        let (is_met, target) = match self.target {
            Target::AtLeast(least) => (ratio >= least, format!("at least {least}")),
            Target::AtMost(most) => (ratio <= most, format!("at most {most}")),
        };
        let is_met = if is_met { "" } else { ": NOT MET" };
        let range = format!("{ratio:.2} ({:.2}…{:.2})", ratios[0], ratios[last]);
        let cells = [self.work, self.against, &self.ours, &self.theirs, &range, &format!("{target}{is_met}")];
        cells.map(str::to_owned).to_vec()
    }
}

/// Sizes, and how often.
pub(crate) struct Scale {
    bytes: usize,
    seconds: f64,
    rounds: usize,
}

impl Scale {
    /// What is measured.
    pub(crate) const WHOLE: Self = Self { bytes: 1 << 30, seconds: 5.0, rounds: ROUNDS };
    /// Only that it works.
    pub(crate) const QUICK: Self = Self { bytes: 128 << 20, seconds: 0.1, rounds: 1 };
}

/// The file that is read and written, without a name once the rows are done.
struct Data(PathBuf);

impl Data {
    fn new(folder: &Path, bytes: usize) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let data = Self(folder.join(format!("data-{}", std::process::id())));
        let mut file = std::fs::File::create(&data.0)?;
        let mut block = vec![0; 1 << 20];
        for number in 0..bytes / block.len() {
            block.fill(number as u8 | 1);
            file.write_all(&block)?;
        }
        file.sync_all()?;
        Ok(data)
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            eprintln!("{} stays: {error}", self.0.display());
        }
    }
}

/// All rows, as the section of the report, which lists them as `table` writes it.
pub(crate) fn section(
    folder: &Path,
    scale: &Scale,
    table: impl Fn(&[Vec<String>]) -> String,
) -> Result<String, String> {
    let failed = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    let data = Data::new(folder, scale.bytes).map_err(failed("the file"))?;
    let limit = scale.bytes / 4;
    let group = Group::new(limit);
    let direct = userfaultfd::pager::FileSource::open(&data.0).and_then(|source| source.direct(true)).is_ok();
    let setting = Setting { file: data.0.clone(), bytes: scale.bytes, limit, seconds: scale.seconds, direct };
    let mut rows = outside(&setting, scale.rounds, group.as_ref())?;
    rows.extend(within(&setting, scale.rounds).map_err(failed("in this process"))?);
    let head = ["work", "against", "ours", "theirs", "ratio", "target"].map(str::to_owned).to_vec();
    let cells: Vec<_> = std::iter::once(head).chain(rows.iter_mut().map(Row::cells)).collect();
    let mib = |bytes| bytes >> 20;
    let mut text = format!("\n## Real memory\n\nA file of {} MiB, ", mib(scale.bytes));
    let held = match group {
        Some(_) => format!(
            "each process in a memory cgroup of {} MiB, of which ours has {} MiB as a budget",
            mib(limit),
            mib(limit - ROOM_BYTES)
        ),
        None => "and no memory cgroup can be made here, so that mmap has all memory".to_owned(),
    };
    let how = if direct { "by O_DIRECT" } else { "through the page cache" };
    writeln!(text, "{held}, and reads {how}. Medians of {} rounds, and their range.\n", scale.rounds)
        .map_err(|error| error.to_string())?;
    text += &table(&cells);
    Ok(text)
}

/// Rows of processes in a group.
fn outside(setting: &Setting, rounds: usize, group: Option<&Group>) -> Result<Vec<Row>, String> {
    let compare = |work| -> Result<[Vec<Figures>; 2], String> {
        let mut figures = [Vec::new(), Vec::new()];
        for round in 0..rounds {
            for turn in 0..2 {
                let at = (round + turn) % 2;
                figures[at].push(measure([Contender::Ours, Contender::Mmap][at], work, setting, group)?);
            }
        }
        Ok(figures)
    };
    let row = |work, against, figures: &[Vec<Figures>; 2], of: fn(&Figures) -> f64, unit, target| {
        let values = |at: usize| figures[at].iter().map(of).collect::<Vec<_>>();
        let show = |values: Vec<f64>| format!("{}{unit}", digits(median(values)));
        let ratios = values(0).iter().zip(&values(1)).map(|(ours, theirs)| ours / theirs).collect();
        Row { work, against, ours: show(values(0)), theirs: show(values(1)), ratios, target }
    };
    let thousands = |figures: &Figures| figures.rate / 1e3;
    let mut rows = Vec::new();
    for (threads, work) in [(1, "reads, zipf 1.0, 1 thread"), (4, "reads, zipf 1.0, 4 threads")] {
        let figures = compare(Work::Zipf(threads))?;
        rows.push(row(work, "mmap, MADV_RANDOM", &figures, thousands, " k/s", Target::AtLeast(0.9)));
    }
    let figures = compare(Work::Sequential)?;
    rows.push(row("sequential, twice", "mmap", &figures, thousands, " k/s", Target::AtLeast(0.9)));
    let figures = compare(Work::Writes)?;
    let against = "mmap, msync each second";
    rows.push(row("half writes, zipf 1.0", against, &figures, thousands, " k/s", Target::AtLeast(0.9)));
    if figures.iter().flatten().all(|figures| figures.written.is_finite()) {
        let target = Target::AtMost(1.1);
        rows.push(row(
            "the same: bytes written an access",
            against,
            &figures,
            |figures| figures.written,
            "",
            target,
        ));
    }
    let figures = compare(Work::HotSet)?;
    let percent = |figures: &Figures| 100.0 * figures.miss_ratio;
    let (pages, page) = (setting.bytes / userfaultfd::page_size(), userfaultfd::page_size());
    let trace = traces::hot_set(pages, setting.limit / page, setting.hot_set_accesses());
    let fifo = with_accesses::<Fifo>(&trace, pages, setting.limit / page).hot_miss_ratio();
    let target = Target::AtMost(1.0);
    rows.push(row("misses of a hot set beside a scan", "mmap, MADV_RANDOM", &figures, percent, " %", target));
    rows.push(Row {
        work: "the same",
        against: "FIFO, by simulation",
        ours: format!("{:.2} %", median(figures[0].iter().map(percent).collect())),
        theirs: format!("{:.2} %", 100.0 * fifo),
        ratios: figures[0].iter().map(|figures| figures.miss_ratio / fifo).collect(),
        target: Target::AtMost(0.33),
    });
    Ok(rows)
}

/// Rows of this process.
fn within(setting: &Setting, rounds: usize) -> io::Result<Vec<Row>> {
    let (file, bytes, small) = (setting.file.as_path(), setting.bytes, setting.bytes / 16);
    let row = |work, against, most, run: &dyn Fn() -> io::Result<[f64; 2]>| {
        let times = (0..rounds).map(|_| run()).collect::<io::Result<Vec<_>>>()?;
        let show = |at: usize| {
            let time = median(times.iter().map(|times| times[at]).collect());
            if time < 1e-3 { format!("{:.2} µs", time * 1e6) } else { format!("{:.1} ms", time * 1e3) }
        };
        let ratios = times.iter().map(|[ours, theirs]| ours / theirs).collect();
        io::Result::Ok(Row {
            work,
            against,
            ours: show(0),
            theirs: show(1),
            ratios,
            target: Target::AtMost(most),
        })
    };
    Ok(vec![
        row("clean pages evicted", "MADV_DONTNEED", 2.0, &|| inside::clean(file, bytes))?,
        row("written pages evicted", "pwrite of the same bytes", 1.1, &|| inside::dirty(file, bytes))?,
        row("page back from staging", "fault from a source in memory", 1.0, &|| {
            inside::second_chance(small)
        })?,
        row("fault, nothing evicted", "without a budget", 1.02, &|| inside::budget_set(small))?,
    ])
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() - 1) / 2]
}

/// With three digits.
fn digits(value: f64) -> String {
    let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.decimals$}")
}
