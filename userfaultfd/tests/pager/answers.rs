//! Sources that answer later, and from where: while other things happen, in other threads, twice as wrong, or never.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use userfaultfd::pager::{
    AsyncPageSource, AsyncSource, Completion, FaultAround, Loaded, PageBuffer, PageData, PageSource, Pager,
    RetryPolicy, ThreadedSource,
};
use userfaultfd::{FeatureFlags, LazyMemory};

use crate::reader::{Reader, Seen, tell_signals};
use crate::scene::{Pages, Problems, check, content, eventually, fill, region, see, serve};
use crate::support::memory::Memory;
use crate::support::proc::wait_until;
use crate::support::{child, may_watch_forks, page, require, test_name, uffd};

/// A load that was started.
struct Started {
    offset: u64,
    buffer: PageBuffer,
    done: Completion,
    is_early: bool,
}

impl Started {
    fn page(&self) -> usize {
        self.offset as usize / page()
    }

    /// Answers with what belongs there.
    fn answer(mut self) {
        for (at, bytes) in self.buffer.chunks_mut(page()).enumerate() {
            fill(self.offset as usize / page() + at, bytes);
        }
        self.done.complete(Ok(Loaded::Data(self.buffer)));
    }
}

/// A source whose loads wait for the test.
#[derive(Clone, Default)]
struct Held(Arc<(Mutex<VecDeque<Started>>, Condvar)>);

impl Held {
    fn next(&self) -> Started {
        let (loads, changed) = &*self.0;
        let mut loads = changed.wait_while(loads.lock().unwrap(), |loads| loads.is_empty()).unwrap();
        loads.pop_front().unwrap()
    }

    fn is_empty(&self) -> bool {
        self.0.0.lock().unwrap().is_empty()
    }

    fn put(&self, started: Started) {
        let (loads, changed) = &*self.0;
        loads.lock().unwrap().push_back(started);
        changed.notify_all();
    }
}

impl AsyncPageSource for Held {
    fn start(&self, offset: u64, buffer: PageBuffer, done: Completion) {
        self.put(Started { offset, buffer, done, is_early: false });
    }

    fn start_early(&self, offset: u64, buffer: PageBuffer, done: Completion) {
        self.put(Started { offset, buffer, done, is_early: true });
    }
}

/// A source made of a closure that starts loads, and of nothing else.
struct Starts<F>(F);

impl<F: Fn(Started) + Send + Sync> AsyncPageSource for Starts<F> {
    fn start(&self, offset: u64, buffer: PageBuffer, done: Completion) {
        (self.0)(Started { offset, buffer, done, is_early: false });
    }
}

/// A source for which the closure also gets the number of loads before.
fn counted(start: impl Fn(usize, Started) + Send + Sync) -> impl AsyncPageSource {
    let count = AtomicUsize::new(0);
    Starts(move |started| start(count.fetch_add(1, Ordering::SeqCst), started))
}

const SOON: RetryPolicy = RetryPolicy { attempts: 3, delay: Duration::from_millis(1) };

fn pager(problems: &Problems) -> Pager {
    Pager::builder().retry(SOON).on_problem(problems.callback()).build().unwrap()
}

/// The names of this process's threads that are a pager's.
fn threads_of_pagers() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let name = |task: io::Result<fs::DirEntry>| fs::read_to_string(task.ok()?.path().join("comm")).ok();
    tasks.filter_map(name).filter(|name| name.starts_with("uffd-")).collect()
}

