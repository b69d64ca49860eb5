//! A swap device of compressed memory: zram.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use crate::guest::Guest;
use crate::machine;

const SIZE: &str = "/sys/block/zram0/disksize";

/// Makes a swap device of `bytes` bytes, and uses it.
pub(crate) fn start(guest: &Guest, bytes: u64) -> Result<(), String> {
    if !Path::new(SIZE).exists() {
        return Err("the kernel has no zram".to_owned());
    }
    machine::write(SIZE, &bytes.to_string())?;
    // SAFETY: touches no memory.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let page = usize::try_from(page).map_err(|e| format!("page size: {e}"))?;
    let mut device =
        File::options().write(true).open("/dev/zram0").map_err(|e| format!("/dev/zram0: {e}"))?;
    device.write_all(&header(page, bytes)).map_err(|e| format!("/dev/zram0: {e}"))?;
    drop(device);
    machine::swap_on(guest, c"/dev/zram0").map_err(|e| format!("swapon: {e}"))
}

/// The first page of a swap device, which says what it is, and how long. Numbers are the machine's own.
fn header(page: usize, bytes: u64) -> Vec<u8> {
    const MAGIC: &[u8] = b"SWAPSPACE2";
    let last_page = u32::try_from(bytes / page as u64 - 1).unwrap_or(u32::MAX);
    let mut header = vec![0; page];
    // Room for a boot loader comes first.
    header[1024..1028].copy_from_slice(&1u32.to_ne_bytes());
    header[1028..1032].copy_from_slice(&last_page.to_ne_bytes());
    header[page - MAGIC.len()..].copy_from_slice(MAGIC);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_one_page_with_version_length_and_magic() {
        for page in [4096, 65536] {
            let header = header(page, 1 << 27);
            assert_eq!(header.len(), page);
            assert_eq!(header[1024..1028], 1u32.to_ne_bytes());
            assert_eq!(header[1028..1032], ((1u32 << 27) / page as u32 - 1).to_ne_bytes());
            assert!(header.ends_with(b"SWAPSPACE2"));
        }
    }
}
