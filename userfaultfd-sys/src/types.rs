//! The integers of `linux/types.h`. On some 64-bit architectures C's `__u64` is `unsigned long`; the width is the same.

#![expect(non_camel_case_types, reason = "the kernel's names")]

/// 8 bits, unsigned.
pub type __u8 = u8;
/// 16 bits, unsigned.
pub type __u16 = u16;
/// 32 bits, unsigned.
pub type __u32 = u32;
/// 64 bits, unsigned.
pub type __u64 = u64;
/// 8 bits, signed.
pub type __s8 = i8;
/// 16 bits, signed.
pub type __s16 = i16;
/// 32 bits, signed.
pub type __s32 = i32;
/// 64 bits, signed.
pub type __s64 = i64;