#[test]
fn thousand_loads_are_in_flight_with_four_threads() {
    require!();
    const LOADS: usize = 1000;
    child::run_well(test_name!(), || {
        let (memory, source, problems) = (Memory::anonymous(LOADS), Held::default(), Problems::default());
        // Where `start` itself is kept from running, as on a busy machine, workers are added.
        let pager = Pager::builder().max_threads(2).on_problem(problems.callback()).build().unwrap();
        serve(&pager, uffd(FeatureFlags::empty()), region(&memory, AsyncSource::new(source.clone())));
        let start = memory.start().expose_provenance();
        let readers: Vec<_> = (0..LOADS)
            .map(|at| {
                let read = move || {
                    let address: *const u8 = std::ptr::with_exposed_provenance(start + at * page());
                    // SAFETY: it is mapped as long as the test runs, and only raw pointers lead to it.
                    unsafe { address.read_volatile() }
                };
                thread::Builder::new().stack_size(64 << 10).spawn(read).unwrap()
            })
            .collect();
        let mut loads: Vec<_> = (0..LOADS).map(|_| source.next()).collect();
        let threads = threads_of_pagers();
        assert!(threads.len() <= 4, "{threads:?}");
        loads.sort_by_key(Started::page);
        assert!(loads.iter().map(Started::page).eq(0..LOADS), "each page once");
        // In no order that it could rely on.
        let (odd, even): (Vec<_>, Vec<_>) = loads.into_iter().partition(|load| load.page() % 2 == 1);
        even.into_iter().rev().chain(odd).for_each(Started::answer);
        for (at, reader) in readers.into_iter().enumerate() {
            assert_eq!(Seen::Byte(reader.join().unwrap()), content(at));
        }
        (0..LOADS).for_each(|at| check(&memory, at, at));
        let statistics = pager.statistics();
        assert_eq!((statistics.source_reads, statistics.source_errors), (LOADS as u64, 0));
        assert_eq!(statistics.source_latency.count(), LOADS as u64);
        assert_eq!(problems.all(), [""; 0]);
    });
}

#[test]
fn load_may_be_answered_inside_start_and_with_zeros() {
    require!();
    let (memory, problems) = (Memory::anonymous(4), Problems::default());
    let pager = pager(&problems);
    let source = counted(|_, started| match started.page() {
        2 => started.done.complete(Ok(Loaded::Zero)),
        _ => started.answer(),
    });
    serve(&pager, uffd(FeatureFlags::empty()), region(&memory, AsyncSource::new(source)));
    for at in [3, 2, 0, 1] {
        assert_eq!(see(&memory, at), if at == 2 { Seen::ZERO } else { content(at) });
    }
    // A thread goes on before its page is counted.
    eventually(|| (pager.statistics().zero_fills, pager.statistics().fills), (1, 3));
    assert_eq!(problems.all(), [""; 0]);
}

#[test]
fn failed_dropped_and_panicking_loads_are_retried() {
    require!();
    let fails: [fn(Started); 4] = [
        |started| started.done.complete(Err(io::ErrorKind::TimedOut.into())),
        |started| drop(started),
        |started| {
            // It has content, and no right to answer any more.
            drop(started.done);
        },
        |_| panic!("on purpose"),
    ];
    for fail in fails {
        let (memory, problems) = (Memory::anonymous(2), Problems::default());
        let pager = pager(&problems);
        let source = counted(move |count, started| if count < 2 { fail(started) } else { started.answer() });
        serve(&pager, uffd(FeatureFlags::empty()), region(&memory, AsyncSource::new(source)));
        assert_eq!(see(&memory, 1), content(1));
        assert_eq!((pager.statistics().source_errors, pager.statistics().source_reads), (2, 3));
        assert_eq!(problems.all(), [""; 0]);
    }
}

#[test]
fn load_that_keeps_failing_ends_in_poison_and_report() {
    require!(FeatureFlags::POISON);
    child::run_well(test_name!(), || {
        tell_signals();
        let (memory, problems) = (Memory::anonymous(2), Problems::default());
        let pager = pager(&problems);
        serve(&pager, uffd(FeatureFlags::empty()), region(&memory, AsyncSource::new(counted(|_, _| {}))));
        assert_eq!(see(&memory, 1), Seen::POISON);
        eventually(|| (problems.count("Source"), problems.count("Poisoned")), (1, 1));
        let told = problems.all().join("");
        assert!(
            told.contains("dropped the load without an answer") && told.contains("attempts: 3"),
            "{told}"
        );
    });
}

#[test]
fn late_answer_after_panic_in_start_changes_nothing() {
    require!();
    let (memory, problems) = (Memory::anonymous(1), Problems::default());
    let pager = pager(&problems);
    let kept = Arc::new(Mutex::new(None));
    let keeps = Arc::clone(&kept);
    let held = Held::default();
    let then = held.clone();
    let source = counted(move |count, started| {
        if count == 0 {
            *keeps.lock().unwrap() = Some(started);
            panic!("on purpose");
        }
        then.put(started);
    });
    serve(&pager, uffd(FeatureFlags::empty()), region(&memory, AsyncSource::new(source)));
    let reader = Reader::of(memory.at(0).addr());
    let second = held.next();
    let mut late = kept.lock().unwrap().take().unwrap();
    late.buffer.fill(99);
    late.done.complete(Ok(Loaded::Data(late.buffer)));
    assert!(!reader.has_seen());
    second.answer();
    assert_eq!(reader.wait(), content(0));
    check(&memory, 0, 0);
    eventually(|| (pager.statistics().source_errors, pager.statistics().fills), (1, 1));
}

