//! Random operations, against a vector.

use userfaultfd::ResetMethod;

use crate::support::random::Random;
use crate::support::{page, require, test_name};
use crate::{advise, methods, pristine};

const PAGES: usize = 96;

#[test]
fn random_operations_end_as_in_a_vector() {
    require!();
    for method in methods(test_name!()) {
        for seed in 0..12 {
            run(method, seed);
        }
    }
}

fn run(method: ResetMethod, seed: u64) {
    let mut random = Random::new(seed);
    let mut image: Vec<u8> = (0..PAGES * page()).map(|_| random.next() as u8).collect();
    // Some pages of zeros.
    image.chunks_mut(page()).filter(|_| random.one_in(4)).for_each(|page| page.fill(0));
    let mut memory = pristine(&image, method);
    let mut expected = image.clone();
    for step in 0..400 {
        let first = random.below(PAGES);
        let pages = first..(first + 1 + random.below(24)).min(PAGES);
        let bytes = pages.start * page()..pages.end * page();
        match random.below(12) {
            0..=4 => {
                let at = random.below(image.len());
                let end = (at + 1 + random.below(3 * page())).min(image.len());
                let byte = random.next() as u8;
                memory[at..end].fill(byte);
                expected[at..end].fill(byte);
            }
            // The same page again and again.
            5 => (memory[7], expected[7]) = (step as u8, step as u8),
            6 => {
                advise(&memory, pages, libc::MADV_DONTNEED);
                expected[bytes.clone()].copy_from_slice(&image[bytes]);
            }
            7 => assert!(memory[bytes.clone()] == expected[bytes], "{method:?} {seed} {step}"),
            8 => {
                let start = memory.as_ptr().wrapping_add(bytes.start).cast_mut().cast();
                // SAFETY: nothing accesses the pages before the reset.
                assert_eq!(unsafe { libc::mprotect(start, bytes.len(), libc::PROT_NONE) }, 0);
                memory.reset().unwrap();
                expected.copy_from_slice(&image);
            }
            9 => {
                memory.release().unwrap();
                expected.copy_from_slice(&image);
            }
            _ => {
                memory.reset().unwrap();
                expected.copy_from_slice(&image);
                assert!(memory[..] == expected, "{method:?} {seed} {step}");
            }
        }
    }
    assert!(memory[..] == expected, "{method:?} {seed}");
}
