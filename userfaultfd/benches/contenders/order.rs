//! Which pages are touched, and what is found there. Nothing of the library is used here: the program with
//! userfaultfd 0.9 is compiled with this file, too.

/// Faults in a round.
pub(crate) const FAULTS: usize = 64;

/// Rounds until a contender has no missing pages left.
pub(crate) const ROUNDS: usize = 16;

/// Pages of a contender's memory.
pub(crate) const PAGES: usize = FAULTS * ROUNDS;

/// The first byte of a page. No page is like one of its neighbours, or zero.
pub(crate) fn first_byte(page: usize) -> u8 {
    (page % 251) as u8 + 1
}

/// The numbers below `count`, in an order without a pattern that is the same each time.
pub(crate) fn shuffled(count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..u32::try_from(count).expect("not so many pages")).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for last in (1..count).rev() {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(last, (state % (last as u64 + 1)) as usize);
    }
    order
}
