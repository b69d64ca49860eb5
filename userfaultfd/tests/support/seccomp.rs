//! A filter of system calls, as sandboxes have.

use userfaultfd::Errno;

use super::raw::check;

/// Has userfaultfd(2) answer an errno in the calling thread from now on. Tells whether the kernel has
/// filters.
pub(crate) fn refuse_userfaultfd(errno: Errno) -> bool {
    const LOAD_WORD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const JUMP_IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let instruction = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let filter = [
        instruction(LOAD_WORD, 0, 0, std::mem::offset_of!(libc::seccomp_data, nr) as u32),
        instruction(JUMP_IF_EQUAL, 0, 1, libc::SYS_userfaultfd as u32),
        instruction(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        instruction(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // The kernel takes all of them as longs.
    let (one, none, mode): (libc::c_ulong, libc::c_ulong, libc::c_ulong) =
        (1, 0, libc::SECCOMP_MODE_FILTER.into());
    // Without it only the superuser may have a filter.
    // SAFETY: touches no memory.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, one, none, none, none) }).unwrap();
    // SAFETY: the program and its instructions are borrowed for the call, in which the kernel copies them.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) };
    check(set).is_ok()
}
