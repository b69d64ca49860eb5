//! Faults answered with userfaultfd 0.9, in the loop of its example: poll(2), read_event, copy. The example's own
//! output, which would cost more than the faults, is left out.
//!
//! For each line on the standard input it has a round of faults answered, and tells the nanoseconds that took. With the
//! argument `other` the two threads have a CPU each; otherwise they are where the scheduler puts them.

#[path = "../../contenders/cpus.rs"]
#[expect(dead_code, reason = "the report uses the rest")]
mod cpus;
#[path = "../../contenders/order.rs"]
mod order;

use std::ffi::c_void;
use std::io;
use std::process::exit;
use std::thread;
use std::time::Instant;

use memmap2::{Advice, MmapMut, MmapOptions};
use nix::poll::{PollFd, PollFlags, poll};
use nix::unistd::{SysconfVar, sysconf};
use userfaultfd::{Event, Uffd, UffdBuilder};

use crate::cpus::Place;
use crate::order::{FAULTS, PAGES, ROUNDS, first_byte, shuffled};

fn main() {
    let page = sysconf(SysconfVar::PAGE_SIZE).expect("sysconf").expect("a page size") as usize;
    let mut content = vec![0; PAGES * page];
    for (index, bytes) in content.chunks_exact_mut(page).enumerate() {
        bytes.fill(first_byte(index));
    }
    let order = shuffled(PAGES);
    let place = if std::env::args().nth(1).as_deref() == Some("other") { Place::Other } else { Place::Anywhere };
    cpus::stay_on(place.faulting());
    let mut lines = io::stdin().lines();
    loop {
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(true)
            .create()
            .expect("uffd creation");
        let mut memory = MmapOptions::new().len(PAGES * page).no_reserve_swap().map_anon().expect("memory");
        memory.advise(Advice::NoHugePage).expect("memory without huge pages");
        uffd.register(memory.as_mut_ptr().cast(), memory.len()).expect("uffd.register()");
        let start = memory.as_ptr() as usize;
        thread::scope(|scope| {
            scope.spawn(|| {
                cpus::stay_on(place.answering().expect("two CPUs"));
                handle(&uffd, page, start, &content);
            });
            for pages in order.chunks_exact(FAULTS).take(ROUNDS) {
                let Some(line) = lines.next() else { exit(0) }; // the handler waits for a fault
                line.expect("a line");
                println!("{}", touch(&memory, page, pages));
            }
        });
    }
}

fn touch(memory: &MmapMut, page: usize, pages: &[u32]) -> u128 {
    let begin = Instant::now();
    for index in pages {
        let index = *index as usize;
        // SAFETY: inside the memory.
        let byte = unsafe { memory.as_ptr().add(index * page).read_volatile() };
        assert_eq!(byte, first_byte(index), "page {index}");
    }
    begin.elapsed().as_nanos()
}

fn handle(uffd: &Uffd, page: usize, start: usize, content: &[u8]) {
    for _ in 0..PAGES {
        let mut fds = [PollFd::new(uffd, PollFlags::POLLIN)];
        poll(&mut fds, -1).expect("poll");
        let event = uffd.read_event().expect("read uffd_msg").expect("uffd_msg ready");
        if let Event::Pagefault { addr, .. } = event {
            let dst = addr as usize & !(page - 1);
            let source = content[dst - start..][..page].as_ptr();
            // SAFETY: the content lives on, and it is what the other thread must find.
            unsafe { uffd.copy(source.cast(), dst as *mut c_void, page, true) }.expect("uffd copy");
        } else {
            panic!("Unexpected event on userfaultfd");
        }
    }
}
