//! The bindings of all targets against what can be known of them without a kernel: the parts that ioctl numbers are
//! built from, the names that are promised, and other people's bindings.

use std::mem::size_of;

use userfaultfd_sys::*;

#[path = "../build/names.rs"]
mod names;

/// The committed files, of this target and of others.
macro_rules! committed {
    ($module:ident, $file:literal) => {
        mod $module {
            #![expect(
                dead_code,
                unreachable_pub,
                reason = "public where it is meant to be, and used in part here"
            )]
            #![expect(
                clippy::multiple_unsafe_ops_per_block,
                clippy::undocumented_unsafe_blocks,
                reason = "generated: see src/bindings.rs"
            )]
            use userfaultfd_sys::{__s64, __u8, __u16, __u32, __u64};
            include!($file);
            pub const TEXT: &str = include_str!($file);
        }
    };
}
committed!(generic, "../src/bindings/generic.rs");
committed!(mips_powerpc_sparc, "../src/bindings/mips_powerpc_sparc.rs");

/// How an architecture builds ioctl numbers: `_IOC_*` of its `asm/ioctl.h`.
struct Encoding {
    size_bits: u32,
    none: u32,
    read: u32,
    write: u32,
}

const GENERIC: Encoding = Encoding { size_bits: 14, none: 0, read: 2, write: 1 };
const MIPS_POWERPC_SPARC_ALPHA: Encoding = Encoding { size_bits: 13, none: 1, read: 2, write: 4 };
const PARISC: Encoding = Encoding { size_bits: 14, none: 0, read: 1, write: 2 };

impl Encoding {
    fn number(&self, direction: Direction, kind: u32, nr: u32, size: usize) -> u32 {
        let direction = match direction {
            Direction::None => self.none,
            Direction::Read => self.read,
            Direction::Write => self.write,
            Direction::Both => self.read | self.write,
        };
        direction << (16 + self.size_bits) | (size as u32) << 16 | kind << 8 | nr
    }
}

#[derive(Clone, Copy)]
enum Direction {
    None,
    Read,
    Write,
    Both,
}
use Direction::{Both, None, Read, Write};

struct Ioctl {
    name: &'static str,
    direction: Direction,
    kind: u32,
    nr: u32,
    size: usize,
    bound: u32,
    bound_generic: u32,
    bound_mips_powerpc_sparc: u32,
}

macro_rules! ioctls {
    ($($name:ident: $direction:ident $kind:literal $nr:literal $size:expr;)*) => {
        &[$(Ioctl {
            name: stringify!($name),
            direction: $direction,
            kind: $kind,
            nr: $nr,
            size: $size,
            bound: $name,
            bound_generic: generic::$name,
            bound_mips_powerpc_sparc: mips_powerpc_sparc::$name,
        }),*]
    };
}

/// UNREGISTER and WAKE say "read" although the kernel reads their argument: a mistake of Linux 4.3, kept.
const IOCTLS: &[Ioctl] = ioctls! {
    USERFAULTFD_IOC_NEW: None 0xaa 0x00 0;
    UFFDIO_API: Both 0xaa 0x3f size_of::<uffdio_api>();
    UFFDIO_REGISTER: Both 0xaa 0x00 size_of::<uffdio_register>();
    UFFDIO_UNREGISTER: Read 0xaa 0x01 size_of::<uffdio_range>();
    UFFDIO_WAKE: Read 0xaa 0x02 size_of::<uffdio_range>();
    UFFDIO_COPY: Both 0xaa 0x03 size_of::<uffdio_copy>();
    UFFDIO_ZEROPAGE: Both 0xaa 0x04 size_of::<uffdio_zeropage>();
    UFFDIO_MOVE: Both 0xaa 0x05 size_of::<uffdio_move>();
    UFFDIO_WRITEPROTECT: Both 0xaa 0x06 size_of::<uffdio_writeprotect>();
    UFFDIO_CONTINUE: Both 0xaa 0x07 size_of::<uffdio_continue>();
    UFFDIO_POISON: Both 0xaa 0x08 size_of::<uffdio_poison>();
    UFFDIO_RWPROTECT: Both 0xaa 0x09 size_of::<uffdio_rwprotect>();
    UFFDIO_SET_MODE: Write 0xaa 0x0a size_of::<uffdio_set_mode>();
    PAGEMAP_SCAN: Both 0x66 0x10 size_of::<pm_scan_arg>();
};

