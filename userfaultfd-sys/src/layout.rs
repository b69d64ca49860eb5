//! The layout that the kernel has, checked when the crate is compiled, on every target.
//!
//! It is the same everywhere: all fields are naturally aligned, so it doesn't matter that 64-bit integers are aligned
//! to less than 8 bytes on some 32-bit targets. Only the sizes of the structures inside `uffd_msg` vary there.

use core::mem::{align_of, offset_of, size_of};

use crate::*;

macro_rules! layout {
    ($($name:ident: $size:literal { $($field:ident: $offset:literal),* })*) => {
        $(
            const _: () = assert!(size_of::<$name>() == $size);
            $(const _: () = assert!(offset_of!($name, $field) == $offset);)*
        )*
    };
}

layout! {
    uffdio_api: 24 { api: 0, features: 8, ioctls: 16 }
    uffdio_range: 16 { start: 0, len: 8 }
    uffdio_register: 32 { range: 0, mode: 16, ioctls: 24 }
    uffdio_copy: 40 { dst: 0, src: 8, len: 16, mode: 24, copy: 32 }
    uffdio_zeropage: 32 { range: 0, mode: 16, zeropage: 24 }
    uffdio_writeprotect: 24 { range: 0, mode: 16 }
    uffdio_continue: 32 { range: 0, mode: 16, mapped: 24 }
    uffdio_poison: 32 { range: 0, mode: 16, updated: 24 }
    uffdio_move: 40 { dst: 0, src: 8, len: 16, mode: 24, move_: 32 }
    uffdio_rwprotect: 24 { range: 0, mode: 16 }
    uffdio_set_mode: 16 { enable: 0, disable: 8 }

    uffd_msg: 32 { event: 0, reserved1: 1, reserved2: 2, reserved3: 4, arg: 8 }

    page_region: 24 { start: 0, end: 8, categories: 16 }
    pm_scan_arg: 96 {
        size: 0, flags: 8, start: 16, end: 24, walk_end: 32, vec: 40, vec_len: 48, max_pages: 56,
        category_inverted: 64, category_mask: 72, category_anyof_mask: 80, return_mask: 88
    }
}

const _: () = assert!(align_of::<uffd_msg>() == 1);
const _: () = assert!(offset_of!(uffd_msg, arg.pagefault.flags) == 8);
const _: () = assert!(offset_of!(uffd_msg, arg.pagefault.address) == 16);
const _: () = assert!(offset_of!(uffd_msg, arg.pagefault.feat.ptid) == 24);
const _: () = assert!(offset_of!(uffd_msg, arg.fork.ufd) == 8);
const _: () = assert!(offset_of!(uffd_msg, arg.remap.from) == 8);
const _: () = assert!(offset_of!(uffd_msg, arg.remap.to) == 16);
const _: () = assert!(offset_of!(uffd_msg, arg.remap.len) == 24);
const _: () = assert!(offset_of!(uffd_msg, arg.remove.start) == 8);
const _: () = assert!(offset_of!(uffd_msg, arg.remove.end) == 16);