#[test]
fn buffer_of_another_load_is_an_error() {
    require!();
    let (memory, source, problems) = (Memory::anonymous(2), Held::default(), Problems::default());
    let pager = pager(&problems);
    serve(&pager, uffd(FeatureFlags::empty()), region(&memory, AsyncSource::new(source.clone())));
    let readers = [0, 1].map(|at| Reader::of(memory.at(at).addr()));
    let (one, other) = (source.next(), source.next());
    one.done.complete(Ok(Loaded::Data(other.buffer)));
    other.done.complete(Ok(Loaded::Data(one.buffer)));
    source.next().answer();
    source.next().answer();
    assert_eq!(readers.map(|reader| reader.wait()), [content(0), content(1)]);
    assert_eq!(pager.statistics().source_errors, 2);
}

#[test]
fn dropped_pager_poisons_loads_in_flight() {
    require!(FeatureFlags::POISON);
    child::run_well(test_name!(), || {
        tell_signals();
        let (memory, source, problems) = (Memory::anonymous(3), Held::default(), Problems::default());
        let pager = pager(&problems);
        serve(&pager, uffd(FeatureFlags::empty()), region(&memory, AsyncSource::new(source.clone())));
        let readers = [0, 1].map(|at| Reader::of(memory.at(at).addr()));
        let (one, other) = (source.next(), source.next());
        drop(pager);
        assert_eq!(readers.map(|reader| reader.wait()), [Seen::POISON; 2]);
        one.answer();
        drop(other);
        assert_eq!([0, 1, 2].map(|at| see(&memory, at)), [Seen::POISON; 3]);
    });
}

#[test]
fn removed_region_ends_its_loads_and_others_go_on() {
    require!(FeatureFlags::POISON);
    child::run_well(test_name!(), || {
        tell_signals();
        let (memory, other, source) = (Memory::anonymous(2), Memory::anonymous(1), Held::default());
        let problems = Problems::default();
        let pager = pager(&problems);
        let added =
            serve(&pager, uffd(FeatureFlags::empty()), region(&memory, AsyncSource::new(source.clone())));
        let kept = Held::default();
        let of_other = region(&other, AsyncSource::new(kept.clone()));
        serve(&pager, uffd(FeatureFlags::empty()), of_other);
        let (reader, stays) = (Reader::of(memory.at(1).addr()), Reader::of(other.at(0).addr()));
        let (load, stayed) = (source.next(), kept.next());
        pager.remove_region(added.regions[0]).unwrap();
        assert_eq!(reader.wait(), Seen::POISON);
        load.answer();
        stayed.answer();
        assert_eq!(stays.wait(), content(0));
    });
}

#[test]
fn detached_memory_is_missing_where_loads_were_in_flight() {
    require!();
    let (memory, source, problems) = (Memory::anonymous(3), Held::default(), Problems::default());
    let first = pager(&problems);
    serve(&first, uffd(FeatureFlags::empty()), region(&memory, AsyncSource::new(source.clone())));
    let readers = [0, 2].map(|at| Reader::of(memory.at(at).addr()));
    let loads = [source.next(), source.next()];
    let detached = first.detach().pop().unwrap();
    let missing = detached.missing();
    assert_eq!(missing.iter().map(|part| part.len).sum::<usize>(), memory.len(), "{missing:?}");
    let second = pager(&problems);
    let again = region(&memory, AsyncSource::new(source.clone())).missing(missing);
    serve(&second, detached.uffd, again);
    let now = [source.next(), source.next()];
    // The first pager's, with other bytes.
    for mut late in loads {
        late.buffer.fill(99);
        late.done.complete(Ok(Loaded::Data(late.buffer)));
    }
    assert!(readers.iter().all(|reader| !reader.has_seen()));
    now.into_iter().for_each(Started::answer);
    assert_eq!(readers.map(|reader| reader.wait()), [content(0), content(2)]);
}