#[test]
fn numbers_are_built_from_their_parts() {
    for ioctl in IOCTLS {
        let number = |encoding: &Encoding| encoding.number(ioctl.direction, ioctl.kind, ioctl.nr, ioctl.size);
        assert_eq!(ioctl.bound_generic, number(&GENERIC), "{}", ioctl.name);
        assert_eq!(ioctl.bound_mips_powerpc_sparc, number(&MIPS_POWERPC_SPARC_ALPHA), "{}", ioctl.name);
    }
}

/// The three encodings themselves, against numbers that are known from the kernel's side.
#[test]
fn encodings_give_the_known_numbers() {
    let known = [
        ("USERFAULTFD_IOC_NEW", 0x0000_aa00, 0x2000_aa00, 0x0000_aa00),
        ("UFFDIO_UNREGISTER", 0x8010_aa01, 0x4010_aa01, 0x4010_aa01),
        ("UFFDIO_WAKE", 0x8010_aa02, 0x4010_aa02, 0x4010_aa02),
        ("UFFDIO_SET_MODE", 0x4010_aa0a, 0x8010_aa0a, 0x8010_aa0a),
        ("UFFDIO_API", 0xc018_aa3f, 0xc018_aa3f, 0xc018_aa3f),
        ("UFFDIO_REGISTER", 0xc020_aa00, 0xc020_aa00, 0xc020_aa00),
        ("UFFDIO_COPY", 0xc028_aa03, 0xc028_aa03, 0xc028_aa03),
        ("UFFDIO_ZEROPAGE", 0xc020_aa04, 0xc020_aa04, 0xc020_aa04),
        ("UFFDIO_MOVE", 0xc028_aa05, 0xc028_aa05, 0xc028_aa05),
        ("UFFDIO_WRITEPROTECT", 0xc018_aa06, 0xc018_aa06, 0xc018_aa06),
        ("UFFDIO_CONTINUE", 0xc020_aa07, 0xc020_aa07, 0xc020_aa07),
        ("UFFDIO_POISON", 0xc020_aa08, 0xc020_aa08, 0xc020_aa08),
        ("UFFDIO_RWPROTECT", 0xc018_aa09, 0xc018_aa09, 0xc018_aa09),
        ("PAGEMAP_SCAN", 0xc060_6610, 0xc060_6610, 0xc060_6610),
    ];
    assert_eq!(known.len(), IOCTLS.len());
    for (name, generic, mips_powerpc_sparc_alpha, parisc) in known {
        let ioctl = IOCTLS.iter().find(|ioctl| ioctl.name == name).unwrap();
        let number = |encoding: &Encoding| encoding.number(ioctl.direction, ioctl.kind, ioctl.nr, ioctl.size);
        assert_eq!(number(&GENERIC), generic, "{name}");
        assert_eq!(number(&MIPS_POWERPC_SPARC_ALPHA), mips_powerpc_sparc_alpha, "{name}");
        assert_eq!(number(&PARISC), parisc, "{name}");
    }
}

#[test]
fn this_target_has_the_numbers_of_its_architecture() {
    let differs = cfg!(any(
        target_arch = "mips",
        target_arch = "mips32r6",
        target_arch = "mips64",
        target_arch = "mips64r6",
        target_arch = "powerpc",
        target_arch = "powerpc64",
        target_arch = "sparc",
        target_arch = "sparc64"
    ));
    for ioctl in IOCTLS {
        let expected = if differs { ioctl.bound_mips_powerpc_sparc } else { ioctl.bound_generic };
        assert_eq!(ioctl.bound, expected, "{}", ioctl.name);
    }
}

