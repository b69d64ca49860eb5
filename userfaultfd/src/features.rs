//! The features, operations and modes of userfaultfd as flags, each with its release, and what the running kernel has.

use std::fmt;

use crate::sys;

/// A flag that this version of the crate knows by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Known<F> {
    /// The flag.
    pub flag: F,
    /// Its name in this crate.
    pub name: &'static str,
    /// The Linux release that brought it, as (major, minor). This is for people to read, since distributions backport
    /// features and an architecture may lack one. Programs ask [`Support::probe`].
    pub since: (u16, u16),
    /// What the flag means, in a few words.
    pub what: &'static str,
}

/// Defines a flag type of the kernel's: one entry a flag, from which come the constant, its docs and the
/// since-table.
///
/// A flag that a new kernel brings is one more entry here.
macro_rules! kernel_flags {
    (
        $(#[$meta:meta])*
        pub struct $Flags:ident {
            $( $(#[$($flag_meta:tt)*])* $NAME:ident = $value:expr, $major:literal . $minor:literal, $what:literal; )*
        }
        $($extern:tt)*
    ) => {
        bitflags::bitflags! {
            $(#[$meta])*
            #[derive(Copy, Clone, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
            pub struct $Flags: u64 {
                $(
                    #[doc = concat!($what, ".")]
                    #[doc = ""]
                    $(#[$($flag_meta)*])*
                    #[doc = ""]
                    #[doc = concat!("Since Linux ", stringify!($major), ".", stringify!($minor), ".")]
                    const $NAME = $value;
                )*
                $($extern)*
            }
        }

        impl $Flags {
            /// Returns every flag that this version of the crate has a name for, with the release that brought it.
            #[must_use]
            pub const fn known() -> &'static [$crate::Known<Self>] {
                &[$( $crate::Known {
                    flag: Self::$NAME, name: stringify!($NAME), since: ($major, $minor), what: $what,
                }, )*]
            }
        }

        impl std::fmt::Display for $Flags {
            /// Names joined by `|`, unknown bits in hexadecimal, `none` for the empty set.
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                if self.is_empty() { f.write_str("none") } else { bitflags::parser::to_writer(self, f) }
            }
        }
    };
}

pub(crate) use kernel_flags;

kernel_flags! {
    /// Features of a userfaultfd: what [`UffdBuilder`](crate::UffdBuilder) requires or requests, and what a kernel offers.
    ///
    /// Names are the kernel's without `UFFD_FEATURE_`. Some features change behaviour and work only when
    /// asked for; others only tell what the kernel can do, work without being asked for, and are worth
    /// requiring for the clear error on a kernel that lacks them. Bits without a name, from newer kernels,
    /// are kept.
    ///
    /// Source: `UFFDIO_API(2const)`.
    pub struct FeatureFlags {
        /// Informs: [`RegisterMode::WRITE_PROTECT`] works on private anonymous memory.
        #[doc(alias = "UFFD_FEATURE_PAGEFAULT_FLAG_WP")]
        PAGEFAULT_FLAG_WP = sys::UFFD_FEATURE_PAGEFAULT_FLAG_WP, 5 . 7, "Write-protect faults on anonymous memory";
        /// Changes behaviour: a fork of the process is an [`Event::Fork`](crate::Event::Fork) that carries a
        /// descriptor for the child's memory. Takes `CAP_SYS_PTRACE` in the initial user namespace.
        #[doc(alias = "UFFD_FEATURE_EVENT_FORK")]
        EVENT_FORK = sys::UFFD_FEATURE_EVENT_FORK, 4 . 11, "An event for each fork of the process";
        /// Changes behaviour: a moved mapping stays registered and is an
        /// [`Event::Remap`](crate::Event::Remap). Without it the memory at its new place is silently not
        /// registered.
        #[doc(alias = "UFFD_FEATURE_EVENT_REMAP")]
        EVENT_REMAP = sys::UFFD_FEATURE_EVENT_REMAP, 4 . 11, "An event for each mremap(2)";
        /// Changes behaviour: dropped pages are an [`Event::Remove`](crate::Event::Remove), before they go.
        #[doc(alias = "UFFD_FEATURE_EVENT_REMOVE")]
        EVENT_REMOVE = sys::UFFD_FEATURE_EVENT_REMOVE, 4 . 11, "An event for MADV_DONTNEED, _FREE and _REMOVE";
        /// Informs: [`RegisterMode::MISSING`] works on hugetlb memory.
        #[doc(alias = "UFFD_FEATURE_MISSING_HUGETLBFS")]
        MISSING_HUGETLBFS = sys::UFFD_FEATURE_MISSING_HUGETLBFS, 4 . 11, "Missing faults on hugetlb memory";
        /// Informs: [`RegisterMode::MISSING`] works on shared memory (memfd, tmpfs, shared anonymous),
        /// but not on segments of System V.
        #[doc(alias = "UFFD_FEATURE_MISSING_SHMEM")]
        MISSING_SHMEM = sys::UFFD_FEATURE_MISSING_SHMEM, 4 . 11, "Missing faults on shared memory";
        /// Changes behaviour: an unmapped range is an [`Event::Unmap`](crate::Event::Unmap), after it has
        /// gone.
        #[doc(alias = "UFFD_FEATURE_EVENT_UNMAP")]
        EVENT_UNMAP = sys::UFFD_FEATURE_EVENT_UNMAP, 4 . 11, "An event for each munmap(2)";
        /// Changes behaviour: no fault is delivered; the faulting thread gets SIGBUS with the address
        /// instead.
        #[doc(alias = "UFFD_FEATURE_SIGBUS")]
        SIGBUS = sys::UFFD_FEATURE_SIGBUS, 4 . 14, "Faults raise SIGBUS in the faulting thread";
        /// Changes behaviour: a fault tells the thread that ran into it; without it the id is 0.
        #[doc(alias = "UFFD_FEATURE_THREAD_ID")]
        THREAD_ID = sys::UFFD_FEATURE_THREAD_ID, 4 . 14, "Faults tell the faulting thread's id";
        /// Informs: [`RegisterMode::MINOR`] works on hugetlb memory.
        #[doc(alias = "UFFD_FEATURE_MINOR_HUGETLBFS")]
        MINOR_HUGETLBFS = sys::UFFD_FEATURE_MINOR_HUGETLBFS, 5 . 13, "Minor faults on hugetlb memory";
        /// Informs: [`RegisterMode::MINOR`] works on shared memory.
        #[doc(alias = "UFFD_FEATURE_MINOR_SHMEM")]
        MINOR_SHMEM = sys::UFFD_FEATURE_MINOR_SHMEM, 5 . 14, "Minor faults on shared memory";
        /// Changes behaviour: faults tell the exact address instead of the page's first. On s390x they tell the
        /// page's all the same, since its processors do.
        #[doc(alias = "UFFD_FEATURE_EXACT_ADDRESS")]
        EXACT_ADDRESS = sys::UFFD_FEATURE_EXACT_ADDRESS, 5 . 18, "Faults tell the exact address";
        /// Informs: [`RegisterMode::WRITE_PROTECT`] works on shared and hugetlb memory.
        #[doc(alias = "UFFD_FEATURE_WP_HUGETLBFS_SHMEM")]
        WP_HUGETLBFS_SHMEM = sys::UFFD_FEATURE_WP_HUGETLBFS_SHMEM, 5 . 19, "Write-protect faults on shared and hugetlb memory";
        /// Changes behaviour: write protection holds on anonymous pages that nothing has touched, too.
        /// Without it, protecting such pages does nothing at all. Shared and hugetlb memory always behaves
        /// so.
        #[doc(alias = "UFFD_FEATURE_WP_UNPOPULATED")]
        WP_UNPOPULATED = sys::UFFD_FEATURE_WP_UNPOPULATED, 6 . 4, "Write protection of untouched anonymous pages";
        /// Informs: [`Uffd::poison`](crate::Uffd::poison) works.
        #[doc(alias = "UFFD_FEATURE_POISON")]
        POISON = sys::UFFD_FEATURE_POISON, 6 . 6, "Poisoned pages";
        /// Changes behaviour: a write to a protected page lifts the protection without any message;
        /// [`pagemap`](crate::pagemap) tells which pages were written. Brings `WP_UNPOPULATED` with it.
        #[doc(alias = "UFFD_FEATURE_WP_ASYNC")]
        WP_ASYNC = sys::UFFD_FEATURE_WP_ASYNC, 6 . 7, "Write protection that the kernel lifts by itself";
        /// Informs: [`Uffd::move_pages`](crate::Uffd::move_pages) works.
        #[doc(alias = "UFFD_FEATURE_MOVE")]
        MOVE = sys::UFFD_FEATURE_MOVE, 6 . 8, "Pages moved within the address space";
        /// Changes behaviour: [`RegisterMode::READ_WRITE_PROTECT`] is accepted.
        #[doc(alias = "UFFD_FEATURE_RWP")]
        RWP = sys::UFFD_FEATURE_RWP, 7 . 3, "Read-write protection";
        /// Changes behaviour: an access to a read-write-protected page lifts the protection without any
        /// message; [`pagemap`](crate::pagemap) tells which pages were accessed. Needs `RWP` in the same
        /// handshake; switched at run time by [`Uffd::set_async`](crate::Uffd::set_async).
        #[doc(alias = "UFFD_FEATURE_RWP_ASYNC")]
        RWP_ASYNC = sys::UFFD_FEATURE_RWP_ASYNC, 7 . 3, "Read-write protection that the kernel lifts by itself";
    }
}

kernel_flags! {
    /// Operations of a userfaultfd: what a descriptor or a registered range accepts.
    ///
    /// `API`, `REGISTER`, `UNREGISTER` and `SET_MODE` belong to the descriptor and are known from the
    /// handshake on; the others belong to a range and are what
    /// [`Uffd::register_with_mode`](crate::Uffd::register_with_mode) returns. The kernel's answer excludes
    /// reliably and promises too much: MOVE is listed for shared memory, where it fails.
    ///
    /// Unknown bits, from newer kernels, are kept.
    pub struct IoctlFlags {
        /// Belongs to the descriptor.
        #[doc(alias = "UFFDIO_REGISTER")]
        REGISTER = 1 << sys::_UFFDIO_REGISTER, 4 . 3, "Have the faults of a range delivered";
        /// Belongs to the descriptor.
        #[doc(alias = "UFFDIO_UNREGISTER")]
        UNREGISTER = 1 << sys::_UFFDIO_UNREGISTER, 4 . 3, "Have them delivered no more";
        /// Belongs to a range.
        #[doc(alias = "UFFDIO_WAKE")]
        WAKE = 1 << sys::_UFFDIO_WAKE, 4 . 3, "Wake the waiters of a range";
        /// Belongs to a range.
        #[doc(alias = "UFFDIO_COPY")]
        COPY = 1 << sys::_UFFDIO_COPY, 4 . 3, "Fill missing pages with a copy";
        /// Belongs to a range.
        #[doc(alias = "UFFDIO_ZEROPAGE")]
        ZEROPAGE = 1 << sys::_UFFDIO_ZEROPAGE, 4 . 3, "Fill missing pages with zeros";
        /// Belongs to a range.
        #[doc(alias = "UFFDIO_MOVE")]
        MOVE = 1 << sys::_UFFDIO_MOVE, 6 . 8, "Fill missing pages by moving others there";
        /// Belongs to a range.
        #[doc(alias = "UFFDIO_WRITEPROTECT")]
        WRITE_PROTECT = 1 << sys::_UFFDIO_WRITEPROTECT, 5 . 7, "Protect pages against writes";
        /// Belongs to a range.
        #[doc(alias = "UFFDIO_CONTINUE")]
        CONTINUE = 1 << sys::_UFFDIO_CONTINUE, 5 . 13, "Map what the page cache holds";
        /// Belongs to a range.
        #[doc(alias = "UFFDIO_POISON")]
        POISON = 1 << sys::_UFFDIO_POISON, 6 . 6, "Make any access raise SIGBUS";
        /// Belongs to a range.
        #[doc(alias = "UFFDIO_RWPROTECT")]
        READ_WRITE_PROTECT = 1 << sys::_UFFDIO_RWPROTECT, 7 . 3, "Protect pages against any access";
        /// Belongs to the descriptor.
        #[doc(alias = "UFFDIO_SET_MODE")]
        SET_MODE = 1 << sys::_UFFDIO_SET_MODE, 7 . 3, "Switch asynchronous modes";
        /// Belongs to the descriptor.
        #[doc(alias = "UFFDIO_API")]
        API = 1 << sys::_UFFDIO_API, 4 . 3, "The handshake";
    }
    const _ = !0;
}

impl IoctlFlags {
    /// The operations of a descriptor, reported by the handshake; all others are reported for a range.
    pub(crate) const OF_DESCRIPTOR: Self = Self::from_bits_retain(sys::UFFD_API_IOCTLS);
}

kernel_flags! {
    /// The kinds of faults for which a range is registered, by
    /// [`Uffd::register_with_mode`](crate::Uffd::register_with_mode).
    ///
    /// Source: `UFFDIO_REGISTER(2const)`.
    pub struct RegisterMode {
        /// Nothing is mapped at the address and nothing is known to belong there.
        #[doc(alias = "UFFDIO_REGISTER_MODE_MISSING")]
        MISSING = sys::UFFDIO_REGISTER_MODE_MISSING, 4 . 3, "Accesses to missing pages";
        /// See [`Uffd::write_protect`](crate::Uffd::write_protect).
        #[doc(alias = "UFFDIO_REGISTER_MODE_WP")]
        WRITE_PROTECT = sys::UFFDIO_REGISTER_MODE_WP, 5 . 7, "Writes to write-protected pages";
        /// The page cache holds the page and this mapping doesn't show it yet: memfd, tmpfs, shared anonymous
        /// memory, hugetlb. Not for private anonymous memory.
        #[doc(alias = "UFFDIO_REGISTER_MODE_MINOR")]
        MINOR = sys::UFFDIO_REGISTER_MODE_MINOR, 5 . 13, "Accesses to pages that are cached and not mapped";
        /// See [`Uffd::read_write_protect`](crate::Uffd::read_write_protect). Needs [`FeatureFlags::RWP`];
        /// excludes `WRITE_PROTECT`.
        #[doc(alias = "UFFDIO_REGISTER_MODE_RWP")]
        READ_WRITE_PROTECT = sys::UFFDIO_REGISTER_MODE_RWP, 7 . 3, "Accesses to read-write-protected pages";
    }
}

/// What the running kernel offers, probed with a throw-away descriptor.
///
/// `Display` prints a table of every feature and operation that this crate knows, with the release that
/// brought it.
///
/// ```
/// use userfaultfd::{FeatureFlags, Support};
///
/// let support = Support::probe()?;
/// if support.features().contains(FeatureFlags::MINOR_SHMEM) {
///     println!("minor faults work on shared memory here");
/// }
/// print!("{support}");
/// # Ok::<(), userfaultfd::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Support {
    pub(crate) features: FeatureFlags,
    pub(crate) ioctls: IoctlFlags,
}

impl Support {
    /// Returns every feature that the kernel offers. `EVENT_FORK` may still need a right that this process lacks.
    #[must_use]
    pub fn features(&self) -> FeatureFlags {
        self.features
    }

    /// Returns the operations of a descriptor. Those of a range depend on its memory: registering returns them.
    #[must_use]
    pub fn ioctls(&self) -> IoctlFlags {
        self.ioctls
    }
}

impl fmt::Display for Support {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<20} {:>6}  {:<5} what", "feature", "since", "here")?;
        table(f, FeatureFlags::known(), |flag| self.features.contains(flag))?;
        let unknown = self.features.difference(FeatureFlags::all());
        if !unknown.is_empty() {
            writeln!(f, "{:<20} {:>6}  {:<5} newer than this crate", unknown.to_string(), "", "yes")?;
        }
        writeln!(f, "\n{:<20} {:>6}  {:<5} what", "operation", "since", "here")?;
        let of_descriptor = |known: &&Known<IoctlFlags>| IoctlFlags::OF_DESCRIPTOR.contains(known.flag);
        table(f, IoctlFlags::known().iter().filter(of_descriptor), |flag| self.ioctls.contains(flag))
    }
}

