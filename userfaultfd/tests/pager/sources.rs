//! Sources that are slow, fail, panic, or have too little.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use userfaultfd::pager::{
    FaultAround, FileSource, MappedFileSource, PageData, PageSource, Pager, RetryPolicy, SourceBytes,
};
use userfaultfd::{FeatureFlags, LazyMemory, UffdBuilder};

use crate::reader::{Reader, Seen, tell_signals};
use crate::scene::{Pages, Problems, can_poison, content, eventually, region, see, serve};
use crate::support::gate::Gate;
use crate::support::mapping::memfd;
use crate::support::memory::{Kind, Memory};
use crate::support::proc::wait_until;
use crate::support::{child, page, require, test_name, uffd};

/// A source that answers [`Pages`] where nothing else is wanted.
struct Bad {
    /// The page that fails, and how often.
    page: usize,
    times: usize,
    asked: AtomicUsize,
    panics: bool,
}

impl Bad {
    fn new(page: usize, times: usize) -> Arc<Self> {
        Arc::new(Self { page, times, asked: AtomicUsize::new(0), panics: false })
    }

    fn that_panics(page: usize, times: usize) -> Arc<Self> {
        Arc::new(Self { page, times, asked: AtomicUsize::new(0), panics: true })
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

impl PageSource for Bad {
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<PageData> {
        let first = offset as usize / page();
        if (first..first + bytes.len() / page()).contains(&self.page) {
            let before = self.asked.fetch_add(1, Ordering::SeqCst);
            if before < self.times {
                // Half done, and to be seen by nobody.
                bytes.fill(0xee);
                assert!(!self.panics, "page {} is bad", self.page);
                return Err(io::Error::other(format!("page {} is bad", self.page)));
            }
        }
        Pages::new(page()).read(offset, bytes)
    }
}

const SOON: RetryPolicy = RetryPolicy { attempts: 3, delay: Duration::from_millis(1) };

fn pager(problems: &Problems, retry: RetryPolicy) -> Pager {
    Pager::builder().retry(retry).on_problem(problems.callback()).build().unwrap()
}

#[test]
fn recovering_source_is_retried_until_it_delivers() {
    require!();
    for around in [FaultAround::Page, FaultAround::Block(4 * page())] {
        for source in [Bad::new(1, 2), Bad::that_panics(1, 2)] {
            let (memory, problems) = (Memory::anonymous(4), Problems::default());
            let pager = pager(&problems, SOON);
            let region = region(&memory, Arc::clone(&source)).fault_around(around);
            serve(&pager, uffd(FeatureFlags::empty()), region);
            assert_eq!(see(&memory, 1), content(1));
            assert_eq!((source.asked(), pager.statistics().source_errors), (3, 2));
            // Its neighbours don't suffer.
            assert_eq!([see(&memory, 0), see(&memory, 2)], [content(0), content(2)]);
            assert_eq!(problems.all(), [""; 0]);
        }
    }
}

#[test]
fn source_that_fails_for_ever_poisons_its_page_alone() {
    require!();
    tell_signals();
    for kind in Kind::SMALL {
        for around in [FaultAround::Page, FaultAround::Block(4 * page())] {
            for source in [Bad::new(1, usize::MAX), Bad::that_panics(1, usize::MAX)] {
                let Some(memory) = crate::scene::memory(test_name!(), kind, 4) else { continue };
                let problems = Problems::default();
                let pager = pager(&problems, SOON);
                let region = region(&memory, Arc::clone(&source)).fault_around(around);
                let added = serve(&pager, uffd(FeatureFlags::empty()), region);
                let reader = Reader::of(memory.at(1).addr());
                if can_poison() {
                    assert_eq!(reader.wait(), Seen::POISON);
                    // Known to be bad, it isn't asked for again.
                    assert_eq!(see(&memory, 1), Seen::POISON);
                    wait_until(|| problems.count("Poisoned") == 1);
                    eventually(|| pager.statistics().poisoned, 1);
                    assert_eq!(source.asked(), 3);
                } else {
                    wait_until(|| problems.count("Unresolved") == 1);
                    assert!(!reader.has_seen());
                }
                eventually(|| problems.count("Source"), 1);
                for page in [0, 2, 3] {
                    assert_eq!(see(&memory, page), content(page));
                }
                let missing = || pager.missing(added.regions[0]).unwrap().len();
                eventually(missing, usize::from(!can_poison()));
                if !can_poison() {
                    // The reader goes on waiting. It isn't to find other memory there.
                    std::mem::forget(memory);
                }
            }
        }
    }
}

#[test]
fn source_is_retried_forever_without_poison() {
    require!();
    if can_poison() {
        // Poison is for good, until the page is removed.
        let memory = Memory::anonymous(1);
        let pager = pager(&Problems::default(), RetryPolicy { attempts: 1, ..SOON });
        serve(&pager, uffd(FeatureFlags::EVENT_REMOVE), region(&memory, Bad::new(0, 1)));
        tell_signals();
        assert_eq!(see(&memory, 0), Seen::POISON);
        assert_eq!(see(&memory, 0), Seen::POISON);
        memory.advise(0, 1, libc::MADV_DONTNEED).unwrap();
        assert_eq!(see(&memory, 0), Seen::ZERO);
        return;
    }
    let memory = Memory::anonymous(1);
    let pager = pager(&Problems::default(), RetryPolicy { attempts: 1, ..SOON });
    serve(&pager, uffd(FeatureFlags::empty()), region(&memory, Bad::new(0, 3)));
    assert_eq!(see(&memory, 0), content(0));
}

#[test]
fn failing_source_does_not_block_the_end() {
    require!();
    child::run_well(test_name!(), || {
        tell_signals();
        let for_ever = RetryPolicy { attempts: u32::MAX, delay: Duration::from_secs(3600) };
        for end in 0..3 {
            let memory = Memory::anonymous(4);
            let pager = pager(&Problems::default(), for_ever);
            let source = Bad::new(1, usize::MAX);
            let added = serve(&pager, uffd(FeatureFlags::empty()), region(&memory, Arc::clone(&source)));
            let reader = Reader::of(memory.at(1).addr());
            // It is put off, for an hour.
            wait_until(|| pager.statistics().source_errors == 1);
            assert_eq!(see(&memory, 0), content(0));
            match end {
                0 => drop(pager),
                1 => match pager.remove_region(added.regions[0]) {
                    Ok(()) => assert!(can_poison()),
                    Err(userfaultfd::pager::Error::Unfilled { .. }) => assert!(!can_poison()),
                    Err(error) => panic!("{error}"),
                },
                _ => {
                    let mut detached = pager.detach();
                    let next = Pager::new().unwrap();
                    serve(&next, detached.remove(0).uffd, region(&memory, Pages::new(page())));
                    assert_eq!((reader.wait(), see(&memory, 3)), (content(1), content(3)));
                    continue;
                }
            }
            if can_poison() {
                assert_eq!(reader.wait(), Seen::POISON);
                assert_eq!(see(&memory, 2), Seen::POISON);
            }
            assert_eq!(see(&memory, 0), content(0));
            // Before Linux 6.6 the reader waits for ever.
            std::mem::forget(memory);
        }
    });
}

#[test]
fn page_removed_while_source_is_down_is_zero() {
    require!(FeatureFlags::EVENT_REMOVE);
    let memory = Memory::anonymous(2);
    let retry = RetryPolicy { attempts: 1000, delay: Duration::from_millis(2) };
    let pager = pager(&Problems::default(), retry);
    serve(&pager, uffd(FeatureFlags::EVENT_REMOVE), region(&memory, Bad::new(1, usize::MAX)));
    let reader = Reader::of(memory.at(1).addr());
    wait_until(|| pager.statistics().source_errors > 0);
    memory.advise(1, 1, libc::MADV_DONTNEED).unwrap();
    assert_eq!(reader.wait(), Seen::ZERO);
}

/// A page that waits for a source that isn't asked again for a minute, with its reader.
fn waiting_for_long(features: FeatureFlags) -> (Memory, Pager, Reader) {
    let memory = Memory::anonymous(2);
    let retry = RetryPolicy { attempts: 1000, delay: Duration::from_secs(60) };
    let pager = pager(&Problems::default(), retry);
    serve(&pager, uffd(features), region(&memory, Bad::new(1, usize::MAX)));
    let reader = Reader::of(memory.at(1).addr());
    wait_until(|| pager.statistics().source_errors > 0);
    (memory, pager, reader)
}

#[test]
fn page_unmapped_while_source_is_down_is_gone() {
    require!(FeatureFlags::EVENT_UNMAP);
    child::run_well(test_name!(), || {
        tell_signals();
        let (memory, _pager, reader) = waiting_for_long(FeatureFlags::EVENT_UNMAP);
        memory.unmap(1, 1);
        assert_eq!(reader.wait(), Seen::Signal(libc::SIGSEGV));
    });
}

#[test]
fn page_moved_while_source_is_down_leaves_zeros() {
    require!(FeatureFlags::EVENT_REMAP);
    child::run_well(test_name!(), || {
        let (memory, _pager, reader) = waiting_for_long(FeatureFlags::EVENT_REMAP);
        let target = Memory::anonymous(1);
        memory.move_over(1, 1, &target, libc::MREMAP_DONTUNMAP);
        assert_eq!(reader.wait(), Seen::ZERO);
    });
}

#[test]
fn shortened_file_is_poison_and_not_zeros() {
    require!();
    tell_signals();
    if !can_poison() {
        return;
    }
    for mapped in [false, true] {
        let (memory, problems) = (Memory::anonymous(3), Problems::default());
        let mut file = File::from(memfd(0, 0));
        file.write_all(&vec![7; 3 * page()]).unwrap();
        let other = file.try_clone().unwrap();
        let source: Arc<dyn PageSource> = match mapped {
            false => Arc::new(FileSource::new(file).unwrap()),
            true => Arc::new(MappedFileSource::new(file).unwrap()),
        };
        let pager = pager(&problems, SOON);
        serve(&pager, uffd(FeatureFlags::empty()), region(&memory, source));
        assert_eq!(see(&memory, 0), Seen::Byte(7));
        other.set_len(page() as u64).unwrap();
        assert_eq!(see(&memory, 2), Seen::POISON);
        wait_until(|| problems.count("Source") == 1);
        assert!(problems.all()[0].contains("UnexpectedEof"), "{:?}", problems.all());
    }
}

#[test]
fn unreadable_bytes_are_read_instead() {
    require!();
    tell_signals();
    /// Counts calls of `bytes` and of `read`.
    struct Broken(Mutex<[usize; 2]>, memmap2::MmapMut);
    impl PageSource for Broken {
        fn read(&self, _: u64, _: &mut [u8]) -> io::Result<PageData> {
            self.0.lock().unwrap()[1] += 1;
            Err(io::Error::other("no content"))
        }

        fn bytes(&self, _: u64, len: usize) -> Option<SourceBytes<'_>> {
            self.0.lock().unwrap()[0] += 1;
            Some(SourceBytes::from(&self.1[..len]))
        }
    }
    // A mapping beyond the end of its file: the kernel can't read it either.
    let file = File::from(memfd(0, 1));
    // SAFETY: nobody reads it but the kernel, which says that it can't.
    let mapping = unsafe { memmap2::MmapOptions::new().len(page()).map_mut(&file) }.unwrap();
    file.set_len(0).unwrap();
    let (memory, problems) = (Memory::anonymous(1), Problems::default());
    let source = Arc::new(Broken(Mutex::default(), mapping));
    let pager = pager(&problems, SOON);
    serve(&pager, uffd(FeatureFlags::empty()), region(&memory, Arc::clone(&source)));
    let reader = Reader::of(memory.at(0).addr());
    wait_until(|| problems.count("Source") == 1);
    assert_eq!(*source.0.lock().unwrap(), [1, 3]);
    if can_poison() {
        assert_eq!(reader.wait(), Seen::POISON);
    }
}

#[test]
fn slow_report_delays_only_its_waiters() {
    require!();
    let gate = Gate::default();
    let source = {
        let gate = gate.clone();
        move |offset: u64, bytes: &mut [u8]| {
            if offset == 0 {
                gate.pass();
            }
            Pages::new(page()).read(offset, bytes)
        }
    };
    let memory = Memory::anonymous(20);
    let pager = Pager::builder().threads(2).build().unwrap();
    let features = FeatureFlags::EVENT_REMOVE;
    serve(&pager, UffdBuilder::new().require_features(features).create().unwrap(), region(&memory, source));
    let slow = Reader::of(memory.at(0).addr());
    gate.wait_for_arrival();
    let joined = Reader::of(memory.at(0).addr());
    wait_until(|| pager.statistics().duplicates == 1);
    for page in 1..20 {
        assert_eq!(see(&memory, page), content(page));
        // Changes come through, too.
        memory.advise(page, 1, libc::MADV_DONTNEED).unwrap();
        assert_eq!(see(&memory, page), Seen::ZERO);
    }
    assert!(!slow.has_seen() && !joined.has_seen());
    gate.open();
    assert_eq!([slow.wait(), joined.wait()], [content(0); 2]);
}

#[test]
fn callback_that_panics_is_called_again() {
    require!();
    if !can_poison() {
        return;
    }
    tell_signals();
    let (memory, problems) = (Memory::anonymous(2), Problems::default());
    let tell = problems.callback();
    let pager = Pager::builder().retry(RetryPolicy { attempts: 1, ..SOON });
    let pager = pager.on_problem(move |problem| {
        tell(problem);
        panic!("a callback that panics, as the test wants it");
    });
    let pager = pager.build().unwrap();
    let bad = |_: u64, _: &mut [u8]| Err(io::ErrorKind::NotFound.into());
    serve(&pager, uffd(FeatureFlags::empty()), region(&memory, bad));
    assert_eq!([see(&memory, 0), see(&memory, 1)], [Seen::POISON; 2]);
    wait_until(|| problems.count("Source") == 2 && problems.count("Poisoned") == 2);
}

/// A source that ends inside a page, and says nothing of what comes behind its end.
struct Short;

impl PageSource for Short {
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<PageData> {
        let rest = (page() + 100).saturating_sub(offset as usize).min(bytes.len());
        bytes[..rest].fill(7);
        Ok(PageData::Data)
    }

