//! Swap for another process: its memory is a memfd, and this process keeps within a limit what is resident of it.
//!
//! ```sh
//! cargo run --release --example far_memory -- [--limit 16M] [--size 64M] [--rounds 3]
//! ```
//!
//! Starts a child that writes every page of its memory, and then reads and writes all of them in random order, round after
//! round, each checked. The child hands its userfaultfd and its memfd over a socket, and knows nothing of the limit. Linux
//! 6.4; no rights.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;
use std::{env, thread};

use memmap2::MmapMut;
use userfaultfd::pager::{Budget, Pager, Problem, Region, ZeroSource};
use userfaultfd::{FeatureFlags, RegisterMode, Support, Uffd, UffdBuilder, page_size};
use userfaultfd_examples::{Needs, Result, memfd, parse_bytes, receive, send};

const USAGE: &str = "usage: far_memory [--limit 16M] [--size 64M] [--rounds 3]";

fn main() -> ExitCode {
    userfaultfd_examples::run(|| {
        let (mut limit, mut size, mut rounds, mut is_child) = (16 << 20, 64 << 20, 3, false);
        let mut arguments = env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut number = || arguments.next().and_then(|text| parse_bytes(&text)).ok_or(USAGE);
            match &argument[..] {
                "--limit" => limit = number()?,
                "--size" => size = number()?,
                "--rounds" => rounds = number()?,
                "--child" => is_child = true,
                _ => return Err(USAGE.into()),
            }
        }
        if is_child { work(size, rounds) } else { keep(limit, size, rounds) }
    })
}

/// The process that keeps the other one's memory within the limit.
fn keep(limit: usize, size: usize, rounds: usize) -> Result<()> {
    if !Support::probe()?.features().contains(FeatureFlags::WP_UNPOPULATED) {
        return Err(Needs("shared memory that is mapped protected: Linux 6.4".into()).into());
    }
    let (stream, childs) = UnixStream::pair()?;
    let mut child = Command::new(env::current_exe()?)
        .args(["--child", "--size", &size.to_string(), "--rounds", &rounds.to_string()])
        .stdin(Stdio::from(OwnedFd::from(childs)))
        .spawn()?;
    let kept = serve(stream, &mut child, limit);
    if kept.is_err() {
        child.kill()?;
    }
    let status = child.wait()?;
    kept?;
    if status.success() { Ok(()) } else { Err(format!("the child ended with {status}").into()) }
}

fn serve(mut stream: UnixStream, child: &mut Child, limit: usize) -> Result<()> {
    let budget = Budget::new(limit);
    let pager = Pager::builder().threads(2).on_problem(report).build()?;
    let Some(([start, len], uffd)) = receive(&stream)? else {
        return Err("the child hands nothing over".into());
    };
    let Some(([offset], memfd)) = receive(&stream)? else {
        return Err("the child hands no file over".into());
    };
    let (file, len) = (File::from(memfd), usize::try_from(len)?);
    let region =
        Region::new(start.try_into()?, len, ZeroSource).minor(file.try_clone()?, offset).budget(&budget);
    pager.add(Uffd::from(uffd), [region]).map_err(|refused| refused.error)?;
    println!("{len} bytes of memory in process {}, of which {limit} may be resident", child.id());
    stream.write_all(b"\n")?;

    // What the file takes, looked at all the time.
    let mut most = 0;
    let status = loop {
        most = most.max(file.metadata()?.blocks() * 512);
        match child.try_wait()? {
            Some(status) => break status,
            None => thread::sleep(Duration::from_millis(1)),
        }
    };
    let statistics = budget.statistics();
    println!("resident: {most} bytes at most");
    println!("evicted: {}", statistics.evictions);
    println!("refaulted: {}", statistics.refaults);
    println!("second chances: {}", statistics.second_chances);
    println!("spilled: {}", statistics.spilled);
    // Its end is noticed, and what it had counts no longer.
    pager.join();
    drop(pager);
    if budget.resident() > 0 {
        return Err(format!("{budget} after the process has ended").into());
    }
    if !status.success() {
        return Err("the child found something else than it had written".into());
    }
    if most > limit as u64 {
        return Err("more was resident than the limit".into());
    }
    if len > limit && statistics.evictions == 0 {
        return Err("nothing was evicted".into());
    }
    Ok(())
}

fn report(problem: &Problem) {
    // That the child ends is no problem here.
    if !matches!(problem, Problem::TargetGone { .. }) {
        eprintln!("{problem}");
    }
}

/// The process that has the memory.
fn work(size: usize, rounds: usize) -> Result<()> {
    let pages = size.div_ceil(page_size());
    let file = memfd(pages * page_size())?;
    // SAFETY: the pager alone changes the file besides this mapping, and gives back what it takes.
    let mut memory = unsafe { MmapMut::map_mut(&file) }?;
    let uffd = UffdBuilder::new().create()?;
    let modes = RegisterMode::MISSING | RegisterMode::MINOR | RegisterMode::WRITE_PROTECT;
    uffd.register_with_mode(memory.as_mut_ptr().cast(), memory.len(), modes)?;
    // The standard input is the socket.
    let mut stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    send(&stream, [memory.as_ptr().expose_provenance() as u64, memory.len() as u64], uffd.as_fd())?;
    send(&stream, [0], file.as_fd())?;
    drop((uffd, file));
    stream.read_exact(&mut [0])?;

    // What each page has, which is as much smaller than the memory as a page is larger than a number.
    let mut written = vec![0; pages];
    for page in 0..pages {
        write(&mut memory, page, 0);
    }
    let mut random = 1_u64;
    for round in 1..=rounds as u64 {
        for _ in 0..pages {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let page = (random >> 33) as usize % pages;
            check(&memory, page, written[page])?;
            // A third of them stay as they are.
            if random >> 40 & 3 != 0 {
                written[page] = round;
                write(&mut memory, page, round);
            }
        }
    }
    (0..pages).try_for_each(|page| check(&memory, page, written[page]))?;
    println!("pages: {pages}, all as they were written");
    Ok(())
}

/// What a page has in each of its words, by its number and when it was written.
fn word(page: usize, round: u64, at: usize) -> [u8; 8] {
    ((page as u64) << 32 | round << 16 | at as u64).to_ne_bytes()
}

fn write(memory: &mut [u8], page: usize, round: u64) {
    let bytes = &mut memory[page * page_size()..(page + 1) * page_size()];
    for (at, bytes) in bytes.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&word(page, round, at));
    }
}

fn check(memory: &[u8], page: usize, round: u64) -> Result<()> {
    let bytes = &memory[page * page_size()..(page + 1) * page_size()];
    match bytes.chunks_exact(8).enumerate().find(|(at, bytes)| *bytes != word(page, round, *at)) {
        None => Ok(()),
        Some((at, _)) => Err(format!("page {page} isn't what was written, from byte {} on", 8 * at).into()),
    }
}
