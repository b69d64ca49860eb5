//! What the crate promises to have, whatever headers it is made from: the interface of Linux 7.3.

/// Types and constants that must come out of bindgen. A new kernel's names are appended once they are bound.
#[rustfmt::skip]
pub(crate) const NAMES: &[&str] = &[
    // Types.
    "uffd_msg", "uffdio_api", "uffdio_continue", "uffdio_copy", "uffdio_move", "uffdio_poison", "uffdio_range",
    "uffdio_register", "uffdio_rwprotect", "uffdio_set_mode", "uffdio_writeprotect", "uffdio_zeropage",
    "page_region", "pm_scan_arg",
    // Opening and handshake.
    "UFFD_USER_MODE_ONLY", "USERFAULTFD_IOC", "USERFAULTFD_IOC_NEW",
    "UFFD_API", "UFFD_API_FEATURES", "UFFD_API_IOCTLS", "UFFD_API_RANGE_IOCTLS", "UFFD_API_RANGE_IOCTLS_BASIC",
    "UFFD_API_REGISTER_MODES",
    // ioctls: the bits of the `ioctls` fields, and the numbers.
    "UFFDIO",
    "_UFFDIO_API", "_UFFDIO_CONTINUE", "_UFFDIO_COPY", "_UFFDIO_MOVE", "_UFFDIO_POISON", "_UFFDIO_REGISTER",
    "_UFFDIO_RWPROTECT", "_UFFDIO_SET_MODE", "_UFFDIO_UNREGISTER", "_UFFDIO_WAKE", "_UFFDIO_WRITEPROTECT",
    "_UFFDIO_ZEROPAGE",
    "UFFDIO_API", "UFFDIO_CONTINUE", "UFFDIO_COPY", "UFFDIO_MOVE", "UFFDIO_POISON", "UFFDIO_REGISTER",
    "UFFDIO_RWPROTECT", "UFFDIO_SET_MODE", "UFFDIO_UNREGISTER", "UFFDIO_WAKE", "UFFDIO_WRITEPROTECT",
    "UFFDIO_ZEROPAGE",
    // Modes.
    "UFFDIO_REGISTER_MODE_MINOR", "UFFDIO_REGISTER_MODE_MISSING", "UFFDIO_REGISTER_MODE_RWP",
    "UFFDIO_REGISTER_MODE_WP",
    "UFFDIO_CONTINUE_MODE_DONTWAKE", "UFFDIO_CONTINUE_MODE_WP",
    "UFFDIO_COPY_MODE_DONTWAKE", "UFFDIO_COPY_MODE_WP",
    "UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES", "UFFDIO_MOVE_MODE_DONTWAKE",
    "UFFDIO_POISON_MODE_DONTWAKE",
    "UFFDIO_RWPROTECT_MODE_DONTWAKE", "UFFDIO_RWPROTECT_MODE_RWP",
    "UFFDIO_WRITEPROTECT_MODE_DONTWAKE", "UFFDIO_WRITEPROTECT_MODE_WP",
    "UFFDIO_ZEROPAGE_MODE_DONTWAKE",
    // Features.
    "UFFD_FEATURE_EVENT_FORK", "UFFD_FEATURE_EVENT_REMAP", "UFFD_FEATURE_EVENT_REMOVE", "UFFD_FEATURE_EVENT_UNMAP",
    "UFFD_FEATURE_EXACT_ADDRESS", "UFFD_FEATURE_MINOR_HUGETLBFS", "UFFD_FEATURE_MINOR_SHMEM",
    "UFFD_FEATURE_MISSING_HUGETLBFS", "UFFD_FEATURE_MISSING_SHMEM", "UFFD_FEATURE_MOVE",
    "UFFD_FEATURE_PAGEFAULT_FLAG_WP", "UFFD_FEATURE_POISON", "UFFD_FEATURE_RWP", "UFFD_FEATURE_RWP_ASYNC",
    "UFFD_FEATURE_SIGBUS", "UFFD_FEATURE_THREAD_ID", "UFFD_FEATURE_WP_ASYNC", "UFFD_FEATURE_WP_HUGETLBFS_SHMEM",
    "UFFD_FEATURE_WP_UNPOPULATED",
    // Events.
    "UFFD_EVENT_FORK", "UFFD_EVENT_PAGEFAULT", "UFFD_EVENT_REMAP", "UFFD_EVENT_REMOVE", "UFFD_EVENT_UNMAP",
    "UFFD_PAGEFAULT_FLAG_MINOR", "UFFD_PAGEFAULT_FLAG_RWP", "UFFD_PAGEFAULT_FLAG_WP", "UFFD_PAGEFAULT_FLAG_WRITE",
    // PAGEMAP_SCAN.
    "PAGEMAP_SCAN", "PM_SCAN_CHECK_WPASYNC", "PM_SCAN_WP_MATCHING",
    "PAGE_IS_ACCESSED", "PAGE_IS_FILE", "PAGE_IS_GUARD", "PAGE_IS_HUGE", "PAGE_IS_PFNZERO", "PAGE_IS_PRESENT",
    "PAGE_IS_SOFT_DIRTY", "PAGE_IS_SWAPPED", "PAGE_IS_WPALLOWED", "PAGE_IS_WRITTEN",
];

/// Those names that the generated `text` lacks.
pub(crate) fn missing(text: &str) -> Vec<&'static str> {
    let has = |name: &str| {
        text.contains(&format!("pub const {name}:")) || text.contains(&format!("pub struct {name} "))
    };
    NAMES.iter().copied().filter(|name| !has(name)).collect()
}
