//! Processes that are killed at any moment.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use super::*;
use crate::support::proc::wait_until;
use crate::support::test_name;

/// The directory in which a process of the test works, and its seed.
const DIRECTORY: &str = "USERFAULTFD_CACHE_DIRECTORY";
const SEED: &str = "USERFAULTFD_CACHE_SEED";

/// How many processes are killed, where another number is wanted than 50.
const KILLS: &str = "USERFAULTFD_CACHE_KILLS";

const IMAGES: usize = 3;
const LIMIT: u64 = 20 * CHUNK as u64;

fn bytes(image: usize) -> Vec<u8> {
    let mut bytes = content(image, (10 + image) * CHUNK + 77);
    bytes[3 * CHUNK..4 * CHUNK].fill(0);
    bytes
}

/// A process of its own that runs a test, with a line of output for each of its steps, the first of which follows what the
/// test harness says.
fn start(test: &str, directory: &Path, seed: usize) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]);
    command.env(DIRECTORY, directory).env(SEED, seed.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
}

/// Whether this is such a process: its directory and its seed.
fn child() -> Option<(PathBuf, usize)> {
    Some((std::env::var_os(DIRECTORY)?.into(), std::env::var(SEED).ok()?.parse().unwrap()))
}

fn say(line: &str) {
    let mut out = io::stdout();
    // Ends this process once nobody listens.
    writeln!(out, "{line}").and_then(|()| out.flush()).unwrap_or_else(|_| std::process::exit(1));
}

/// Reads at random for ever.
fn work(directory: &Path, seed: usize) {
    let cache = ChunkCache::open(directory, LIMIT).unwrap();
    let mut random = Random::new(seed as u64);
    let images: Vec<_> = (0..IMAGES).map(bytes).collect();
    loop {
        let number = random.below(IMAGES);
        let bytes = &images[number];
        let image = open(&cache, &number.to_string(), BytesSource::new(bytes.clone()));
        for _ in 0..1 + random.below(20) {
            let range = some_range(&mut random, bytes.len());
            let mut page = vec![0xee; range.len()];
            let found = image.read(range.start as u64, &mut page).unwrap();
            let is_right = match found {
                PageData::Zero => bytes[range.clone()].iter().all(|byte| *byte == 0),
                PageData::Data => page == bytes[range.clone()],
            };
            say(if is_right { "right" } else { "wrong" });
        }
    }
}

#[test]
fn killed_at_any_moment_a_process_leaves_nothing_wrong() {
    require!();
    if let Some((directory, seed)) = child() {
        return work(&directory, seed);
    }
    // Longer than a test's time where it is asked for.
    let _pause = crate::support::pause_watchdog();
    let kills = std::env::var(KILLS).map_or(50, |kills| kills.parse().unwrap());
    let scratch = Scratch::new("killed");
    let mut random = Random::new(std::process::id().into());
    let mut steady = start(test_name!(), &scratch.0, 1_000_000);
    let mut steady_lines = BufReader::new(steady.stdout.take().unwrap()).lines();
    for kill in 0..kills {
        let mut child = start(test_name!(), &scratch.0, kill + 1);
        let mut steps = random.below(60);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for line in lines.by_ref().map(Result::unwrap) {
            assert!(!line.ends_with("wrong"), "the process that was started after {kill} kills");
            if line.ends_with("right") {
                match steps.checked_sub(1) {
                    Some(left) => steps = left,
                    None => break,
                }
            }
        }
        // Somewhere in its next steps.
        (0..random.below(20_000)).for_each(|_| std::hint::spin_loop());
        child.kill().unwrap();
        let status = child.wait().unwrap();
        drop(lines);
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL), "{status}");
        // Another one that works all the time goes on.
        let mut line = steady_lines.by_ref().map(Result::unwrap);
        let line = line.find(|line| line.ends_with("right") || line.ends_with("wrong"));
        let is_right = line.is_some_and(|line| line.ends_with("right"));
        assert!(is_right, "the process that goes on, after {kill} kills");
    }
    steady.kill().unwrap();
    steady.wait().unwrap();
    let cache = scratch.cache(LIMIT);
    let mut blocks = 0;
    for number in 0..IMAGES {
        let bytes = bytes(number);
        let image = open(&cache, &number.to_string(), BytesSource::new(bytes.clone()));
        check_all(&image, &bytes, &mut random, CHUNK / 2);
        assert_eq!(image.statistics().damaged, 0);
    }
    for number in 0..IMAGES {
        let file = fs::File::open(scratch.0.join(format!("{number}.chunks")));
        let Ok(file) = file else { continue };
        blocks += crate::sys::file_stamp(std::os::fd::AsFd::as_fd(&file)).unwrap().allocated;
    }
    assert!(cache.used() <= LIMIT, "{cache:?}");
    assert!(blocks <= LIMIT + (IMAGES * CHUNK) as u64, "{blocks} bytes of blocks");
    // What is used is what the tables say.
    let used = cache.used();
    assert_eq!(scratch.cache(LIMIT).used(), used);
}

#[test]
fn waiter_goes_on_when_the_fetching_process_is_killed() {
    require!();
    let len = 4 * CHUNK;
    if let Some((directory, _)) = child() {
        struct Stuck(usize);
        impl PageSource for Stuck {
            fn read(&self, _: u64, _: &mut [u8]) -> io::Result<PageData> {
                say("fetching");
                loop {
                    std::thread::park();
                }
            }
            fn len(&self) -> Option<u64> {
                Some(self.0 as u64)
            }
        }
        let image = open(&ChunkCache::open(directory, LIMIT).unwrap(), "image", Stuck(len));
        drop(image.read(0, &mut [0; 100]));
        return;
    }
    let scratch = Scratch::new("fetching");
    let mut child = start(test_name!(), &scratch.0, 1);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.by_ref().map(Result::unwrap).find(|line| line.ends_with("fetching")).expect("it fetches");
    let bytes = content(1, len);
    let image = open(&scratch.cache(LIMIT), "image", BytesSource::new(bytes.clone()));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| check(&image, &bytes, 50..CHUNK));
        wait_until(|| image.statistics().waits == 1);
        assert_eq!(image.cached(), 0);
        child.kill().unwrap();
        child.wait().unwrap();
        waiter.join().unwrap();
    });
    assert_eq!((image.statistics().fetches, image.cached()), (1, CHUNK as u64));
}