#[test]
fn finish_waits_for_loads_in_flight_and_reads_the_rest() {
    require!();
    let (memory, source, problems) = (Memory::anonymous(3), Held::default(), Problems::default());
    let pager = pager(&problems);
    serve(&pager, uffd(FeatureFlags::empty()), region(&memory, AsyncSource::new(source.clone())));
    let reader = Reader::of(memory.at(1).addr());
    let load = source.next();
    let finishing = thread::spawn(move || pager.finish(|_| {}).map(|()| pager));
    // What is before and behind it.
    for at in [0, 2] {
        let next = source.next();
        assert_eq!((next.page(), next.is_early), (at, true));
        next.answer();
    }
    assert!(!finishing.is_finished() && !reader.has_seen());
    load.answer();
    assert_eq!(reader.wait(), content(1));
    drop(finishing.join().unwrap().unwrap());
    (0..3).for_each(|at| check(&memory, at, at));
}

#[test]
fn answers_for_unmapped_and_removed_pages_are_dropped() {
    require!(FeatureFlags::EVENT_UNMAP | FeatureFlags::EVENT_REMOVE);
    child::run_well(test_name!(), || {
        tell_signals();
        let (memory, source, problems) = (Memory::anonymous(4), Held::default(), Problems::default());
        let pager = pager(&problems);
        let events = FeatureFlags::EVENT_UNMAP | FeatureFlags::EVENT_REMOVE;
        serve(&pager, uffd(events), region(&memory, AsyncSource::new(source.clone())));
        let readers = [0, 2].map(|at| Reader::of(memory.at(at).addr()));
        let loads = [source.next(), source.next()];
        // Unmapped, and kept from being anybody else's.
        let (flags, start) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED, memory.at(0));
        // SAFETY: it replaces a page of the test's, to which only raw pointers lead.
        let replaced = unsafe { libc::mmap(start, page(), libc::PROT_NONE, flags, -1, 0) };
        assert_eq!(replaced, start);
        memory.advise(2, 1, libc::MADV_DONTNEED).unwrap();
        loads.into_iter().for_each(Started::answer);
        assert_eq!(readers.map(|reader| reader.wait()), [Seen::Signal(libc::SIGSEGV), Seen::ZERO]);
        eventually(|| pager.statistics().dropped, 2);
        assert!(source.is_empty());
    });
}

#[test]
fn fork_while_loads_are_in_flight_leaves_both_sides_whole() {
    require!(FeatureFlags::EVENT_FORK, root);
    if !may_watch_forks() {
        return;
    }
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(2);
        let pager = Pager::builder().threads(2).max_threads(2).build().unwrap();
        let source = ThreadedSource::new(Pages::new(page()), 2).unwrap();
        serve(&pager, uffd(FeatureFlags::EVENT_FORK), region(&memory, AsyncSource::new(source)));
        for round in 0..20 {
            let reader = Reader::of(memory.at(0).addr());
            child::fork(|| assert_eq!(Seen::Byte(memory.read(1)), content(1), "{round}")).succeed();
            assert_eq!(reader.wait(), content(0));
        }
        assert_eq!(see(&memory, 1), content(1));
    });
}

/// The child has neither the pager's threads nor, perhaps, its locks in a usable state.
#[test]
fn completions_in_forked_child_do_nothing() {
    require!();
    child::run_well(test_name!(), || {
        let (memory, source, problems) = (Memory::anonymous(1), Held::default(), Problems::default());
        let pager = pager(&problems);
        serve(&pager, uffd(FeatureFlags::empty()), region(&memory, AsyncSource::new(source.clone())));
        let reader = Reader::of(memory.at(0).addr());
        let mut load = Some(source.next());
        child::fork(|| load.take().unwrap().answer()).succeed();
        child::fork(|| drop(load.take())).succeed();
        assert!(!reader.has_seen());
        load.take().unwrap().answer();
        assert_eq!(reader.wait(), content(0));
        drop(pager);
    });
}

