//! A server of one object on loopback, that answers as a test wants it to.

use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Instant;

use crate::support::gate::Gate;

/// How a request is answered.
#[derive(Clone)]
pub(crate) enum Answer {
    Right,
    /// As many bytes of the body, then the end of the connection.
    Cut(usize),
    /// Nothing, and the end of the connection.
    Reset,
    /// A status, and after how many seconds to come again.
    Status(u16, Option<u64>),
    /// All of the object, with 200.
    Whole,
    /// The right bytes, said to be others.
    Said(&'static str),
    /// A byte too many, by the length of the body.
    Long,
    /// A byte too few, by the length of the body.
    Short,
    /// The right answer, once the gate is open.
    Late(Gate),
}

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) bytes: RangeInclusive<usize>,
    pub(crate) came: Instant,
    headers: Vec<(String, String)>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| &**value)
    }
}

/// What is served. `None`: the server doesn't send this header.
pub(crate) struct Object {
    pub(crate) bytes: Vec<u8>,
    pub(crate) etag: Option<String>,
    pub(crate) modified: Option<String>,
}

type Answers = Box<dyn Fn(usize, &Request) -> Answer + Send + Sync>;

pub(crate) struct Web {
    address: SocketAddr,
    pub(crate) object: Mutex<Object>,
    /// Called with the number of the request.
    answers: Mutex<Arc<Answers>>,
    requests: Mutex<Vec<Request>>,
    came: Condvar,
    pub(crate) connections: AtomicUsize,
    at_work: AtomicUsize,
    pub(crate) most_at_work: AtomicUsize,
}

impl Web {
    pub(crate) fn new(bytes: Vec<u8>) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let object = Object { bytes, etag: Some("\"one\"".into()), modified: None };
        let answers: Answers = Box::new(|_, _| Answer::Right);
        let web = Arc::new(Self {
            address: listener.local_addr().unwrap(),
            object: Mutex::new(object),
            answers: Mutex::new(Arc::new(answers)),
            requests: Mutex::default(),
            came: Condvar::new(),
            connections: AtomicUsize::new(0),
            at_work: AtomicUsize::new(0),
            most_at_work: AtomicUsize::new(0),
        });
        let serving = Arc::clone(&web);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let web = Arc::clone(&serving);
                web.connections.fetch_add(1, Ordering::SeqCst);
                thread::spawn(move || web.serve(stream.unwrap()));
            }
        });
        web
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/object", self.address)
    }

    /// Answers from now on as `answers` says, by the number of the request from now on.
    pub(crate) fn answer(&self, answers: impl Fn(usize, &Request) -> Answer + Send + Sync + 'static) {
        let before = self.requests.lock().unwrap().len();
        let answers: Answers = Box::new(move |number, request| answers(number - before, request));
        *self.answers.lock().unwrap() = Arc::new(answers);
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// Waits until as many requests came.
    pub(crate) fn wait_for(&self, count: usize) {
        drop(self.came.wait_while(self.requests.lock().unwrap(), |requests| requests.len() < count).unwrap());
    }

    fn serve(&self, stream: TcpStream) {
        stream.set_nodelay(true).unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        while let Some(request) = read(&mut reader) {
            let at_work = self.at_work.fetch_add(1, Ordering::SeqCst) + 1;
            self.most_at_work.fetch_max(at_work, Ordering::SeqCst);
            let number = {
                let mut requests = self.requests.lock().unwrap();
                requests.push(request.clone());
                requests.len() - 1
            };
            self.came.notify_all();
            let answers = Arc::clone(&self.answers.lock().unwrap());
            let goes_on = self.reply(&stream, &request, answers(number, &request));
            self.at_work.fetch_sub(1, Ordering::SeqCst);
            if !goes_on {
                // The client may have gone already.
                let _ = stream.shutdown(Shutdown::Both);
                return;
            }
        }
    }

    /// Returns whether the connection goes on.
    fn reply(&self, mut stream: &TcpStream, request: &Request, answer: Answer) -> bool {
        if let Answer::Late(gate) = &answer {
            gate.pass();
        }
        let object = self.object.lock().unwrap();
        let (len, bytes) = (object.bytes.len(), request.bytes.clone());
        let etag = object.etag.as_ref().map_or(String::new(), |etag| format!("ETag: {etag}\r\n"));
        let modified =
            object.modified.as_ref().map_or(String::new(), |date| format!("Last-Modified: {date}\r\n"));
        let mut status = "206 Partial Content".to_owned();
        let mut headers = format!("{etag}{modified}");
        let mut body = object.bytes.get(bytes.clone()).unwrap_or_default().to_vec();
        let mut range = format!("bytes {}-{}/{len}", bytes.start(), bytes.end());
        match answer {
            Answer::Reset => return false,
            Answer::Status(code, after) => {
                (status, body, range) = (format!("{code} Whatever"), b"sorry".to_vec(), String::new());
                headers += &after.map_or(String::new(), |seconds| format!("Retry-After: {seconds}\r\n"));
            }
            Answer::Whole => (status, body, range) = ("200 OK".into(), object.bytes.clone(), String::new()),
            Answer::Said(said) => range = said.into(),
            Answer::Long => body.push(0),
            Answer::Short => drop(body.pop()),
            _ if request.header("if-match").is_some_and(|etag| Some(etag) != object.etag.as_deref()) => {
                (status, body, range) = ("412 Precondition Failed".into(), Vec::new(), String::new());
            }
            _ if body.is_empty() => (status, range) = ("416 Too far".into(), format!("bytes */{len}")),
            _ => {}
        }
        if !range.is_empty() {
            headers += &format!("Content-Range: {range}\r\n");
        }
        let sent = if let Answer::Cut(sent) = answer { sent.min(body.len()) } else { body.len() };
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{headers}\r\n", body.len());
        let done = stream.write_all(&[head.as_bytes(), &body[..sent]].concat());
        done.is_ok() && sent == body.len()
    }
}

/// Reads the head of a request. `None` at the end of the connection.
fn read(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.push((name.to_owned(), value.to_owned())),
            None if line == "\r\n" => break,
            None => assert!(line.starts_with("GET /object HTTP/1.1"), "{line}"),
        }
    }
    let range = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("range"));
    let (first, last) =
        range.and_then(|(_, range)| range.strip_prefix("bytes=")?.split_once('-')).expect("a range");
    Some(Request { bytes: first.parse().unwrap()..=last.parse().unwrap(), came: Instant::now(), headers })
}