/// Writes a row for each flag.
fn table<'a, F: Copy + 'a>(
    f: &mut fmt::Formatter<'_>,
    rows: impl IntoIterator<Item = &'a Known<F>>,
    here: impl Fn(F) -> bool,
) -> fmt::Result {
    for Known { flag, name, since: (major, minor), what } in rows {
        let here = if here(*flag) { "yes" } else { "no" };
        writeln!(f, "{name:<20} {:>6}  {here:<5} {what}", format!("{major}.{minor}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_named_flag_of_the_kernel_is_known() {
        crate::support::require!();
        assert_eq!(FeatureFlags::all().bits(), sys::UFFD_API_FEATURES);
        assert_eq!(RegisterMode::all().bits(), sys::UFFD_API_REGISTER_MODES);
        let named = IoctlFlags::known().iter().fold(0, |bits, known| bits | known.flag.bits());
        assert_eq!(named, sys::UFFD_API_IOCTLS | sys::UFFD_API_RANGE_IOCTLS);
    }

    /// The releases that brought flags, and all that had come with one or before it, as a mask.
    fn by_release(mut flags: Vec<((u16, u16), u64)>) -> Vec<((u16, u16), u64)> {
        flags.sort_unstable();
        let mut all = 0;
        for (_, bits) in &mut flags {
            all |= *bits;
            *bits = all;
        }
        flags.chunk_by(|a, b| a.0 == b.0).filter_map(|release| release.last().copied()).collect()
    }

    macro_rules! releases {
        ($Flags:ty) => {
            by_release(<$Flags>::known().iter().map(|known| (known.since, known.flag.bits())).collect())
        };
    }

    /// What the handshake of each release answers, and what its headers have.
    #[test]
    fn flags_came_with_their_releases() {
        crate::support::require!();
        assert_eq!(
            releases!(FeatureFlags),
            [
                ((4, 11), 0x7e),
                ((4, 14), 0x1fe),
                ((5, 7), 0x1ff),
                ((5, 13), 0x3ff),
                ((5, 14), 0x7ff),
                ((5, 18), 0xfff),
                ((5, 19), 0x1fff),
                ((6, 4), 0x3fff),
                ((6, 6), 0x7fff),
                ((6, 7), 0xffff),
                ((6, 8), 0x1_ffff),
                ((7, 3), 0x7_ffff),
            ]
        );
        assert_eq!(
            releases!(IoctlFlags),
            [
                ((4, 3), 0x8000_0000_0000_001f),
                ((5, 7), 0x8000_0000_0000_005f),
                ((5, 13), 0x8000_0000_0000_00df),
                ((6, 6), 0x8000_0000_0000_01df),
                ((6, 8), 0x8000_0000_0000_01ff),
                ((7, 3), 0x8000_0000_0000_07ff),
            ]
        );
        assert_eq!(releases!(RegisterMode), [((4, 3), 0x1), ((5, 7), 0x3), ((5, 13), 0x7), ((7, 3), 0xf)]);
        assert_eq!(
            releases!(crate::pagemap::Categories),
            [((6, 7), 0xff), ((6, 16), 0x1ff), ((7, 3), 0x3ff)]
        );
    }

    #[test]
    fn unknown_bits_survive() {
        crate::support::require!();
        let features = FeatureFlags::from_bits_retain(1 << 40) | FeatureFlags::MOVE;
        assert_eq!(features.bits(), 1 << 40 | 1 << 16);
        assert_eq!(features.to_string(), "MOVE | 0x10000000000");
        assert_eq!(FeatureFlags::empty().to_string(), "none");
    }

    #[test]
    fn support_prints_known_and_unknown_features() {
        crate::support::require!();
        let support = Support {
            features: FeatureFlags::MOVE | FeatureFlags::from_bits_retain(1 << 40),
            ioctls: IoctlFlags::API,
        };
        let table = support.to_string();
        assert!(table.contains("MOVE                    6.8  yes   Pages moved"), "{table}");
        assert!(table.contains("RWP                     7.3  no    Read-write protection\n"), "{table}");
        assert!(table.contains("0x10000000000"), "{table}");
        assert!(table.contains("API                     4.3  yes"), "{table}");
    }
}
