//! How a process ends when its content can't be had: OnEnd.

use std::io;
use std::time::Duration;

use userfaultfd::FeatureFlags;
use userfaultfd::pager::{Error, OnEnd, PageData, Pager, RetryPolicy};

use crate::others::Target;
use crate::scene::{Pages, Problems, byte, can_poison, fill, region};
use crate::support::memory::Memory;
use crate::support::proc::{self, wait_until};
use crate::support::{child, page, require, test_name};

/// A page that the source below can't deliver.
const BAD: u8 = 2;

fn fails_at_one(offset: u64, buffer: &mut [u8]) -> io::Result<PageData> {
    let first = offset as usize / page();
    for (at, bytes) in buffer.chunks_mut(page()).enumerate() {
        if first + at == usize::from(BAD) {
            return Err(io::ErrorKind::NotFound.into());
        }
        fill(first + at, bytes);
    }
    Ok(PageData::Data)
}

/// Whether a process waits for a page.
fn waits_for_page(target: &Target) -> bool {
    let mut text = [0; 512];
    proc::read(format_args!("/proc/{}/syscall", target.process.pid()), &mut text)
        .is_some_and(|text| text.starts_with("-1 "))
}

#[test]
fn failing_source_kills_the_process_that_waits() {
    require!();
    child::run_well(test_name!(), || {
        let (memory, problems) = (Memory::anonymous(4), Problems::default());
        let (mut one, descriptor) = Target::start(&memory, FeatureFlags::empty(), true);
        let (mut other, stays) = Target::start(&memory, FeatureFlags::empty(), true);
        let retry = RetryPolicy { attempts: 2, delay: Duration::from_millis(1) };
        let pager = Pager::builder().retry(retry).on_problem(problems.callback()).build().unwrap();
        let added = pager.add(descriptor, [region(&memory, fails_at_one)]).unwrap();
        pager.on_end(added.descriptor, OnEnd::Kill, Some(one.process.pidfd())).unwrap();
        let stays = pager.add(stays, [region(&memory, Pages::new(page()))]).unwrap();
        // What nothing waits for is no reason.
        let finished = pager.finish_region(added.regions[0], |_| {});
        assert!(matches!(finished, Err(Error::Unfilled { .. })), "{finished:?} {:?}", problems.all());
        assert_eq!([one.read(0), one.read(3)], [byte(0), byte(3)]);
        one.ask(BAD);
        assert_eq!(one.process.wait(), libc::SIGKILL);
        wait_until(|| problems.count("TargetGone") == 1);
        assert_eq!((problems.count("Killed"), problems.count("Poisoned")), (1, 0), "{:?}", problems.all());
        assert_eq!(pager.statistics().poisoned, 0);
        assert_eq!(pager.descriptors(), [stays.descriptor]);
        assert_eq!(other.read(BAD), byte(BAD.into()));
        other.process.kill();
    });
}

#[test]
fn failing_source_lets_wait_what_is_left_alone() {
    require!();
    child::run_well(test_name!(), || {
        let (memory, problems) = (Memory::anonymous(4), Problems::default());
        let (mut target, descriptor) = Target::start(&memory, FeatureFlags::empty(), true);
        let retry = RetryPolicy { attempts: 1, delay: Duration::ZERO };
        let pager = Pager::builder().retry(retry).on_problem(problems.callback()).build().unwrap();
        let added = pager.add(descriptor, [region(&memory, fails_at_one)]).unwrap();
        pager.on_end(added.descriptor, OnEnd::Leave, None).unwrap();
        target.ask(BAD);
        wait_until(|| problems.count("Source") == 1);
        wait_until(|| waits_for_page(&target));
        assert_eq!((pager.statistics().poisoned, problems.count("Killed")), (0, 0));
        // It goes on once there is content.
        let handed_over = pager.remove(added.descriptor).unwrap();
        let next = Pager::new().unwrap();
        let region = region(&memory, Pages::new(page())).missing(handed_over.missing());
        next.add(handed_over.uffd, [region]).unwrap();
        assert_eq!(target.answer(), byte(BAD.into()));
        target.process.kill();
    });
}

#[test]
fn dropping_the_pager_ends_each_process_as_chosen() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(4);
        let open = || (0..256).filter(|fd| proc::is_userfaultfd(*fd)).count();
        for on_end in [OnEnd::Kill, OnEnd::Poison, OnEnd::Finish, OnEnd::Leave] {
            let (mut target, descriptor) = Target::start(&memory, FeatureFlags::empty(), true);
            let pager = Pager::new().unwrap();
            let added = pager.add(descriptor, [region(&memory, Pages::new(page()))]).unwrap();
            pager.on_end(added.descriptor, on_end, Some(target.process.pidfd())).unwrap();
            assert_eq!(target.read(0), byte(0));
            if on_end == OnEnd::Poison && !can_poison() {
                continue;
            }
            assert_eq!(open(), 1);
            drop(pager);
            assert_eq!(open(), usize::from(on_end == OnEnd::Leave), "{on_end:?}");
            match on_end {
                OnEnd::Kill => assert_eq!(target.process.wait(), libc::SIGKILL),
                OnEnd::Finish => {
                    assert_eq!([target.read(3), target.read(0)], [byte(3), byte(0)]);
                    target.process.kill();
                }
                OnEnd::Poison => {
                    target.ask(3);
                    assert_eq!(target.process.wait() & 0x7f, libc::SIGBUS);
                }
                _ => {
                    target.ask(3);
                    wait_until(|| waits_for_page(&target));
                    target.socket.set_nonblocking(true).unwrap();
                    let answered = io::Read::read(&mut target.socket, &mut [0]);
                    assert_eq!(answered.unwrap_err().kind(), io::ErrorKind::WouldBlock);
                    target.process.kill();
                }
            }
        }
    });
}

#[test]
fn process_of_the_pager_does_not_kill_itself() {
    require!();
    child::run_well(test_name!(), || {
        let memory = Memory::anonymous(2);
        let pager = Pager::new().unwrap();
        let added = crate::scene::serve(
            &pager,
            crate::support::uffd(FeatureFlags::empty()),
            region(&memory, Pages::new(page())),
        );
        // SAFETY: touches no memory.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: it was just opened, and nothing else owns it.
        let own = unsafe { std::os::fd::FromRawFd::from_raw_fd(fd as i32) };
        pager.on_end(added.descriptor, OnEnd::Kill, Some(own)).unwrap();
        drop(pager);
    });
}
