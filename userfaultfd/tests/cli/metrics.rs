//! `uffd serve --metrics`: what Prometheus reads.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use userfaultfd::handoff::Dialect;

use crate::monitor::{Monitor, PAGES, Style, shown};
use crate::program::{Folder, Running, run};
use crate::serve::image;
use crate::support::proc::wait_until;
use crate::support::{child, page, require, test_name};

#[path = "../../src/bin/uffd/serve/answer.rs"]
#[expect(dead_code, reason = "the program answers")]
mod answer;

/// What a server answers to some bytes.
fn ask(address: &str, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(request).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// The metrics, checked for their form.
fn metrics(address: &str) -> String {
    let answer = ask(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    let mut seen = Vec::new();
    let mut name = "";
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            name = rest.split(' ').next().unwrap();
            assert!(!seen.contains(&name), "{name} comes twice");
            seen.push(name);
        } else if !line.starts_with("# HELP ") {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(series.starts_with(name) && value.parse::<f64>().is_ok(), "{line} of {name}");
        }
    }
    body.to_owned()
}

/// The value of a series.
fn value(metrics: &str, series: &str) -> Option<f64> {
    let line = metrics.lines().find(|line| line.rsplit_once(' ').is_some_and(|(name, _)| name == series))?;
    line.rsplit_once(' ').unwrap().1.parse().ok()
}

#[test]
fn machines_are_told_apart_while_they_are_served() {
    require!();
    child::run_well(test_name!(), || {
        let folder = Folder::new(test_name!());
        let socket = folder.path("socket");
        let image = folder.file("image", &image(PAGES));
        let mut monitors: [Monitor; 2] =
            std::array::from_fn(|_| Monitor::fork(Style::new(Dialect::Firecracker), socket.clone().into()));
        let arguments = ["serve", "--socket", &socket, "--image", &image, "--metrics", "127.0.0.1:0"];
        let mut server = Running::start(&arguments);
        let line = server.line();
        let address = line.strip_prefix("metrics on http://").and_then(|line| line.strip_suffix("/metrics"));
        let address = address.unwrap_or_else(|| panic!("{line}"));
        assert_eq!(server.line(), "serving");
        let before = metrics(address);
        assert_eq!(value(&before, "userfaultfd_vms"), Some(0.0), "{before}");
        assert_eq!(value(&before, "userfaultfd_fault_seconds_count"), Some(0.0), "{before}");
        for monitor in &mut monitors {
            monitor.go();
            server.line();
        }
        assert_eq!(monitors[0].read(1), shown(1));
        let pid = monitors[0].process.pid();
        let of_first = format!("vm=\"1\",process=\"{pid}\"");
        let series = format!("userfaultfd_vm_faults_total{{{of_first},kind=\"missing\"}}");
        wait_until(|| value(&metrics(address), "userfaultfd_fault_seconds_count") == Some(1.0));
        let now = metrics(address);
        assert_eq!(value(&now, &series), Some(1.0), "{now}");
        assert_eq!(value(&now, "userfaultfd_faults_total{kind=\"missing\"}"), Some(1.0), "{now}");
        assert_eq!(value(&now, "userfaultfd_fault_seconds_bucket{le=\"+Inf\"}"), Some(1.0), "{now}");
        let (all, missing) =
            ((PAGES * page()) as f64, |vm| format!("userfaultfd_vm_missing_bytes{{vm=\"{vm}\"}}"));
        assert_eq!(value(&now, &missing(2)), Some(all), "{now}");
        assert!(value(&now, &missing(1)).unwrap() < all, "{now}");
        // The first region has the fault.
        let region = |at: usize| {
            let start = format!("userfaultfd_region_faults_total{{vm=\"1\",region=\"{at}\",start=\"0x");
            let line = now.lines().find(|line| line.starts_with(&start) && line.contains("\"missing\""));
            line.unwrap().rsplit_once(' ').unwrap().1.to_owned()
        };
        assert_eq!([region(0), region(1)], ["1", "0"]);
        // The series of a machine end with it.
        let [first, second] = monitors;
        first.exit();
        server.line();
        let now = metrics(address);
        assert_eq!(value(&now, &series), None, "{now}");
        assert_eq!(value(&now, "userfaultfd_ends_total{reason=\"ended\"}"), Some(1.0), "{now}");
        assert_eq!(value(&now, "userfaultfd_vms"), Some(1.0), "{now}");
        server.signal(libc::SIGTERM);
        let said = server.end();
        assert_eq!(said.code, Some(0), "{said:?}");
        second.exit();
    });
}

#[test]
fn bad_requests_are_answered_and_the_next_one_too() {
    require!();
    let folder = Folder::new(test_name!());
    let (socket, image) = (folder.path("socket"), folder.file("image", &vec![1; page()]));
    let arguments = ["serve", "--socket", &socket, "--image", &image, "--metrics", "127.0.0.1:0"];
    let mut server = Running::start(&arguments);
    let line = server.line();
    let address = line.strip_prefix("metrics on http://").unwrap().trim_end_matches("/metrics");
    assert_eq!(server.line(), "serving");
    for (request, status) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"\r\n\r\n", "405"),
        (&[b'x'; 10 << 10], "400"),
    ] {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request).unwrap();
        let mut text = Vec::new();
        // Unread bytes of the request may reset the connection, behind the answer.
        let _reset = stream.read_to_end(&mut text);
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(text.starts_with(&format!("HTTP/1.1 {status} ")) || status == "400", "{text}");
    }
    // One that says nothing keeps the next one waiting for a time only.
    let _silent = TcpStream::connect(address).unwrap();
    metrics(address);
    server.signal(libc::SIGTERM);
    assert_eq!(server.end().code, Some(0));
    for address in ["0.0.0.0:0", "nowhere"] {
        let said = run(&["serve", "--socket", &socket, "--image", &image, "--metrics", address]);
        assert!(said.code == Some(2) && said.err.contains("--metrics"), "{address}: {said:?}");
    }
}

#[test]
fn slow_client_is_dropped_at_its_deadline() {
    require!();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    let answered = thread::spawn(move || {
        let (mut accepted, until) = (accepted, Instant::now() + Duration::from_millis(10));
        answer::send(&mut accepted, &vec![b'x'; 64 << 20], until).unwrap_err().kind()
    });
    let mut room = [0; 4096];
    // Until the connection is closed: it goes on all the time.
    while client.read(&mut room).is_ok_and(|read| read > 0) {
        thread::yield_now();
    }
    // A write that waits for the last moment is `WouldBlock`.
    assert!(matches!(answered.join().unwrap(), ErrorKind::TimedOut | ErrorKind::WouldBlock));
}
