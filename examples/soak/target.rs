//! A process whose memory is served: its threads read, write, remove, move and fork.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use userfaultfd::{FeatureFlags, Support, Uffd, UffdBuilder, page_size};
use userfaultfd_examples::{Result, huge_page_size, memfd};

use crate::arena::{Arena, How};
use crate::board::{Act, Board, Slot};
use crate::content::WORD;
use crate::link::{Memory, Request, Spec, ask};
use crate::random::Random;
use crate::{SLOTS, bus};

/// What a target must do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Orders {
    pub(crate) seed: u64,
    pub(crate) process: usize,
    /// How often the process was started before.
    pub(crate) life: usize,
    pub(crate) threads: usize,
    pub(crate) time: Duration,
    /// Whether faults from kernel mode may be told.
    pub(crate) kernel: bool,
    pub(crate) forks: bool,
    /// How many huge pages an arena may have.
    pub(crate) huge_pages: usize,
}

struct Target {
    orders: Orders,
    support: FeatureFlags,
    board: Board,
    arenas: Vec<RwLock<Arena>>,
    /// Held by a thread that forks, so that the child finds nothing half done.
    changes: RwLock<()>,
    /// Held by a thread that does what excludes others that do so; and how to reach the keeper.
    alone: Mutex<UnixStream>,
    stop: AtomicBool,
    end: Instant,
}

/// What a target ends with. What went wrong is on the standard error.
pub(crate) fn run(orders: Orders, socket: UnixStream, board: &File) -> Result<()> {
    // SAFETY: touches no memory. A target is nothing without its keeper.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    bus::install()?;
    let board = Board::map(board)?;
    let end = Instant::now() + orders.time;
    let support = Support::probe()?.features();
    let mut random = orders.random(usize::MAX);
    let count = 1 + random.below(4);
    let arenas = (0..count).map(|index| set_up(&orders, support, &mut random, &socket, index));
    let arenas = arenas.map(|arena| arena.map(RwLock::new)).collect::<Result<_>>()?;
    let target = Target {
        orders,
        support,
        board,
        arenas,
        changes: RwLock::default(),
        alone: Mutex::new(socket),
        stop: AtomicBool::new(false),
        end,
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..orders.threads)
            .map(|thread| {
                let target = &target;
                scope.spawn(move || {
                    target.work(thread).inspect_err(|_| target.stop.store(true, Ordering::Relaxed))
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err("a panic".to_owned())))
            .collect()
    });
    results.into_iter().collect::<Result<(), String>>()?;
    target.settle()?;
    Ok(())
}

impl Orders {
    fn random(&self, thread: usize) -> Random {
        Random::new(&[self.seed, self.process as u64, self.life as u64, thread as u64])
    }
}

/// Memory of a random kind, and has it served.
fn set_up(
    orders: &Orders,
    support: FeatureFlags,
    random: &mut Random,
    socket: &UnixStream,
    index: usize,
) -> Result<Arena> {
    let (spec, features) = choose(orders, support, random);
    let mut builder = UffdBuilder::new();
    builder.close_on_exec(true).non_blocking(random.one_in(2)).user_mode_only(!orders.kernel);
    let uffd: Uffd = builder.require_features(features).create()?;
    let arena = Arena::new(index, spec, features)?;
    let (pieces, file) = (arena.pieces(), arena.file()?);
    ask(socket, &Request::Add { arena: index, spec, pieces, uffd, file })?;
    Ok(arena)
}

