//! Guard pages beside pages that are filled: which ones a fill may overwrite, and which ones it leaves.

use std::ops::Range;

use userfaultfd::FeatureFlags;
use userfaultfd::pager::{FaultAround, FillOrder, Pager, RegionId};

use crate::reader::{Seen, read, tell_signals};
use crate::scene::{Pages, byte, region, serve};
use crate::support::memory::Memory;
use crate::support::proc::wait_until;
use crate::support::{child, has, page, require, test_name, uffd};

const MADV_GUARD_INSTALL: libc::c_int = 102;
const MADV_GUARD_REMOVE: libc::c_int = 103;

/// What fills pages.
enum Filler {
    /// Faults on pages, one after the other.
    Faults(FaultAround, &'static [usize]),
    Background,
    Finish,
}

impl Filler {
    fn run(&self, pager: &Pager, region: RegionId, memory: &Memory) {
        match self {
            Filler::Faults(_, pages) => {
                for number in *pages {
                    assert_eq!(read(memory.at(*number).addr()), Seen::Byte(byte(*number)));
                }
            }
            Filler::Background => {
                assert_eq!(pager.background(region, FillOrder::Ascending).unwrap().wait().failed, []);
            }
            Filler::Finish => pager.finish(|_| {}).unwrap(),
        }
    }
}

/// Whether this kernel's own fill leaves a guard where it is: since Linux 7.2. `None`, visibly, where there are no guards.
fn kernel_keeps_guards(test: &str) -> Option<bool> {
    let (uffd, memory) = (uffd(FeatureFlags::empty()), Memory::anonymous(1));
    uffd.register(memory.start(), memory.len()).unwrap();
    let installed = memory.advise(0, 1, MADV_GUARD_INSTALL);
    if !has(test, "MADV_GUARD_INSTALL", installed.is_ok()) {
        return None;
    }
    let content = vec![1_u8; page()];
    // SAFETY: nothing refers to the page.
    let filled = unsafe { uffd.copy(content.as_ptr().cast(), memory.start(), page(), false) };
    Some(filled.is_err())
}

/// `FaultAround::Page` and faults in no order overwrite no guard. What fills more than the page that faulted overwrites
/// those among its pages, on kernels whose fills do.
#[test]
fn guards_outside_of_the_filled_pages_stay() {
    require!();
    child::run_well(test_name!(), || {
        tell_signals();
        let Some(keeps) = kernel_keeps_guards(test_name!()) else { return };
        let block = FaultAround::Block(4 * page());
        let adaptive = FaultAround::Adaptive { most: 8 * page() };
        // The filler, what it has filled at last, and the guard.
        let cases: [(Filler, Range<usize>, usize); 10] = [
            (Filler::Faults(FaultAround::Page, &[2]), 2..3, 3),
            (Filler::Faults(FaultAround::Page, &[2]), 2..3, 1),
            (Filler::Faults(FaultAround::Page, &[0, 1, 3]), 3..4, 4),
            (Filler::Faults(block, &[2]), 0..4, 3),
            (Filler::Faults(block, &[2]), 0..4, 1),
            (Filler::Faults(block, &[2]), 0..4, 4),
            (Filler::Faults(adaptive, &[5, 2]), 2..3, 3),
            (Filler::Faults(adaptive, &[0, 1, 3]), 0..7, 5),
            (Filler::Background, 0..8, 5),
            (Filler::Finish, 0..8, 5),
        ];
        for (number, (filler, filled, guard)) in cases.into_iter().enumerate() {
            let (memory, pager) = (Memory::anonymous(8), Pager::new().unwrap());
            let region = region(&memory, Pages::new(page()));
            let around = match filler {
                Filler::Faults(around, _) => around,
                Filler::Background | Filler::Finish => FaultAround::Page,
            };
            let added = serve(&pager, uffd(FeatureFlags::empty()), region.fault_around(around));
            memory.advise(guard, 1, MADV_GUARD_INSTALL).unwrap();
            filler.run(&pager, added.regions[0], &memory);
            let is_overwritten = filled.contains(&guard) && !keeps;
            wait_until(|| {
                let mut pages = filled.clone().filter(|page| is_overwritten || *page != guard);
                pages.all(|page| memory.state(page).present)
            });
            let guarded = || read(memory.at(guard).addr());
            let expected = if is_overwritten { Seen::Byte(byte(guard)) } else { Seen::Signal(libc::SIGSEGV) };
            assert_eq!(guarded(), expected, "case {number}");
            // A page that no fill has come across is missing as before.
            if !filled.contains(&guard) {
                memory.advise(guard, 1, MADV_GUARD_REMOVE).unwrap();
                assert_eq!(guarded(), Seen::Byte(byte(guard)), "case {number}");
            }
        }
    });
}
