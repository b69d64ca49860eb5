//! One fault, answered in each way.

use std::process::Command;

use crate::build;
use crate::child::{self, per_fault};
use crate::contenders::cpus::ALLOWED;
use crate::contenders::{CONTENDERS, Contender, ROUNDS};
use crate::measure::{Round, Samples};
use crate::options::Options;
use crate::table::{Line, Section, Target, Unit};

/// The program with userfaultfd 0.9.
const UPSTREAM: &str = "userfaultfd 0.9, its example's loop";

/// The same, with a CPU for each thread.
const UPSTREAM_OTHER: &str = "userfaultfd 0.9, other CPU";

/// Ours, theirs, and the target of the ratio.
const PAIRS: &[(&str, &str, Target)] = &[
    ("pager, default", "bare poll and read", Target::AtMost(1.0)),
    ("pager, default", UPSTREAM, Target::AtMost(1.0)),
    ("pager, default", UPSTREAM_OTHER, Target::Shown),
    // What the scheduler makes of the default: both threads on one CPU, or each on its own.
    ("pager, default, same CPU", "bare blocking read, same CPU", Target::Shown),
    ("pager, default, other CPU", "bare blocking read, other CPU", Target::Shown),
    ("pager, Threads, other CPU", "bare blocking read, other CPU", Target::AtMost(1.05)),
    ("pager, Threads, same CPU", "bare blocking read, same CPU", Target::AtMost(1.05)),
    ("pager, Spin, other CPU", "bare spinning read, other CPU", Target::Shown),
    ("pager, Beside", "bare blocking read, same CPU", Target::AtMost(1.05)),
    ("pager, Beside", "bare blocking read, other CPU", Target::Shown),
    ("pager, Sigbus", "bare SIGBUS handler", Target::AtMost(1.05)),
    ("pager, Sigbus", UPSTREAM, Target::Shown),
    // Where waking another CPU is dear.
    ("pager, Sigbus", UPSTREAM_OTHER, Target::AtMost(0.2)),
    ("pager, Sigbus", "kernel, anonymous page", Target::Shown),
];

pub(crate) fn run(options: &Options, mut section: Section) -> Section {
    let mut names: Vec<&str> = CONTENDERS.iter().map(|(name, _)| *name).collect();
    names.extend([UPSTREAM, UPSTREAM_OTHER]);
    let upstream = build::upstream(options).inspect_err(|missing| {
        section
            .notes
            .push(format!("userfaultfd 0.9 isn't measured, since it can't be built here:\n{missing}"));
    });
    let mut missing = Vec::new();
    let mut setup = || {
        missing.clear();
        let mut contenders: Vec<Option<Round>> = Vec::new();
        for (name, make) in CONTENDERS {
            let made = make().inspect_err(|reason| missing.push(format!("{name} isn't measured: {reason}")));
            contenders.push(made.ok().map(as_round));
        }
        for place in ["anywhere", "other"] {
            let program = upstream.as_ref().ok().filter(|_| place == "anywhere" || ALLOWED.len() > 1);
            let other = program.map(|path| child::start(Command::new(path).arg(place)));
            contenders.push(other.map(|other| as_round(other.expect("a program that was built"))));
        }
        contenders
    };
    let samples = Samples::take(options.time, ROUNDS, &mut setup);
    section.notes.append(&mut missing);

    let at = |name: &str| names.iter().position(|known| *known == name).expect("a contender");
    for (ours, theirs, target) in PAIRS {
        let (first, second) = (at(ours), at(theirs));
        section.lines.push(Line {
            work: (*ours).to_owned(),
            against: (*theirs).to_owned(),
            unit: Unit::Time,
            ours: samples.of(first),
            theirs: samples.of(second),
            ratio: samples.ratio(first, second),
            target: *target,
        });
    }
    for (index, name) in names.iter().enumerate() {
        let summary = samples.of(index);
        section
            .ladder
            .extend(summary.map(|summary| ((*name).to_owned(), summary, name.starts_with("pager"))));
    }
    section.ladder.sort_by(|a, b| a.1.median.total_cmp(&b.1.median));
    section.matrix = vec![vec!["way".to_owned(), "a fault takes".to_owned()]];
    for (name, summary, _) in &section.ladder {
        section.matrix.push(vec![name.clone(), Unit::Time.format(summary.median)]);
    }
    section
}

fn as_round(mut contender: Box<dyn Contender>) -> Round {
    Box::new(move || per_fault(&mut *contender))
}
