//! One request over HTTP, and its answer.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

/// The longest head of a request, in bytes.
const MAX_HEAD_BYTES: usize = 8 << 10;

/// Answers one request, and closes the connection. The client has a time to ask, and as much to take the answer.
pub(crate) fn answer(
    mut client: TcpStream,
    time: Duration,
    render: impl FnOnce() -> String,
) -> io::Result<()> {
    let until = Instant::now() + time;
    let (mut head, mut room) = (Vec::new(), [0; 1024]);
    let is_whole = |head: &[u8]| head.windows(4).any(|four| four == b"\r\n\r\n");
    while !is_whole(&head) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || head.len() > MAX_HEAD_BYTES {
            break;
        }
        client.set_read_timeout(Some(left))?;
        match client.read(&mut room)? {
            0 => return Ok(()),
            read => head.extend_from_slice(&room[..read]),
        }
    }
    let first = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = first.split(|byte| *byte == b' ');
    let (status, body) = match (words.next(), words.next()) {
        _ if !is_whole(&head) => ("400 Bad Request", String::new()),
        (Some(b"GET"), Some(b"/metrics")) => ("200 OK", render()),
        (Some(b"GET"), _) => ("404 Not Found", "the metrics are at /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", String::new()),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n"
    );
    let until = Instant::now() + time;
    send(&mut client, head.as_bytes(), until)?;
    send(&mut client, body.as_bytes(), until)?;
    client.shutdown(Shutdown::Write)
}

/// Sends all of it by a moment, also to a client that takes a byte now and then.
pub(crate) fn send(client: &mut TcpStream, mut bytes: &[u8], until: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        client.set_write_timeout(Some(left))?;
        match client.write(bytes) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
