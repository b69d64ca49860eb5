//! Memory of this very process, which fills itself.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use userfaultfd::pager::{Pager, Problem, RetryPolicy};
use userfaultfd::{Errno, LazyMemory, page_size};

use crate::board::{Act, Slot};
use crate::content::{Content, WORD};
use crate::keeper::Common;
use crate::random::Random;
use crate::{limited, storms};

/// Makes memory, reads it from several threads, writes it, fills it, drops it; as long as `goes_on` says.
pub(crate) fn work(
    slot: &Slot,
    common: &Arc<Common>,
    random: &mut Random,
    kernel: bool,
    goes_on: &dyn Fn() -> bool,
) -> Result<(), String> {
    let noted = Arc::clone(common);
    let note = move |problem: &Problem| match problem {
        Problem::Stuck { errno: Errno::EAGAIN, .. } => {
            noted.expected.put_off.fetch_add(1, Ordering::Relaxed);
        }
        other => noted.findings.add(format!("LazyMemory: a pager says: {other:?}")),
    };
    let retry = RetryPolicy { attempts: 8, delay: std::time::Duration::from_micros(200) };
    let shared = Pager::builder().threads(1 + random.below(4)).retry(retry).on_problem(note.clone()).build();
    let shared = Arc::new(shared.map_err(|error| format!("a pager: {error}"))?);
    while goes_on() {
        if random.one_in(16) {
            storms::strike(slot, &shared, random, kernel)?;
            continue;
        }
        if random.one_in(4) {
            limited::work(slot, common, random)?;
            continue;
        }
        slot.begin(Act::Lazy, 0);
        let (page, pages) = (page_size(), 1 + random.below(300));
        let words = pages * page / WORD - random.below(page / WORD);
        let content = Content { key: random.next(), page: page / WORD, words, has_bad: false };
        let source = content.source(random.below(4), pages).map_err(|error| error.to_string())?;
        let builder = LazyMemory::builder(source).len(words * WORD).block(page * [1, 3, 16][random.below(3)]);
        let is_shared = random.one_in(2);
        let builder = match is_shared {
            true => builder.pager(&shared),
            false => builder.threads(1 + random.below(8)).retry(retry).on_problem(note.clone()),
        };
        let mut memory = builder.build().map_err(|error| format!("LazyMemory: {error:?}"))?;
        use_memory(&mut memory, &content, random)?;
        if !is_shared {
            let mut statistics = memory.statistics();
            (statistics.missing_pages, statistics.present_pages) = (0, 0);
            common.statistics.lock().unwrap_or_else(std::sync::PoisonError::into_inner).merge(&statistics);
        }
        drop(memory);
        slot.end(Act::Lazy);
    }
    let statistics = shared.statistics();
    common.statistics.lock().unwrap_or_else(std::sync::PoisonError::into_inner).merge(&statistics);
    Ok(())
}

fn use_memory(memory: &mut LazyMemory, content: &Content, random: &mut Random) -> Result<(), String> {
    let words = content.words;
    let read = |memory: &[u8], at: usize| {
        let bytes: [u8; WORD] = memory[at * WORD..][..WORD].try_into().expect("a word");
        u32::from_ne_bytes(bytes)
    };
    let is_right = |memory: &[u8], at: usize, written: Option<usize>| {
        let (page, word, value) = (at / content.page, at % content.page, read(memory, at));
        let right =
            if written == Some(at) { content.written(page, word, 7) } else { content.loaded(page, word) };
        let told = || format!("LazyMemory has {value:#x} instead of {right:#x} in word {at} of {words}");
        if value == right { Ok(()) } else { Err(told()) }
    };
    let shared = &*memory;
    let seeds: Vec<u64> = (0..1 + random.below(4)).map(|_| random.next()).collect();
    thread::scope(|scope| {
        let readers: Vec<_> = seeds
            .iter()
            .map(|seed| {
                scope.spawn(move || {
                    let mut random = Random::new(&[*seed]);
                    (0..200).try_for_each(|_| is_right(shared, random.below(words), None))
                })
            })
            .collect();
        readers.into_iter().try_for_each(|reader| {
            reader.join().unwrap_or_else(|_| Err("a reader of LazyMemory panicked".to_owned()))
        })
    })?;
    let at = random.below(words);
    memory[at * WORD..][..WORD]
        .copy_from_slice(&content.written(at / content.page, at % content.page, 7).to_ne_bytes());
    if random.one_in(2) {
        memory.fill(|_| {}).map_err(|error| format!("filling LazyMemory: {error:?}"))?;
    }
    if random.one_in(4) {
        (0..words).try_for_each(|word| is_right(memory, word, Some(at)))?;
    }
    is_right(memory, at, Some(at))
}
