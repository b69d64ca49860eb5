//! Memory of this process, and reading that of others.

use std::ops::Range;
use std::os::fd::RawFd;
#[cfg(all(feature = "pager", feature = "tracking"))]
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use super::{check, random_bytes};
use crate::Errno;

/// The page size of the system, in bytes.
pub(crate) fn page_size() -> usize {
    // SAFETY: sysconf touches no memory of the caller.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).expect("every Linux system has a page size")
}

/// A page that nobody can read, as long as the process lives.
pub(crate) fn unreadable() -> Result<*const libc::c_void, Errno> {
    static PAGE: OnceLock<usize> = OnceLock::new();
    if let Some(page) = PAGE.get() {
        return Ok(std::ptr::without_provenance(*page));
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the kernel chooses an address where nothing is.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), page_size(), libc::PROT_NONE, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    // Another thread may have been faster: then this page stays, too.
    Ok(std::ptr::without_provenance(*PAGE.get_or_init(|| page.addr())))
}

/// Returns a number that is 0 in each process until that process sets it: a fork's child finds 0 again. Linux 4.14.
pub(crate) fn zero_after_fork() -> Result<&'static AtomicUsize, Errno> {
    static PAGE: AtomicPtr<AtomicUsize> = AtomicPtr::new(std::ptr::null_mut());
    let mut page = PAGE.load(Ordering::Acquire);
    if page.is_null() {
        let new = map_wiped_on_fork(page_size())?.as_ptr().cast();
        // Another thread may be faster: then this page stays unused. Not a `OnceLock`, which a fork may find locked.
        let set = PAGE.compare_exchange(page, new, Ordering::AcqRel, Ordering::Acquire);
        page = set.map_or_else(|other| other, |_| new);
    }
    // SAFETY: the page is mapped as long as the process lives, aligned, and nothing but this atomic leads to it.
    Ok(unsafe { &*page })
}

/// Memory of a mapping's own, all zero. Without the allocator.
pub(crate) fn map(len: usize) -> Result<NonNull<u8>, Errno> {
    map_near(std::ptr::null_mut(), len)
}

/// The same, at an address that isn't like those that other mappings have, here or in other processes.
pub(crate) fn map_somewhere(len: usize) -> Result<NonNull<u8>, Errno> {
    let chance = usize::from_ne_bytes(random_bytes()?);
    // From 64 to 256 GiB, or the middle of a small address space. It is a hint, where something is already.
    #[cfg(target_pointer_width = "64")]
    let (start, len_of_all) = (64 << 30, 192 << 30);
    #[cfg(not(target_pointer_width = "64"))]
    let (start, len_of_all) = (512 << 20, 1 << 30);
    let address: usize = (start + chance % len_of_all) & !(page_size() - 1);
    map_near(std::ptr::without_provenance_mut(address), len)
}

fn map_near(hint: *mut libc::c_void, len: usize) -> Result<NonNull<u8>, Errno> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the kernel chooses an address where nothing is.
    let start = unsafe { libc::mmap(hint, len, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    NonNull::new(start.cast()).ok_or(Errno::ENOMEM)
}

/// Gives such memory back.
///
/// # Safety
///
/// - `len` bytes from `start` on are one or more pages that [`map`] returned, and that nobody uses any more.
pub(crate) unsafe fn unmap(start: NonNull<u8>, len: usize) {
    // SAFETY: as the caller has made sure.
    let unmapped = check(unsafe { libc::munmap(start.as_ptr().cast(), len) });
    if unmapped == Err(Errno::ENOMEM) {
        // The kernel has merged it with its neighbours, and the process has as many mappings as it may: none can be
        // split. The memory is given back, and the addresses stay taken.
        // SAFETY: as the caller has made sure.
        let dropped = check(unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_DONTNEED) });
        debug_assert!(dropped.is_ok(), "{dropped:?}");
        return;
    }
    debug_assert!(unmapped.is_ok(), "{unmapped:?}");
}

/// Drops the pages of private anonymous memory: MADV_DONTNEED.
///
/// # Safety
///
/// - `len` bytes from `start` on are whole pages, whose content nobody needs any more, or finds again elsewhere.
#[cfg(feature = "pager")]
pub(crate) unsafe fn discard(start: *mut u8, len: usize) -> Result<(), Errno> {
    // SAFETY: as the caller has made sure.
    check(unsafe { libc::madvise(start.cast(), len, libc::MADV_DONTNEED) }).map(drop)
}