#[test]
fn read_ahead_is_started_early_and_needs_one_thread() {
    require!();
    const MIB: usize = 1 << 20;
    let source = Held::default();
    let memory = LazyMemory::builder(AsyncSource::new(source.clone()))
        .len(8 * MIB)
        .read_ahead(1, 8 * MIB)
        .fault_around(FaultAround::Block(8 * MIB))
        .build()
        .unwrap();
    let memory = Arc::new(memory);
    let reading = Arc::clone(&memory);
    let reader = thread::spawn(move || reading[0]);
    // All of it is in flight, a MiB each; the fault's comes first.
    let mut loads: Vec<_> = (0..8).map(|_| source.next()).collect();
    assert_eq!(loads.iter().filter(|load| load.is_early).count(), 7);
    let fault = loads.iter().position(|load| !load.is_early).unwrap();
    loads.swap_remove(fault).answer();
    assert_eq!(Seen::Byte(reader.join().unwrap()), content(0));
    // One fails: faults read it again.
    loads.swap_remove(3).done.complete(Err(io::ErrorKind::TimedOut.into()));
    loads.into_iter().for_each(Started::answer);
    // It ends with the test.
    let _answers = thread::spawn(move || {
        loop {
            source.next().answer();
        }
    });
    for at in (0..memory.len()).step_by(page()) {
        assert_eq!(Seen::Byte(memory[at]), content(at / page()));
    }
    assert_eq!(memory.statistics().source_errors, 1);
}

#[test]
fn waiting_read_of_async_source_ends_with_each_answer() {
    require!();
    let read = |source: &dyn PageSource| {
        let mut bytes = vec![0; page()];
        source.read(5 * page() as u64, &mut bytes).map(|data| (data, bytes[0]))
    };
    let answers = AsyncSource::new(Starts(|started: Started| {
        drop(thread::spawn(|| started.answer()));
    }));
    assert_eq!(read(&answers).unwrap(), (PageData::Data, 6));
    let zeros = AsyncSource::new(Starts(|started: Started| started.done.complete(Ok(Loaded::Zero))));
    assert_eq!(read(&zeros).unwrap().0, PageData::Zero);
    let drops = AsyncSource::new(Starts(|_: Started| {}));
    assert!(read(&drops).unwrap_err().to_string().contains("without an answer"));
    let threads = AsyncSource::new(ThreadedSource::new(Pages::new(page()), 2).unwrap());
    assert_eq!(read(&threads).unwrap(), (PageData::Data, 6));
}

/// How many loads wait for a thread.
fn waiting<S: PageSource>(source: &AsyncSource<ThreadedSource<S>>) -> usize {
    source.get_ref().waiting()
}

#[test]
fn threads_of_source_take_faults_before_read_ahead() {
    require!();
    let (entered, enter) = mpsc::channel();
    let (go, gate) = mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let order = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&order);
    let entered = Mutex::new(entered);
    let blocking = move |offset: u64, bytes: &mut [u8]| {
        noted.lock().unwrap().push(offset);
        if offset == 0 {
            entered.lock().unwrap().send(()).unwrap();
            gate.lock().unwrap().recv().unwrap();
        }
        assert!(offset != 4, "on purpose");
        bytes.fill(1);
        Ok(PageData::Data)
    };
    let source = Arc::new(AsyncSource::new(ThreadedSource::new(blocking, 1).unwrap()));
    let read = |offset: u64, is_early: bool| {
        let source = Arc::clone(&source);
        thread::spawn(move || {
            let mut byte = [0];
            let read =
                if is_early { source.read_early(offset, &mut byte) } else { source.read(offset, &mut byte) };
            read.map(|_| byte[0])
        })
    };
    let mut readers = vec![read(0, false)];
    enter.recv().unwrap();
    for (at, is_early) in [(1, true), (2, true), (3, false), (4, false)] {
        readers.push(read(at, is_early));
        let queued = at as usize;
        wait_until(|| waiting(&source) == queued);
    }
    go.send(()).unwrap();
    let answers: Vec<_> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
    assert_eq!(*order.lock().unwrap(), [0, 3, 4, 1, 2]);
    assert!(answers[4].as_ref().is_err_and(|error| error.to_string().contains("panicked")));
    assert!(answers.iter().filter(|answer| answer.is_ok()).count() == 4);
}

#[test]
fn threads_of_a_source_are_not_waited_for_in_a_forked_child() {
    require!();
    child::run_well(test_name!(), || {
        let source = Arc::new(ThreadedSource::new(Pages::new(page()), 2).unwrap());
        let of_child = Arc::clone(&source);
        child::fork(move || {
            let memory = LazyMemory::builder(AsyncSource::new(of_child)).len(4 * page()).build().unwrap();
            let error = memory.try_populate(0..page()).unwrap_err();
            assert!(error.to_string().contains("can't be had"), "{error}");
        })
        .succeed();
        let memory = LazyMemory::builder(AsyncSource::new(source)).len(4 * page()).build().unwrap();
        memory.try_populate(0..page()).unwrap();
    });
}
