//! Archives that a kernel unpacks into its first file system: cpio's format `newc`.

use std::io::{self, Write};

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const DEVICE: u32 = 0o020_000;

/// Writes an archive. Everything in it is root's.
#[derive(Debug)]
pub(super) struct Archive<W> {
    out: W,
    entries: u32,
}

impl<W: Write> Archive<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, entries: 0 }
    }

    pub(super) fn folder(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, FOLDER | 0o755, (0, 0), &[])
    }

    pub(super) fn file(&mut self, name: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.entry(name, FILE | permissions, (0, 0), content)
    }

    /// A character device, by its numbers.
    pub(super) fn device(&mut self, name: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(name, DEVICE | 0o600, (major, minor), &[])
    }

    /// Ends the archive.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.entries = u32::MAX;
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    /// The header is a magic number and 13 numbers of 8 hexadecimal digits. Name and content each start and end at a
    /// multiple of 4 bytes.
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        let length = |length: usize| {
            let large = || io::Error::other(format!("{name}: too large for the format"));
            u32::try_from(length).map_err(|_| large())
        };
        self.entries = self.entries.wrapping_add(1);
        let links = if mode & FOLDER == FOLDER { 2 } else { 1 };
        let (user, group, time) = (0, 0, 0);
        let (size, name_size, check) = (length(content.len())?, length(name.len() + 1)?, 0);
        let (major, minor) = (0, 0);
        write!(self.out, "070701")?;
        for number in [
            self.entries,
            mode,
            user,
            group,
            links,
            time,
            size,
            major,
            minor,
            device.0,
            device.1,
            name_size,
            check,
        ] {
            write!(self.out, "{number:08X}")?;
        }
        self.out.write_all(name.as_bytes())?;
        self.pad(1, 6 + 13 * 8 + name.len() + 1)?;
        self.out.write_all(content)?;
        self.pad(0, content.len())
    }

    /// Writes `least` zeros, and as many more as bring `written` to a multiple of 4.
    fn pad(&mut self, least: usize, written: usize) -> io::Result<()> {
        self.out.write_all(&[0; 4][..least + (4 - written % 4) % 4])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive() -> Vec<u8> {
        let mut archive = Archive::new(Vec::new());
        archive.folder("dev").unwrap();
        archive.device("dev/console", 5, 1).unwrap();
        archive.file("init", 0o755, b"12345").unwrap();
        archive.finish().unwrap()
    }

    #[test]
    fn bytes_are_those_of_the_format() {
        let fields = |fields: &str| fields.replace(' ', "");
        let mut expected = String::new();
        expected += &fields("070701 00000001 000041ED 00000000 00000000 00000002 00000000 00000000");
        expected += &fields("00000000 00000000 00000000 00000000 00000004 00000000");
        expected += "dev\0\0\0";
        expected += &fields("070701 00000002 00002180 00000000 00000000 00000001 00000000 00000000");
        expected += &fields("00000000 00000000 00000005 00000001 0000000C 00000000");
        expected += "dev/console\0\0\0";
        expected += &fields("070701 00000003 000081ED 00000000 00000000 00000001 00000000 00000005");
        expected += &fields("00000000 00000000 00000000 00000000 00000005 00000000");
        expected += "init\0\0";
        expected += "12345\0\0\0";
        expected += &fields("070701 00000000 00000000 00000000 00000000 00000001 00000000 00000000");
        expected += &fields("00000000 00000000 00000000 00000000 0000000B 00000000");
        expected += "TRAILER!!!\0\0\0\0";
        assert_eq!(String::from_utf8(archive()).unwrap().replace('\0', "@"), expected.replace('\0', "@"));
    }

    #[test]
    fn every_entry_starts_at_a_multiple_of_four() {
        let bytes = archive();
        assert_eq!(bytes.len() % 4, 0);
        let starts: Vec<_> = (0..bytes.len() - 6).filter(|at| bytes[*at..].starts_with(b"070701")).collect();
        assert_eq!(starts.len(), 4);
        assert!(starts.iter().all(|at| at % 4 == 0), "{starts:?}");
    }

    /// The system's own cpio, where there is one, reads it.
    #[test]
    fn cpio_lists_it() {
        use std::process::{Command, Stdio};
        let child = Command::new("cpio").arg("-tv").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut child) = child else { return };
        child.stdin.take().unwrap().write_all(&archive()).unwrap();
        let output = child.wait_with_output().unwrap();
        let list = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success());
        assert!(
            list.contains("crw-------") && list.contains("dev/console") && list.contains("init"),
            "{list}"
        );
    }
}