/// So what `src/layout.rs` checks for one file, when the crate is compiled, holds for the other.
#[test]
fn committed_files_differ_in_four_numbers_only() {
    let lines = generic::TEXT.lines().zip(mips_powerpc_sparc::TEXT.lines());
    let different: Vec<_> =
        lines.filter(|(a, b)| a != b).map(|(a, _)| a.split([' ', ':']).nth(2).unwrap()).collect();
    assert_eq!(generic::TEXT.lines().count(), mips_powerpc_sparc::TEXT.lines().count());
    assert_eq!(different, ["USERFAULTFD_IOC_NEW", "UFFDIO_UNREGISTER", "UFFDIO_WAKE", "UFFDIO_SET_MODE"]);
}

#[test]
fn promised_names_alone_are_bound() {
    let bound = |text: &'static str| {
        let items = text.lines().filter_map(|line| line.strip_prefix("pub "));
        let names = items.filter_map(|item| item.split([' ', ':']).nth(1));
        let mut names: Vec<_> = names.filter(|name| !name.contains("__bindgen_ty_")).collect();
        names.sort_unstable();
        names
    };
    let mut promised = names::NAMES.to_vec();
    promised.sort_unstable();
    for text in [generic::TEXT, mips_powerpc_sparc::TEXT] {
        assert_eq!(names::missing(text), [""; 0]);
        assert_eq!(bound(text), promised);
    }
}

#[test]
fn aggregates_have_every_bit_that_has_a_name() {
    assert_eq!(UFFD_API_FEATURES, 0x7_ffff);
    assert_eq!(UFFD_API_IOCTLS, 0x8000_0000_0000_0403);
    assert_eq!(UFFD_API_RANGE_IOCTLS, 0x3fc);
    assert_eq!(UFFD_API_RANGE_IOCTLS_BASIC, 0x3cc);
    assert_eq!(UFFD_API_REGISTER_MODES, 0xf);
}