    fn len(&self) -> Option<u64> {
        Some(page() as u64 + 100)
    }
}

#[test]
fn last_page_is_zero_behind_end_of_source() {
    require!();
    for around in [1, 2] {
        let (memory, pager) = (Memory::anonymous(2), Pager::new().unwrap());
        let region = region(&memory, Short).fault_around(FaultAround::Block(around * page()));
        serve(&pager, uffd(FeatureFlags::empty()), region);
        // The first page leaves its content in the pager's buffer.
        assert!(memory.content(0).iter().all(|byte| *byte == 7));
        let last = memory.content(1);
        assert!(last[..100].iter().all(|byte| *byte == 7) && last[100..].iter().all(|byte| *byte == 0));
    }
}

/// A system call holds locks of a file while it touches memory whose source is the same file: that of the offset, which
/// all duplicates share, and those of the content.
#[test]
fn system_calls_on_own_file_return() {
    require!(root);
    let on_disk = || {
        let path = std::env::current_exe().unwrap().with_extension(format!("{}.own", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    };
    let in_memory = || File::from(memfd(0, 0));
    let new: [&dyn Fn() -> File; 2] = [&on_disk, &in_memory];
    for (new, is_mapped, is_sparse) in new
        .iter()
        .flat_map(|new| [false, true].map(|mapped| [false, true].map(|sparse| (new, mapped, sparse))))
        .flatten()
    {
        let mut file = new();
        file.write_all(&vec![7; 64 * page()]).unwrap();
        if is_sparse {
            file.set_len(1 << 24).unwrap();
        }
        file.rewind().unwrap();
        let same = file.try_clone().unwrap();
        let source: Arc<dyn PageSource> = if is_mapped {
            Arc::new(MappedFileSource::new(same).unwrap())
        } else {
            Arc::new(FileSource::new(same).unwrap())
        };
        let mut memory = LazyMemory::builder(source).fault_around(FaultAround::Page).build().unwrap();
        file.read_exact(&mut memory[..2 * page()]).unwrap();
        file.write_all(&memory[8 * page()..10 * page()]).unwrap();
        file.write_all_at(&memory[16 * page()..18 * page()], 32 * page() as u64).unwrap();
        assert!(memory[..20 * page()].iter().all(|byte| *byte == 7), "{is_mapped} {is_sparse}");
        assert_eq!(file.stream_position().unwrap(), 4 * page() as u64);
    }
}
