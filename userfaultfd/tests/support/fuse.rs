//! A file of FUSE, which answers every ioctl as a test wants: what a program must not believe.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;

use super::has;
use super::raw::check;

const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const INIT: u32 = 26;
const IOCTL: u32 = 39;
/// Interrupting and forgetting want no answer.
const SILENT: [u32; 3] = [2, 36, 42];

/// What every ioctl is answered with, and what the bytes of its structure become.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer {
    pub(crate) result: i32,
    pub(crate) fill: u8,
}

/// Mounts a file system that is one file over a file. Takes mounts of one's own. Tells, visibly, whether it could be.
pub(crate) fn mount_over(test: &str, path: &CStr, answer: Answer) -> bool {
    let device = File::options().read(true).write(true).open("/dev/fuse");
    let mounted = device.ok().and_then(|device| {
        let options = format!("fd={},rootmode=100600,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let options = CString::new(options).unwrap();
        let (source, kind) = (c"test".as_ptr(), c"fuse".as_ptr());
        // SAFETY: the strings are NUL-terminated and live until the call returns.
        check(unsafe { libc::mount(source, path.as_ptr(), kind, 0, options.as_ptr().cast()) }).ok()?;
        Some(device)
    });
    if !has(test, "FUSE", mounted.is_some()) {
        return false;
    }
    std::thread::spawn(move || serve(mounted.unwrap(), answer));
    true
}

/// Answers until the file system is unmounted, with the process.
fn serve(mut device: File, answer: Answer) {
    let mut request = vec![0; 1 << 20];
    while let Ok(len) = device.read(&mut request) {
        let request = &request[..len];
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let (opcode, unique) = (word(4), &request[8..16]);
        if SILENT.contains(&opcode) {
            continue;
        }
        let (error, body) = match opcode {
            // Version 7.31, nothing special, at most a page for each request.
            INIT => (0, words(&[7, 31, 0, 0, 0, 4096, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
            // The attributes of a file of mode 0600 are good for no time.
            GETATTR => {
                let mut attributes = [0; 26];
                (attributes[4], attributes[19], attributes[20]) = (1, 0o100600, 1);
                (0, words(&attributes))
            }
            OPEN => (0, words(&[0; 4])),
            // The size that the answer may have is the last word before the data.
            IOCTL => {
                let mut body = words(&[answer.result as u32, 0, 0, 0]);
                body.resize(body.len() + word(40 + 28) as usize, answer.fill);
                (0, body)
            }
            _ => (-libc::ENOSYS, Vec::new()),
        };
        let mut reply = words(&[16 + body.len() as u32, error as u32]);
        reply.extend_from_slice(unique);
        reply.extend_from_slice(&body);
        // The process that asked may be gone.
        drop(device.write(&reply));
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