fn choose(orders: &Orders, support: FeatureFlags, random: &mut Random) -> (Spec, FeatureFlags) {
    let supports = |features| support.contains(features);
    let huge_size = huge_page_size().filter(|_| orders.huge_pages > 0);
    let memory = loop {
        let memory = Memory::ALL[random.below(Memory::ALL.len())];
        let has = match memory {
            Memory::Minor => supports(FeatureFlags::MINOR_SHMEM),
            Memory::HugeMinor => supports(FeatureFlags::MINOR_HUGETLBFS) && huge_size.is_some(),
            Memory::Huge | Memory::HugePrivate => huge_size.is_some(),
            _ => true,
        };
        if has {
            break memory;
        }
    };
    let changes = FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP;
    let mut features = match random.below(6) {
        0 => FeatureFlags::empty(),
        1 => FeatureFlags::EVENT_REMOVE,
        2 => FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_REMAP,
        _ => changes,
    };
    features.set(FeatureFlags::EVENT_FORK, orders.forks && random.one_in(2));
    let page_size = huge_size.filter(|_| memory.is_huge()).unwrap_or_else(page_size);
    let pages = if memory.is_huge() { 1 + random.below(orders.huge_pages) } else { 1 + random.below(256) };
    let source = random.below(6).saturating_sub(2);
    // The last page of a file needn't be whole.
    let short = if source == 0 || random.one_in(2) { 0 } else { random.below(page_size / WORD) };
    let protectable = if memory.is_minor() {
        // The release in which such a page can be mapped protected.
        FeatureFlags::WP_UNPOPULATED
    } else if memory.is_shared() || matches!(memory, Memory::PrivateFile | Memory::HugePrivate) {
        FeatureFlags::WP_HUGETLBFS_SHMEM
    } else {
        FeatureFlags::PAGEFAULT_FLAG_WP
    };
    let is_forked = memory.is_shared() && features.contains(FeatureFlags::EVENT_FORK);
    let spec = Spec {
        memory,
        key: random.next(),
        page_size,
        pages,
        words: pages * page_size / WORD - short,
        source,
        // Where removals aren't told nobody can take poison away; where a fork shares memory, it is in both.
        has_bad: source == 0
            && supports(FeatureFlags::POISON)
            && features.contains(FeatureFlags::EVENT_REMOVE)
            && !is_forked,
        block: [1, 1, 2, 4, 16, 64][random.below(6)],
        write_protected: supports(protectable) && random.one_in(4),
        is_still: features.is_empty() && !memory.is_shared() && random.one_in(2),
    };
    (spec, features)
}

impl Target {
    /// A thread's work.
    fn work(&self, thread: usize) -> Result<(), String> {
        let mut random = self.orders.random(thread);
        let slot = self.slot(thread);
        let scratch = memfd(page_size()).map_err(|error| error.to_string())?;
        while Instant::now() < self.end && !self.stop.load(Ordering::Relaxed) {
            let index = random.below(self.arenas.len());
            let dice = random.below(4096);
            match dice {
                0..48 => self.alone(slot, thread, &mut random, index)?,
                _ => {
                    let arena = self.enter(index);
                    let told = self.touch(&arena, slot, &mut random, &scratch, dice);
                    told.map_err(|problem| self.tell(&arena, &problem))?;
                }
            }
        }
        Ok(())
    }

    fn slot(&self, thread: usize) -> &Slot {
        &self.board.slots()[self.orders.process * SLOTS + thread]
    }