/// Every name with its value, as the header has it: other people's bindings lack what is new, and the aggregates are the
/// same whichever of two bits has which name.
#[test]
fn values_are_those_of_the_header() {
    macro_rules! are {
        ($($name:ident = $value:expr;)*) => {
            $(
                assert_eq!($name as u64, $value, stringify!($name));
                assert_eq!(generic::$name as u64, $value, "generic {}", stringify!($name));
                assert_eq!(mips_powerpc_sparc::$name as u64, $value, "mips {}", stringify!($name));
            )*
            // Numbers of ioctls differ by architecture, and are rebuilt from their parts elsewhere.
            let valued = [$(stringify!($name)),*];
            let constants = names::NAMES.iter().filter(|name| {
                let aggregate = name.starts_with("UFFD_API_");
                let number = IOCTLS.iter().any(|ioctl| ioctl.name == **name);
                let structure = name.chars().all(|letter| letter.is_lowercase() || letter == '_');
                !(aggregate || number || structure)
            });
            let missing: Vec<_> = constants.filter(|name| !valued.contains(name)).collect();
            assert_eq!(missing, [&""; 0], "no value is checked");
        };
    }
    are! {
        UFFD_USER_MODE_ONLY = 1; USERFAULTFD_IOC = 0xaa; UFFD_API = 0xaa; UFFDIO = 0xaa;
        _UFFDIO_REGISTER = 0; _UFFDIO_UNREGISTER = 1; _UFFDIO_WAKE = 2; _UFFDIO_COPY = 3; _UFFDIO_ZEROPAGE = 4;
        _UFFDIO_MOVE = 5; _UFFDIO_WRITEPROTECT = 6; _UFFDIO_CONTINUE = 7; _UFFDIO_POISON = 8; _UFFDIO_RWPROTECT = 9;
        _UFFDIO_SET_MODE = 0xa; _UFFDIO_API = 0x3f;
        UFFDIO_REGISTER_MODE_MISSING = 1; UFFDIO_REGISTER_MODE_WP = 1 << 1; UFFDIO_REGISTER_MODE_MINOR = 1 << 2;
        UFFDIO_REGISTER_MODE_RWP = 1 << 3;
        UFFDIO_COPY_MODE_DONTWAKE = 1; UFFDIO_COPY_MODE_WP = 1 << 1;
        UFFDIO_ZEROPAGE_MODE_DONTWAKE = 1;
        // The other way round than with the others.
        UFFDIO_WRITEPROTECT_MODE_WP = 1; UFFDIO_WRITEPROTECT_MODE_DONTWAKE = 1 << 1;
        UFFDIO_RWPROTECT_MODE_RWP = 1; UFFDIO_RWPROTECT_MODE_DONTWAKE = 1 << 1;
        UFFDIO_CONTINUE_MODE_DONTWAKE = 1; UFFDIO_CONTINUE_MODE_WP = 1 << 1;
        UFFDIO_POISON_MODE_DONTWAKE = 1;
        UFFDIO_MOVE_MODE_DONTWAKE = 1; UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES = 1 << 1;
        UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1; UFFD_FEATURE_EVENT_FORK = 1 << 1; UFFD_FEATURE_EVENT_REMAP = 1 << 2;
        UFFD_FEATURE_EVENT_REMOVE = 1 << 3; UFFD_FEATURE_MISSING_HUGETLBFS = 1 << 4;
        UFFD_FEATURE_MISSING_SHMEM = 1 << 5; UFFD_FEATURE_EVENT_UNMAP = 1 << 6; UFFD_FEATURE_SIGBUS = 1 << 7;
        UFFD_FEATURE_THREAD_ID = 1 << 8; UFFD_FEATURE_MINOR_HUGETLBFS = 1 << 9; UFFD_FEATURE_MINOR_SHMEM = 1 << 10;
        UFFD_FEATURE_EXACT_ADDRESS = 1 << 11; UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12;
        UFFD_FEATURE_WP_UNPOPULATED = 1 << 13; UFFD_FEATURE_POISON = 1 << 14; UFFD_FEATURE_WP_ASYNC = 1 << 15;
        UFFD_FEATURE_MOVE = 1 << 16; UFFD_FEATURE_RWP = 1 << 17; UFFD_FEATURE_RWP_ASYNC = 1 << 18;
        UFFD_EVENT_PAGEFAULT = 0x12; UFFD_EVENT_FORK = 0x13; UFFD_EVENT_REMAP = 0x14; UFFD_EVENT_REMOVE = 0x15;
        UFFD_EVENT_UNMAP = 0x16;
        UFFD_PAGEFAULT_FLAG_WRITE = 1; UFFD_PAGEFAULT_FLAG_WP = 1 << 1; UFFD_PAGEFAULT_FLAG_MINOR = 1 << 2;
        UFFD_PAGEFAULT_FLAG_RWP = 1 << 3;
        PM_SCAN_WP_MATCHING = 1; PM_SCAN_CHECK_WPASYNC = 1 << 1;
        PAGE_IS_WPALLOWED = 1; PAGE_IS_WRITTEN = 1 << 1; PAGE_IS_FILE = 1 << 2; PAGE_IS_PRESENT = 1 << 3;
        PAGE_IS_SWAPPED = 1 << 4; PAGE_IS_PFNZERO = 1 << 5; PAGE_IS_HUGE = 1 << 6; PAGE_IS_SOFT_DIRTY = 1 << 7;
        PAGE_IS_GUARD = 1 << 8; PAGE_IS_ACCESSED = 1 << 9;
    }
}

/// Code is written against the types, too: those of userfaultfd-sys 0.6, and the widths of the fields they go into.
#[test]
fn constants_have_the_types_of_their_fields() {
    let uffdio_api { api, features, ioctls } =
        uffdio_api { api: UFFD_API, features: UFFD_API_FEATURES, ioctls: 1 << _UFFDIO_API };
    let _: [u64; 3] = [api, features, ioctls];
    let _: [u64; 2] = [UFFD_FEATURE_RWP_ASYNC, UFFD_API_RANGE_IOCTLS];
    let _: [u64; 3] = [UFFDIO_REGISTER_MODE_RWP, UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES, UFFD_PAGEFAULT_FLAG_RWP];
    let _: [u64; 2] = [PAGE_IS_ACCESSED, PM_SCAN_CHECK_WPASYNC];
    let _: [i64; 2] = [uffdio_copy::default().copy, uffdio_zeropage::default().zeropage];
    let _: [i64; 2] = [uffdio_continue::default().mapped, uffdio_poison::default().updated];
    let _: i64 = uffdio_move::default().move_;
    let _: [u8; 3] = [uffd_msg::default().event, UFFD_EVENT_UNMAP, UFFDIO];
    let _: [u32; 4] = [UFFDIO_COPY, USERFAULTFD_IOC, USERFAULTFD_IOC_NEW, UFFD_USER_MODE_ONLY];
    let _: libc::c_long = SYS_userfaultfd;
}

