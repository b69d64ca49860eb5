//! A descriptor over a Unix socket, with the few bytes that say what it is for.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Sends numbers and a descriptor, which the other side gets a duplicate of.
///
/// # Errors
///
/// Those of sendmsg(2).
#[expect(clippy::missing_panics_doc, reason = "the room is that of one descriptor")]
pub fn send<const N: usize>(socket: &UnixStream, numbers: [u64; N], fd: BorrowedFd<'_>) -> io::Result<()> {
    let bytes = numbers.map(u64::to_ne_bytes);
    let fds = [fd];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)), "there is room for one descriptor");
    // A socket that takes less than a few bytes has no room at all, and would wait.
    match sendmsg(socket, &[IoSlice::new(bytes.as_flattened())], &mut control, SendFlags::NOSIGNAL)? {
        sent if sent == size_of_val(&bytes) => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// Receives what [`send`] sent. `None` if the other side has closed the socket instead.
///
/// # Errors
///
/// Those of recvmsg(2). [`InvalidData`](io::ErrorKind::InvalidData): something else was sent.
pub fn receive<const N: usize>(socket: &UnixStream) -> io::Result<Option<([u64; N], OwnedFd)>> {
    let mut bytes = [[0; 8]; N];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(bytes.as_flattened_mut())];
    let received = recvmsg(socket, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    match fd {
        None if received == 0 => Ok(None),
        Some(fd) if received == size_of_val(&bytes) => Ok(Some((bytes.map(u64::from_ne_bytes), fd))),
        _ => {
            let text =
                format!("{received} bytes, and {}", if fd.is_some() { "a descriptor" } else { "none" });
            Err(io::Error::new(io::ErrorKind::InvalidData, text))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn descriptor_arrives_with_its_numbers() {
        let (one, other) = UnixStream::pair().unwrap();
        let file = File::open("/proc/self/stat").unwrap();
        send(&one, [1, u64::MAX, 3], file.as_fd()).unwrap();
        let (numbers, fd) = receive(&other).unwrap().unwrap();
        assert_eq!(numbers, [1, u64::MAX, 3]);
        let mut text = String::new();
        File::from(fd).read_to_string(&mut text).unwrap();
        assert!(text.starts_with(&format!("{} ", std::process::id())), "{text}");
        drop(one);
        assert!(receive::<3>(&other).unwrap().is_none());
    }

    #[test]
    fn something_else_is_an_error() {
        let (mut one, other) = UnixStream::pair().unwrap();
        one.write_all(&[0; 24]).unwrap();
        assert_eq!(receive::<3>(&other).unwrap_err().to_string(), "24 bytes, and none");
        send(&one, [7], other.as_fd()).unwrap();
        assert_eq!(receive::<3>(&other).unwrap_err().to_string(), "8 bytes, and a descriptor");
    }
}