// memmap2 gives no such advice on Android.
/// `len` bytes of new memory, which is zeros in the children of forks. Linux 4.14.
pub(crate) fn map_wiped_on_fork(len: usize) -> Result<NonNull<u8>, Errno> {
    let start = map(len)?;
    // SAFETY: the range is that of a mapping that nobody has seen yet.
    let wiped = check(unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_WIPEONFORK) });
    if wiped.is_err() {
        // SAFETY: as above.
        unsafe { unmap(start, len) };
    }
    wiped.map(|_| start)
}

/// `len` bytes of new private memory, in pages of 2 to the power of `huge` bytes or of the base size, which isn't there
/// in the children of forks. No page is there, although the process may lock all that it maps: mlockall(2) has the kernel
/// fill such mappings at once. Also tells whether that is so; then [`lock_on_fault`] has to lock it again.
pub(crate) fn map_empty(len: usize, huge: Option<u8>) -> Result<(NonNull<u8>, bool), Errno> {
    let kind = match huge {
        Some(bits) => libc::MAP_HUGETLB | libc::c_int::from(bits) << libc::MAP_HUGE_SHIFT,
        None => libc::MAP_NORESERVE,
    };
    map_unfilled(len, libc::MAP_ANONYMOUS | kind, -1)
}

/// The same, with the content of a file, whose pages the kernel maps when they are accessed, and copies when they are
/// written.
#[cfg(all(feature = "pager", feature = "tracking"))]
pub(crate) fn map_image(file: BorrowedFd<'_>, len: usize) -> Result<(NonNull<u8>, bool), Errno> {
    map_unfilled(len, libc::MAP_NORESERVE, file.as_raw_fd())
}

fn map_unfilled(len: usize, kind: libc::c_int, file: RawFd) -> Result<(NonNull<u8>, bool), Errno> {
    // The kernel fills nothing that can't be accessed.
    // SAFETY: the kernel chooses an address where nothing is.
    let start =
        unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, libc::MAP_PRIVATE | kind, file, 0) };
    if start == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    let empty = || {
        // SAFETY: the range is that of the mapping above, to which nothing leads yet, here and below.
        check(unsafe { libc::madvise(start, len, libc::MADV_DONTFORK) })?;
        // Of what can be wrong with it, it can only be locked, which huge pages never are.
        // SAFETY: as above.
        let locked =
            kind & libc::MAP_HUGETLB == 0 && unsafe { libc::madvise(start, len, libc::MADV_DONTNEED) } == -1;
        if locked {
            // SAFETY: as above.
            check(unsafe { libc::munlock(start, len) })?;
        }
        // SAFETY: as above.
        check(unsafe { libc::mprotect(start, len, libc::PROT_READ | libc::PROT_WRITE) })?;
        Ok((NonNull::new(start.cast()).ok_or(Errno::ENOMEM)?, locked))
    };
    empty().inspect_err(|_| {
        // SAFETY: as above.
        unsafe { libc::munmap(start, len) };
    })
}

/// Takes guard pages away, as far as the kernel has such: MADV_GUARD_REMOVE (Linux 6.13), which changes no content.
#[cfg(all(feature = "pager", feature = "tracking"))]
pub(crate) fn remove_guards(start: *mut u8, len: usize) -> Result<(), Errno> {
    const MADV_GUARD_REMOVE: libc::c_int = 103;
    // SAFETY: makes pages accessible that are not; no content changes.
    match check(unsafe { libc::madvise(start.cast(), len, MADV_GUARD_REMOVE) }) {
        // A kernel without, or memory that can't have any.
        Err(Errno::EINVAL) => Ok(()),
        removed => removed.map(drop),
    }
}

/// Lets a range be read and written: mprotect(2).
///
/// # Safety
///
/// - The range is whole pages of memory of the caller's own.
#[cfg(all(feature = "pager", feature = "tracking"))]
pub(crate) unsafe fn make_writable(start: *mut u8, len: usize) -> Result<(), Errno> {
    // SAFETY: as the caller has made sure.
    check(unsafe { libc::mprotect(start.cast(), len, libc::PROT_READ | libc::PROT_WRITE) }).map(drop)
}

