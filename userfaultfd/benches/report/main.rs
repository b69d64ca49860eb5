//! What the pager costs and what it saves, beside the same things done in other ways.
//!
//! `cargo bench -p userfaultfd --bench report [-- --quick] [-- --row NAME] [-- --seconds N]`. What is compared takes
//! turns in one process, round by round and in random order, so that whatever else the machine does meets all of them;
//! ratios are of rounds that were neighbours. The table is printed, and written to `target/report/report.md`, with two pictures
//! beside it: `latency.svg` and `throughput.svg`.
//!
//! Each row is set up six times at least. A figure is the median of the set-ups' medians, with the middle half of those in
//! brackets. A ratio has in brackets where its median is with 95 % confidence, from the set-ups' medians alone, since
//! rounds of one set-up have too much in common to count as several values.

mod build;
mod child;
#[path = "../contenders/mod.rs"]
mod contenders;
mod machine;
mod measure;
#[path = "../memfd/mod.rs"]
mod memfd;
mod options;
mod picture;
#[expect(dead_code, reason = "others need the rest")]
#[path = "../random/mod.rs"]
mod random;
mod rows;
mod table;

use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use userfaultfd::PendingFile;

use crate::options::{Options, USAGE};
use crate::table::Section;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    measure::check();
    let options = Options::parse(std::env::args().skip(1))?;
    if options.list {
        println!("{USAGE}\n");
        rows::ROWS.iter().for_each(|(name, what, _)| println!("{name:12} {what}"));
        return Ok(());
    }
    if !rows::ROWS.iter().any(|(name, ..)| options.wants(name)) {
        return Err("no row has such a name; --list tells which there are".to_owned());
    }
    let machine = machine::describe();
    let mut text = format!("# Report of the pager\n\n{machine}");
    print!("{text}");
    let (mut sections, start) = (Vec::new(), Instant::now());
    for (name, what, run) in rows::ROWS.iter().filter(|(name, ..)| options.wants(name)) {
        let begin = Instant::now();
        let section = run(&options, Section { title: what, ..Section::default() });
        let told = section.text();
        print!("{told}");
        text += &told;
        eprintln!("\n{name}: {:.0} s", begin.elapsed().as_secs_f64());
        sections.push(section);
    }
    if options.test {
        println!("\nnothing was measured: all rows work");
        return Ok(());
    }
    let missed: Vec<String> = sections.iter().flat_map(Section::missed).collect();
    let verdict = if missed.is_empty() {
        "\nAll targets are met.\n".to_owned()
    } else {
        format!("\nTargets that are missed:\n\n- {}\n", missed.join("\n- "))
    };
    print!("{verdict}");
    text += &verdict;
    write(&text, &machine, &sections)?;
    eprintln!("{:.0} s, report in {}", start.elapsed().as_secs_f64(), build::folder().display());
    Ok(())
}

/// Leaves the report in the target directory.
fn write(text: &str, machine: &str, sections: &[Section]) -> Result<(), String> {
    let folder = build::folder();
    let save = |name: &str, content: String| {
        let path = folder.join(name);
        PendingFile::replace(&path, content.as_bytes())
            .map_err(|error| format!("{}: {error}", path.display()))
    };
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    save("report.md", text.to_owned())?;
    let subtitle = machine.lines().collect::<Vec<_>>().join("; ");
    let ladder: Vec<_> = sections.iter().flat_map(|section| section.ladder.iter().cloned()).collect();
    if !ladder.is_empty() {
        save("latency.svg", picture::ladder("One fault on a 4 KiB page", &subtitle, &ladder))?;
    }
    let curves: Vec<_> = sections.iter().flat_map(|section| section.curves.iter().cloned()).collect();
    if !curves.is_empty() {
        save("throughput.svg", picture::throughput("Throughput by block size", &subtitle, &curves))?;
    }
    Ok(())
}
