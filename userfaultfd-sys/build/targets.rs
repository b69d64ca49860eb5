//! What differs between targets: the encoding of ioctl numbers, and the number of the system call.

/// How an ioctl number packs direction and size. (Linux has a third way, parisc's, but Rust has no such target.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// 14 bits of size, 2 of direction: none 0, write 1, read 2.
    Generic,
    /// 13 bits of size, 3 of direction: none 1, read 2, write 4.
    MipsPowerpcSparc,
}

impl Encoding {
    /// The committed bindings with this encoding, below `src/bindings/`.
    pub(crate) fn file(self) -> &'static str {
        match self {
            Encoding::Generic => "generic.rs",
            Encoding::MipsPowerpcSparc => "mips_powerpc_sparc.rs",
        }
    }
}

/// An ABI of Linux that Rust has a target for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    /// Rust's `target_arch`.
    pub(crate) arch: &'static str,
    /// Rust's `target_pointer_width`.
    pub(crate) pointer_width: u32,
    /// The kernel's name of the architecture: the directory below `arch/`.
    pub(crate) kernel_arch: &'static str,
    /// A triple by which clang knows the ABI.
    pub(crate) clang: &'static str,
    pub(crate) encoding: Encoding,
    /// `__NR_userfaultfd`.
    pub(crate) syscall: u32,
}

const fn target(
    arch: &'static str,
    pointer_width: u32,
    kernel_arch: &'static str,
    clang: &'static str,
    encoding: Encoding,
    syscall: u32,
) -> Target {
    Target { arch, pointer_width, kernel_arch, clang, encoding, syscall }
}

use Encoding::{Generic, MipsPowerpcSparc};

/// The Linux and Android targets of `rustc --print target-list`, and mips n32. Not wasm32 (WALI): its system calls
/// aren't the kernel's.
#[rustfmt::skip]
pub(crate) const TARGETS: &[Target] = &[
    target("aarch64",     64, "arm64",     "aarch64-linux-gnu",            Generic,          282),
    target("aarch64",     32, "arm64",     "aarch64-linux-gnu",            Generic,          282),
    target("arm",         32, "arm",       "arm-linux-gnueabi",            Generic,          388),
    target("csky",        32, "csky",      "csky-linux-gnu",               Generic,          282),
    target("hexagon",     32, "hexagon",   "hexagon-linux-musl",           Generic,          282),
    target("loongarch64", 64, "loongarch", "loongarch64-linux-gnu",        Generic,          282),
    target("m68k",        32, "m68k",      "m68k-linux-gnu",               Generic,          373),
    target("mips",        32, "mips",      "mips-linux-gnu",               MipsPowerpcSparc, 4357),
    target("mips32r6",    32, "mips",      "mipsisa32r6-linux-gnu",        MipsPowerpcSparc, 4357),
    target("mips64",      64, "mips",      "mips64-linux-gnuabi64",        MipsPowerpcSparc, 5317),
    target("mips64",      32, "mips",      "mips64-linux-gnuabin32",       MipsPowerpcSparc, 6321),
    target("mips64r6",    64, "mips",      "mipsisa64r6-linux-gnuabi64",   MipsPowerpcSparc, 5317),
    target("mips64r6",    32, "mips",      "mipsisa64r6-linux-gnuabin32",  MipsPowerpcSparc, 6321),
    target("powerpc",     32, "powerpc",   "powerpc-linux-gnu",            MipsPowerpcSparc, 364),
    target("powerpc64",   64, "powerpc",   "powerpc64-linux-gnu",          MipsPowerpcSparc, 364),
    target("riscv32",     32, "riscv",     "riscv32-linux-gnu",            Generic,          282),
    target("riscv64",     64, "riscv",     "riscv64-linux-gnu",            Generic,          282),
    target("s390x",       64, "s390",      "s390x-linux-gnu",              Generic,          355),
    target("sparc",       32, "sparc",     "sparc-linux-gnu",              MipsPowerpcSparc, 352),
    target("sparc64",     64, "sparc",     "sparc64-linux-gnu",            MipsPowerpcSparc, 352),
    target("x86",         32, "x86",       "i686-linux-gnu",               Generic,          374),
    target("x86_64",      64, "x86",       "x86_64-linux-gnu",             Generic,          323),
    target("x86_64",      32, "x86",       "x86_64-linux-gnux32",          Generic,          0x4000_0000 + 323),
];