/// pread(2) into memory that Rust has no reference to. `EFAULT`: a part can't be written. `EIO`: the file ends before.
///
/// # Safety
///
/// - `len` bytes from `start` on are memory of the caller's own, or addresses where nothing is, and nothing borrows them.
#[cfg(all(feature = "pager", feature = "tracking"))]
pub(crate) unsafe fn read_into(
    file: BorrowedFd<'_>,
    offset: usize,
    start: *mut u8,
    len: usize,
) -> Result<(), Errno> {
    let mut done = 0;
    while done < len {
        let (to, at) = (start.wrapping_add(done), (offset + done) as libc::off64_t);
        // SAFETY: as the caller has made sure.
        let read = unsafe { libc::pread64(file.as_raw_fd(), to.cast(), len - done, at) };
        match usize::try_from(read) {
            Ok(0) => return Err(Errno::EIO),
            Ok(read) => done += read,
            Err(_) if Errno::last() == Errno::EINTR => {}
            Err(_) => return Err(Errno::last()),
        }
    }
    Ok(())
}

/// Has each page of a range locked once it is there: mlock2(2). Linux 4.4.
pub(crate) fn lock_on_fault(start: NonNull<u8>, len: usize) -> Result<(), Errno> {
    const MLOCK_ONFAULT: libc::c_int = 1;
    // SAFETY: nothing of the memory changes.
    let locked = unsafe { libc::syscall(libc::SYS_mlock2, start.as_ptr(), len, MLOCK_ONFAULT) };
    Errno::result(locked).map(drop)
}

/// Lets nobody read a part of a mapping, or lets it be read again: mprotect(2). The part is whole pages of it, but for the
/// mapping's end. `ENOMEM`: the process has as many mappings as it may.
#[cfg(any(feature = "pager", feature = "snapshot"))]
pub(crate) fn set_readable(map: &memmap2::MmapRaw, part: Range<usize>, readable: bool) -> Result<(), Errno> {
    assert!(part.start <= part.end && part.end <= map.len(), "{part:?} of {}", map.len());
    let start = map.as_mut_ptr().wrapping_add(part.start);
    let protection = if readable { libc::PROT_READ } else { libc::PROT_NONE };
    // SAFETY: the range is that of the mapping, to whose bytes no reference leads, and none of them changes.
    check(unsafe { libc::mprotect(start.cast(), part.len(), protection) }).map(drop)
}

/// Has a mapping take memory in pages of the base size. `EINVAL`: the kernel has no others.
#[cfg(all(feature = "pager", not(all(test, userfaultfd_loom))))]
pub(crate) fn no_huge_pages(map: &memmap2::MmapRaw) -> Result<(), Errno> {
    // SAFETY: the range is that of the mapping, in which nothing changes.
    check(unsafe { libc::madvise(map.as_mut_ptr().cast(), map.len(), libc::MADV_NOHUGEPAGE) }).map(drop)
}

/// Writes bytes to a mapping by process_vm_writev(2). What can't be written, such as pages behind the end of the file, is an
/// `EFAULT`, and would be a SIGBUS for a thread that wrote it.
#[cfg(feature = "pager")]
pub(crate) fn write_mapping(map: &memmap2::MmapRaw, at: usize, mut bytes: &[u8]) -> Result<(), Errno> {
    assert!(
        at <= map.len() && bytes.len() <= map.len() - at,
        "{} bytes at {at} of {}",
        bytes.len(),
        map.len()
    );
    let mut to = map.as_mut_ptr().wrapping_add(at);
    // SAFETY: touches no memory.
    let own = unsafe { libc::getpid() };
    loop {
        let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let remote = libc::iovec { iov_base: to.cast(), iov_len: bytes.len() };
        // SAFETY: the kernel reads the bytes, borrowed for the call, and writes to that many of the mapping, as has been
        // asserted. No reference leads to them.
        let written = unsafe { libc::process_vm_writev(own, &raw const local, 1, &raw const remote, 1, 0) };
        match usize::try_from(written) {
            Ok(written) if written == bytes.len() => return Ok(()),
            Ok(0) => return Err(Errno::EFAULT),
            Ok(written) => (bytes, to) = (&bytes[written..], to.wrapping_add(written)),
            Err(_) if Errno::last() == Errno::EINTR => {}
            Err(_) => return Err(Errno::last()),
        }
    }
}

