//! What counting costs, and what tracing does that nobody listens to: the same program, built with and without.

use std::process::Command;

use crate::build::{self, Variant};
use crate::child::{self, per_fault};
use crate::contenders::ROUNDS;
use crate::measure::{Round, Samples};
use crate::options::Options;
use crate::table::{Line, Section, Target, Unit};

/// Those that take the shortest time, so that a part of it weighs most.
const CONTENDERS: [&str; 2] = ["pager, Threads, same CPU", "pager, Sigbus"];

const VARIANTS: [Variant; 3] = [Variant::Usual, Variant::Tracing, Variant::Uncounted];

pub(crate) fn run(options: &Options, mut section: Section) -> Section {
    let mut programs = Vec::new();
    for variant in VARIANTS {
        match build::variant(variant, options) {
            Ok(program) => programs.push(program),
            Err(missing) => {
                section
                    .notes
                    .push(format!("Not measured, since it can't be built ({variant:?}):\n{missing}"));
                return section;
            }
        }
    }
    let setup = || {
        let mut all: Vec<Option<Round>> = Vec::new();
        for name in CONTENDERS {
            for program in &programs {
                let mut contender = child::start(Command::new(program).arg(name)).expect("a program");
                all.push(Some(Box::new(move || per_fault(&mut *contender))));
            }
        }
        all
    };
    let samples = Samples::take(options.time, ROUNDS, setup);
    for (index, name) in CONTENDERS.iter().enumerate() {
        let at = |variant: usize| index * VARIANTS.len() + variant;
        for (work, ours, against, theirs) in [
            ("as it is", 0, "nothing counted", 2),
            ("feature tracing, no subscriber", 1, "without the feature", 0),
        ] {
            section.lines.push(Line {
                work: format!("{name}: {work}"),
                against: against.to_owned(),
                unit: Unit::Time,
                ours: samples.of(at(ours)),
                theirs: samples.of(at(theirs)),
                ratio: samples.ratio(at(ours), at(theirs)),
                target: Target::AtMost(1.01),
            });
        }
    }
    section
}