#[test]
fn system_call_number_matches_other_crates() {
    assert_eq!(SYS_userfaultfd, libc::SYS_userfaultfd);
    assert_eq!(SYS_userfaultfd, linux_raw_sys::general::__NR_userfaultfd as libc::c_long);
}

/// linux-raw-sys is generated from the headers of Linux 6.17, by other people's program. What isn't named here, it
/// doesn't have.
#[test]
fn values_are_those_of_linux_raw_sys() {
    macro_rules! same {
        ($module:ident: $($name:ident)*) => {
            $(assert_eq!($name as u64, linux_raw_sys::$module::$name as u64, stringify!($name));)*
        };
    }
    same!(general:
        USERFAULTFD_IOC UFFD_USER_MODE_ONLY UFFD_API UFFDIO
        _UFFDIO_API _UFFDIO_CONTINUE _UFFDIO_COPY _UFFDIO_MOVE _UFFDIO_POISON _UFFDIO_REGISTER _UFFDIO_UNREGISTER
        _UFFDIO_WAKE _UFFDIO_WRITEPROTECT _UFFDIO_ZEROPAGE
        UFFDIO_REGISTER_MODE_MINOR UFFDIO_REGISTER_MODE_MISSING UFFDIO_REGISTER_MODE_WP
        UFFDIO_COPY_MODE_DONTWAKE UFFDIO_COPY_MODE_WP UFFDIO_ZEROPAGE_MODE_DONTWAKE
        UFFD_FEATURE_EVENT_FORK UFFD_FEATURE_EVENT_REMAP UFFD_FEATURE_EVENT_REMOVE UFFD_FEATURE_EVENT_UNMAP
        UFFD_FEATURE_EXACT_ADDRESS UFFD_FEATURE_MINOR_HUGETLBFS UFFD_FEATURE_MINOR_SHMEM
        UFFD_FEATURE_MISSING_HUGETLBFS UFFD_FEATURE_MISSING_SHMEM UFFD_FEATURE_MOVE UFFD_FEATURE_PAGEFAULT_FLAG_WP
        UFFD_FEATURE_POISON UFFD_FEATURE_SIGBUS UFFD_FEATURE_THREAD_ID UFFD_FEATURE_WP_ASYNC
        UFFD_FEATURE_WP_HUGETLBFS_SHMEM UFFD_FEATURE_WP_UNPOPULATED
        UFFD_EVENT_FORK UFFD_EVENT_PAGEFAULT UFFD_EVENT_REMAP UFFD_EVENT_REMOVE UFFD_EVENT_UNMAP
        UFFD_PAGEFAULT_FLAG_MINOR UFFD_PAGEFAULT_FLAG_WP UFFD_PAGEFAULT_FLAG_WRITE
        PM_SCAN_CHECK_WPASYNC PM_SCAN_WP_MATCHING
        PAGE_IS_FILE PAGE_IS_GUARD PAGE_IS_HUGE PAGE_IS_PFNZERO PAGE_IS_PRESENT PAGE_IS_SOFT_DIRTY PAGE_IS_SWAPPED
        PAGE_IS_WPALLOWED PAGE_IS_WRITTEN
    );
    same!(ioctl:
        UFFDIO_API UFFDIO_CONTINUE UFFDIO_COPY UFFDIO_REGISTER UFFDIO_UNREGISTER UFFDIO_WAKE UFFDIO_WRITEPROTECT
        UFFDIO_ZEROPAGE
    );
}

#[test]
fn structures_have_the_sizes_of_linux_raw_sys() {
    macro_rules! same {
        ($($name:ident)*) => {
            $(assert_eq!(size_of::<$name>(), size_of::<linux_raw_sys::general::$name>(), stringify!($name));)*
        };
    }
    same!(uffd_msg uffdio_api uffdio_continue uffdio_copy uffdio_move uffdio_poison uffdio_range uffdio_register
        uffdio_writeprotect uffdio_zeropage page_region pm_scan_arg);
}