/// process_vm_readv(2) of one range into a buffer that has room for it, from its beginning. Returns how many bytes were
/// read: fewer where something in the range can't be.
pub(crate) fn read_memory(
    pid: libc::pid_t,
    range: &Range<usize>,
    buffer: &mut Vec<u8>,
) -> Result<usize, Errno> {
    buffer.clear();
    let room = &mut buffer.spare_capacity_mut()[..range.len()];
    let local = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
    let base = std::ptr::without_provenance_mut(range.start);
    let remote = libc::iovec { iov_base: base, iov_len: room.len() };
    // SAFETY: the kernel writes at most as many bytes as `room`, borrowed for the call, has. What it reads from is
    // an address that only the kernel looks at, and it says so where there is nothing.
    let read = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    let read = usize::try_from(read).map_err(|_| Errno::last())?;
    // SAFETY: the kernel has written this number of bytes of the room.
    unsafe { buffer.set_len(read) };
    Ok(read)
}

/// Has memory of this process that may have to be read from a file be there, as far as it can be read: MADV_POPULATE_READ,
/// Linux 5.14, or a byte of each page read by the kernel. Raises no signal.
pub(crate) fn populate(start: *const libc::c_void, len: usize) {
    let page = page_size();
    let pages = start.addr() & !(page - 1)..(start.addr() + len).next_multiple_of(page);
    let at = std::ptr::with_exposed_provenance_mut(pages.start);
    // SAFETY: no content changes.
    let populated = check(unsafe { libc::madvise(at, pages.len(), libc::MADV_POPULATE_READ) });
    if populated != Err(Errno::EINVAL) {
        return;
    }
    // SAFETY: touches no memory.
    let own = unsafe { libc::getpid() };
    for page in pages.step_by(page) {
        let mut byte = 0_u8;
        let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let remote = libc::iovec { iov_base: std::ptr::without_provenance_mut(page), iov_len: 1 };
        // SAFETY: the kernel writes the byte. What it reads from is an address that only the kernel looks at.
        unsafe { libc::process_vm_readv(own, &raw const local, 1, &raw const remote, 1, 0) };
    }
}

/// Whether a page is mapped, or at least there to be. Where the kernel won't tell it is taken to be. Async-signal-safe.
pub(crate) fn is_resident(page: *mut std::ffi::c_void) -> bool {
    let mut resident = 1_u8;
    // SAFETY: the kernel writes a byte for the page, which is borrowed for the call.
    let _refused = check(unsafe { libc::mincore(page, 1, (&raw mut resident).cast()) });
    resident & 1 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mappings side by side are one to the kernel, which can't be split where the process has as many as it may.
    #[test]
    fn unmap_succeeds_at_limit_of_mappings() {
        crate::support::require!();
        let limit = crate::proc_maps::max_mappings().expect("/proc tells");
        let few = limit < 100_000;
        if !crate::support::has(crate::support::test_name!(), "a limit of mappings that is soon reached", few)
        {
            return;
        }
        crate::support::child::run_well(crate::support::test_name!(), || {
            let page = page_size();
            let start = map(3 * page).unwrap();
            let middle = start.map_addr(|address| address.saturating_add(page));
            // SAFETY: a page that was just mapped, and is nobody else's.
            unsafe { middle.write_volatile(7) };
            let many = memmap2::MmapOptions::new().len(limit * page).no_reserve_swap().map_anon().unwrap();
            let many = memmap2::MmapRaw::from(many);
            for odd in (1..limit).step_by(2) {
                let odd = many.as_mut_ptr().wrapping_add(odd * page).cast();
                // SAFETY: a page of the mapping, which nobody refers to.
                if unsafe { libc::mprotect(odd, page, libc::PROT_READ) } == -1 {
                    break;
                }
            }
            // SAFETY: of what was mapped above, and not used any more.
            unsafe { unmap(middle, page) };
            // SAFETY: it is mapped still, as the process has no mapping to spare.
            assert_eq!(unsafe { middle.read_volatile() }, 0);
            drop(many);
            // SAFETY: as mapped above, and not used any more.
            unsafe { unmap(start, 3 * page) };
        });
    }
}
