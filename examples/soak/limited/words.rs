//! What memory with a limit must hold, while several threads write it.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::content::{Content, WORD};
use crate::random::{Random, mix};

/// Words of each page that are written.
const WRITTEN: u64 = 6;

/// Memory as words, and which generation each page has. A page is written by one thread, and read by all.
pub(super) struct Words {
    start: usize,
    content: Content,
    /// The generation that is being written, or was last.
    begun: Vec<AtomicU32>,
    /// The last one that was written whole.
    done: Vec<AtomicU32>,
}

impl Words {
    /// For memory that outlives the value, and in which nothing but it accesses what is written.
    pub(super) fn new(memory: *mut [u8], content: Content) -> Self {
        let generations = || (0..content.words.div_ceil(content.page)).map(|_| AtomicU32::new(0)).collect();
        let start = memory.cast::<u8>().expose_provenance();
        Self { start, content, begun: generations(), done: generations() }
    }

    pub(super) fn pages(&self) -> usize {
        self.begun.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.content.words * WORD
    }

    /// The last generation of each page.
    pub(super) fn done(&self) -> Vec<u32> {
        self.done.iter().map(|done| done.load(Ordering::SeqCst)).collect()
    }

    /// The words of a page that are written.
    fn written(&self, page: usize) -> [usize; WRITTEN as usize] {
        let word = |index: u64| mix(self.content.key ^ mix(page as u64) ^ mix(index)) as usize;
        std::array::from_fn(|index| word(index as u64) % self.content.page)
    }

    fn is_there(&self, page: usize, word: usize) -> bool {
        page * self.content.page + word < self.content.words
    }

    fn cell(&self, page: usize, word: usize) -> &AtomicU32 {
        assert!(self.is_there(page, word), "word {word} of page {page}");
        let at = self.start + (page * self.content.page + word) * WORD;
        // SAFETY: a word within the memory, which outlives this value; nothing but atomics accesses it meanwhile.
        unsafe { &*std::ptr::with_exposed_provenance(at) }
    }

    /// What a word is in a generation of its page.
    fn right(&self, page: usize, word: usize, generation: u32) -> u32 {
        match generation {
            0 => self.content.loaded(page, word),
            _ if self.written(page).contains(&word) => self.content.written(page, word, generation),
            _ => self.content.loaded(page, word),
        }
    }

    /// Writes a page. One thread may at a time.
    pub(super) fn write(&self, page: usize) {
        let generation = self.begun[page].load(Ordering::SeqCst) + 1;
        self.begun[page].store(generation, Ordering::SeqCst);
        for word in self.written(page).into_iter().filter(|word| self.is_there(page, *word)) {
            self.cell(page, word).store(self.content.written(page, word, generation), Ordering::SeqCst);
        }
        self.done[page].store(generation, Ordering::SeqCst);
    }

    /// Reads a word of a page that may be written meanwhile.
    pub(super) fn check_one(&self, page: usize, random: &mut Random) -> Result<(), String> {
        let word = match random.below(2 * WRITTEN as usize) {
            index if index < WRITTEN as usize => self.written(page)[index],
            _ => random.below(self.content.page),
        };
        if !self.is_there(page, word) {
            return Ok(());
        }
        let least = self.done[page].load(Ordering::SeqCst);
        let value = self.cell(page, word).load(Ordering::SeqCst);
        let most = self.begun[page].load(Ordering::SeqCst);
        self.check_value("memory", (page, word), value, least, most)
    }

    fn check_value(
        &self,
        what: &str,
        (page, word): (usize, usize),
        value: u32,
        least: u32,
        most: u32,
    ) -> Result<(), String> {
        if (least..=most).any(|generation| value == self.right(page, word, generation)) {
            return Ok(());
        }
        let known = (0..=most).find(|generation| value == self.right(page, word, *generation));
        Err(format!(
            "{what} has {value:#x} in word {word} of page {page} of {}, which is generation {known:?}, and should be of \
             {least}..={most}",
            self.pages()
        ))
    }

    /// Every word of all pages, which no thread writes.
    pub(super) fn check_all(&self) -> Result<(), String> {
        let done = self.done();
        self.each(|page, word| {
            let value = self.cell(page, word).load(Ordering::SeqCst);
            self.check_value("memory", (page, word), value, done[page], done[page])
        })
    }

    fn each(&self, check: impl Fn(usize, usize) -> Result<(), String>) -> Result<(), String> {
        let words = |page: usize| (0..self.content.page).filter(move |word| self.is_there(page, *word));
        (0..self.pages()).try_for_each(|page| words(page).try_for_each(|word| check(page, word)))
    }

    /// The image of a store has these generations.
    pub(super) fn check_image(&self, image: &[u8], generations: &[u32]) -> Result<(), String> {
        self.each(|page, word| {
            let (value, right) = (self.word_of(image, page, word), generations[page]);
            self.check_value("the store", (page, word), value, right, right)
        })
    }

    /// The image of a store has these generations at least, where they are given. Looks at the words that are written.
    pub(super) fn check_flushed(
        &self,
        image: &[u8],
        least: impl Iterator<Item = Option<u32>>,
    ) -> Result<(), String> {
        for (page, least) in least.enumerate().filter_map(|(page, least)| Some((page, least?))) {
            let most = self.begun[page].load(Ordering::SeqCst);
            for word in self.written(page).into_iter().filter(|word| self.is_there(page, *word)) {
                let value = self.word_of(image, page, word);
                self.check_value("the store", (page, word), value, least, most)?;
            }
        }
        Ok(())
    }

    fn word_of(&self, image: &[u8], page: usize, word: usize) -> u32 {
        let bytes = &image[(page * self.content.page + word) * WORD..][..WORD];
        u32::from_ne_bytes(bytes.try_into().expect("a word"))
    }
}