    fn enter(&self, index: usize) -> RwLockReadGuard<'_, Arena> {
        self.arenas[index].read().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, arena: &Arena, problem: &str) -> String {
        let Arena { index, spec, features, .. } = arena;
        format!("arena {index}: {problem}\n  {spec:?}, {features:?}")
    }

    /// What goes on beside everything else.
    fn touch(
        &self,
        arena: &Arena,
        slot: &Slot,
        random: &mut Random,
        scratch: &File,
        dice: usize,
    ) -> Result<(), String> {
        let page = random.below(arena.spec.pages);
        let pages = page..(page + 1 + random.below(16)).min(arena.spec.pages);
        match dice {
            48..600 => {
                let _quiet = self.changes.read().unwrap_or_else(PoisonError::into_inner);
                slot.begin(Act::Write, arena.index);
                arena.write(slot, random, page)?;
                slot.end(Act::Write);
            }
            600..900 if !arena.spec.is_still => {
                let _quiet = self.changes.read().unwrap_or_else(PoisonError::into_inner);
                slot.begin(Act::Remove, arena.index);
                let removed = arena.remove(slot, random, pages, dice % 2 == 0)?;
                slot.end(if removed { Act::Remove } else { Act::Refused });
            }
            900..1000 if self.orders.kernel && !arena.spec.memory.is_huge() => {
                slot.begin(Act::KernelRead, arena.index);
                arena.read(slot, random, page, How::Kernel(scratch))?;
                slot.end(Act::KernelRead);
            }
            1000..1200 if !arena.spec.memory.is_huge() => {
                slot.begin(Act::Read, arena.index);
                arena.read(slot, random, page, How::Whole)?;
                slot.end(Act::Read);
            }
            _ => {
                slot.begin(Act::Read, arena.index);
                arena.read(slot, random, page, How::Words(1 + dice % 8))?;
                slot.end(Act::Read);
            }
        }
        Ok(())
    }

    /// What others must not do at the same time.
    fn alone(&self, slot: &Slot, thread: usize, random: &mut Random, index: usize) -> Result<(), String> {
        let Ok(socket) = self.alone.try_lock() else { return Ok(()) };
        let arena = self.enter(index);
        let page = random.below(arena.spec.pages);
        let pages = page..(page + 1 + random.below(32)).min(arena.spec.pages);
        let has = |events| arena.features.contains(events);
        let moves = FeatureFlags::EVENT_REMOVE | FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP;
        let act = match random.below(64) {
            0..16 if has(moves) && !arena.spec.memory.is_huge() => Act::Move,
            16..28 if has(moves) && !arena.spec.memory.is_huge() => Act::MoveWhole,
            28..36 if has(FeatureFlags::EVENT_UNMAP | FeatureFlags::EVENT_REMOVE) => Act::Replace,
            36..46 if self.orders.forks => Act::Fork,
            46..52 if !arena.shows_twice() => Act::HandOver,
            52..54 if (0..self.arenas.len()).all(|index| !self.enter(index).shows_twice()) => Act::Detach,
            54..56 => Act::FinishRegion,
            56 => Act::Finish,
            57 => Act::RemoveRegion,
            58 => Act::Drop,
            59 => Act::Check,
            60.. => Act::Renew,
            _ => Act::Check,
        };
        slot.begin(act, index);
        let problem = |problem: String| self.tell(&arena, &problem);
        let refused = |error: io::Error| self.tell(&arena, &format!("{act:?}: {error}"));
        match act {
            Act::Move | Act::MoveWhole => {
                let _quiet = self.changes.read().unwrap_or_else(PoisonError::into_inner);
                let leave = act == Act::Move;
                if !arena.relocate(slot, &self.board, pages, leave).map_err(problem)? {
                    slot.end(Act::Refused);
                    return Ok(());
                }
            }
            Act::Replace => {
                let _quiet = self.changes.read().unwrap_or_else(PoisonError::into_inner);
                let serve = |piece| ask(&socket, &Request::AddRegion { arena: index, piece });
                if !arena.replace(slot, &self.board, pages, serve).map_err(problem)? {
                    slot.end(Act::Refused);
                    return Ok(());
                }
            }
            Act::Fork => self.fork(slot, thread, random)?,
            Act::HandOver => {
                let pieces = arena.pieces();
                ask(&socket, &Request::HandOver { arena: index, pieces }).map_err(refused)?;
            }
            Act::Detach => {
                let arenas = (0..self.arenas.len()).map(|index| self.enter(index).pieces()).collect();
                ask(&socket, &Request::Detach { arenas }).map_err(refused)?;
            }
            Act::FinishRegion | Act::RemoveRegion => {
                let request = if act == Act::FinishRegion {
                    Request::FinishRegion { arena: index }
                } else {
                    arena.may_be_poisoned.store(true, Ordering::SeqCst);
                    Request::RemoveRegion { arena: index }
                };
                ask(&socket, &request).map_err(refused)?;
                self.check(&arena, slot, random)?;
                drop(arena);
                self.renew(&socket, index, random)?;
            }
            Act::Finish | Act::Drop => {
                drop(arena);
                if act == Act::Finish {
                    ask(&socket, &Request::Finish).map_err(|error| error.to_string())?;
                } else {
                    for index in 0..self.arenas.len() {
                        self.enter(index).may_be_poisoned.store(true, Ordering::SeqCst);
                    }
                    ask(&socket, &Request::Drop).map_err(|error| error.to_string())?;
                }
                for index in 0..self.arenas.len() {
                    let arena = self.enter(index);
                    arena.is_served.store(false, Ordering::SeqCst);
                    self.check(&arena, slot, random)?;
                    drop(arena);
                    self.renew(&socket, index, random)?;
                }
            }
            Act::Renew => {
                drop(arena);
                self.renew(&socket, index, random)?;
            }
            _ => self.check(&arena, slot, random)?,
        }
        slot.end(act);
        Ok(())
    }

    /// Checks all pages of an arena.
    fn check(&self, arena: &Arena, slot: &Slot, random: &mut Random) -> Result<(), String> {
        for page in 0..arena.spec.pages {
            let how = if arena.spec.memory.is_huge() { How::Words(64) } else { How::Whole };
            arena.read(slot, random, page, how).map_err(|problem| self.tell(arena, &problem))?;
        }
        Ok(())
    }

    /// Replaces an arena by another.
    fn renew(&self, socket: &UnixStream, index: usize, random: &mut Random) -> Result<(), String> {
        let mut arena = self.arenas[index].write().unwrap_or_else(PoisonError::into_inner);
        let is_served = arena.is_served.load(Ordering::SeqCst);
        if is_served {
            ask(socket, &Request::Retire { arena: index })
                .map_err(|error| self.tell(&arena, &error.to_string()))?;
        }
        let anew = set_up(&self.orders, self.support, random, socket, index);
        *arena = anew.map_err(|error| format!("setting up memory: {error}"))?;
        Ok(())
    }

    /// Forks. The child does what its parent does, for a while.
    fn fork(&self, slot: &Slot, thread: usize, random: &mut Random) -> Result<(), String> {
        let arenas: Vec<_> = (0..self.arenas.len()).map(|index| self.enter(index)).collect();
        let childs = self.slot(self.orders.threads + thread);
        let quiet = self.changes.write().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the child has this thread alone, and touches the arenas and atomics. It locks nothing, and allocates
        // only where the allocator is made for that.
        let child = match unsafe { libc::fork() } {
            -1 => return Err(format!("fork: {}", io::Error::last_os_error())),
            0 => self.be_child(&arenas, childs, random),
            child => child,
        };
        drop(quiet);
        slot.touches(0, child as u32);
        let mut status = 0;
        // SAFETY: `status` is borrowed for the call.
        while unsafe { libc::waitpid(child, &raw mut status, 0) } == -1 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(format!("waitpid: {error}"));
            }
        }
        childs.leave();
        random.next();
        if status == 0 { Ok(()) } else { Err(format!("the child of a fork ended with status {status:#x}")) }
    }

    fn be_child(&self, arenas: &[RwLockReadGuard<'_, Arena>], slot: &Slot, random: &mut Random) -> ! {
        // SAFETY: touches no memory.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        let mut result = Ok(());
        for _ in 0..1 + random.below(200) {
            let arena = &arenas[random.below(arenas.len())];
            if !arena.features.contains(FeatureFlags::EVENT_FORK) || arena.spec.memory.is_huge() {
                continue;
            }
            let page = random.below(arena.spec.pages);
            if arena.is_locked(page) {
                // By a signal handler of a thread that isn't here, which was taking poison away: nobody will unlock it.
                continue;
            }
            let dice = random.below(16);
            result = match dice {
                0..3 => {
                    slot.begin(Act::Write, arena.index);
                    arena.write(slot, random, page)
                }
                3 if arena.features.contains(FeatureFlags::EVENT_REMOVE) => {
                    slot.begin(Act::Remove, arena.index);
                    arena.remove(slot, random, page..(page + 3).min(arena.spec.pages), false)
                }
                _ => {
                    slot.begin(Act::Read, arena.index);
                    arena.read(slot, random, page, How::Words(4))
                }
            }
            .map(drop);
            slot.end(Act::Read);
            if let Err(problem) = &result {
                eprintln!("the child of a fork: {}", self.tell(arena, problem));
                break;
            }
        }
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(i32::from(result.is_err())) }
    }

    /// At the end everything is as it should be, before the pager has filled all, and after.
    fn settle(self) -> Result<(), String> {
        let (mut random, slot) = (self.orders.random(usize::MAX - 1), self.slot(0));
        let socket = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        slot.begin(Act::Check, 0);
        for _ in 0..2 {
            for arena in &self.arenas {
                let arena = arena.read().unwrap_or_else(PoisonError::into_inner);
                self.check(&arena, slot, &mut random)?;
            }
            slot.end(Act::Check);
            slot.begin(Act::Finish, 0);
            ask(&socket, &Request::Finish).map_err(|error| error.to_string())?;
        }
        slot.end(Act::Finish);
        Ok(())
    }
}
