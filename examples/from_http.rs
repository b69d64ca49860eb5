//! Memory that is read from an HTTP server as it is touched; and whether it is what the server has.
//!
//! ```sh
//! cargo run --release --example from_http --features http -- URL
//! ```
//!
//! Any object of a server that answers range requests. Without a URL: some megabytes from a server of its own on loopback,
//! each of whose answers takes 6 ms, and every seventh of which fails. Any kernel; no rights from Linux 5.11 on.

use std::hash::{DefaultHasher, Hasher};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{env, io, thread};

use userfaultfd::LazyMemory;
use userfaultfd::pager::HttpSource;
use userfaultfd_examples::{HASHED_BYTES, Result, hash_memory};

/// Bytes that the server of this example has.
const LEN: usize = 8_000_003;

fn main() -> ExitCode {
    userfaultfd_examples::run(|| {
        let url = env::args().nth(1).map_or_else(serve, Ok)?;
        compare(&url)
    })
}

fn compare(url: &str) -> Result<()> {
    let source = Arc::new(HttpSource::open(url)?);
    println!("version: {}", source.etag().unwrap_or("unnamed"));
    let memory =
        LazyMemory::builder(Arc::clone(&source)).on_problem(|problem| eprintln!("{problem}")).build()?;
    println!("memory:  {} bytes, and nothing is read yet", memory.len());

    let start = Instant::now();
    let by_faults = hash_memory(&memory);
    println!("faults:  {by_faults:016x} in {:.1?}", start.elapsed());
    let start = Instant::now();
    let at_once = hash_object(url, memory.len())?;
    println!("at once: {at_once:016x} in {:.1?}", start.elapsed());
    let statistics = source.statistics();
    println!(
        "{} requests for {} bytes, {} of them again",
        statistics.requests, statistics.bytes, statistics.retries
    );
    if by_faults == at_once { Ok(()) } else { Err("the memory isn't what the server has".into()) }
}

/// The object in one request, by another client, padded with zeros to whole pages as the memory is.
fn hash_object(url: &str, len: usize) -> Result<u64> {
    let response = ureq::get(url).call()?;
    let mut bytes = Vec::new();
    response.into_body().into_reader().read_to_end(&mut bytes)?;
    bytes.resize(len, 0);
    let mut hasher = DefaultHasher::new();
    bytes.chunks(HASHED_BYTES).for_each(|part| hasher.write(part));
    Ok(hasher.finish())
}

/// Starts a server of this process. Returns its URL.
fn serve() -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/object", listener.local_addr()?);
    let object: Arc<[u8]> = (0..LEN).map(|at| (at / 5 % 251) as u8).collect();
    let count = Arc::new(AtomicUsize::new(0));
    thread::spawn(move || {
        for stream in listener.incoming().map_while(io::Result::ok) {
            let (object, count) = (Arc::clone(&object), Arc::clone(&count));
            // A client that goes away ends its connection by an error.
            thread::spawn(move || drop(answer(&stream, &object, &count)));
        }
    });
    Ok(url)
}

fn answer(mut stream: &TcpStream, object: &[u8], count: &AtomicUsize) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut lines = BufReader::new(stream).lines();
    loop {
        // A request ends with an empty line.
        let mut range = None;
        loop {
            let Some(line) = lines.next().transpose()? else { return Ok(()) };
            if line.is_empty() {
                break;
            }
            let line = line.to_lowercase();
            if let Some((first, last)) =
                line.strip_prefix("range: bytes=").and_then(|range| range.split_once('-'))
            {
                range = first.parse().ok().zip(last.parse().ok());
            }
        }
        thread::sleep(Duration::from_millis(6));
        let (status, body, said) = match range {
            Some(_) if count.fetch_add(1, Ordering::Relaxed) % 7 == 3 => {
                ("503 Busy", &object[..0], String::new())
            }
            Some((first, last)) if first <= last && last < LEN => {
                let said = format!("Content-Range: bytes {first}-{last}/{LEN}\r\n");
                ("206 Partial Content", &object[first..=last], said)
            }
            Some(_) => ("416 Too far", &object[..0], String::new()),
            None => ("200 OK", object, String::new()),
        };
        write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nETag: \"1\"\r\n{said}\r\n", body.len())?;
        stream.write_all(body)?;
    }
}
