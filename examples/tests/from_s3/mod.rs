//! `from_s3`, with a server of S3 that is started here: moto's, of PyPI.

use std::env;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;

use crate::support::{command, run, skip};

/// A server, which ends when it is dropped.
struct Moto(Child);

impl Drop for Moto {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a server at a port. `None`: there is none.
fn start(port: u16) -> Option<Moto> {
    let program = env::var("USERFAULTFD_TEST_MOTO").unwrap_or_else(|_| "moto_server".into());
    let mut command = Command::new(&program);
    command.args(["-H", "127.0.0.1", "-p", &port.to_string()]).stdout(Stdio::null()).stderr(Stdio::null());
    match command.spawn() {
        Ok(child) => Some(Moto(child)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => panic!("{program}: {error}"),
    }
}

/// Makes a bucket, as soon as the server answers.
fn make_bucket(port: u16, server: &mut Moto) {
    loop {
        if let Some(status) = server.0.try_wait().expect("a child") {
            panic!("moto_server: {status}");
        }
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else {
            thread::yield_now();
            continue;
        };
        let request = format!(
            "PUT /images HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 0\r\nConnection: close\r\n\
             Authorization: AWS4-HMAC-SHA256 Credential=any/20260101/us-east-1/s3/aws4_request\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).expect("a request is taken");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        return;
    }
}

#[test]
fn from_s3_restores_what_it_wrote_and_notices_change() {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|taken| taken.local_addr()).expect("a port").port();
    let Some(mut server) = start(port) else {
        assert!(env::var_os("USERFAULTFD_TEST_MOTO").is_none(), "the server was promised");
        return skip("from_s3_restores_what_it_wrote_and_notices_change", "moto_server");
    };
    make_bucket(port, &mut server);
    let mut example = command("from_s3");
    example.arg("images").env("AWS_ENDPOINT", format!("http://127.0.0.1:{port}"));
    example.env("AWS_ALLOW_HTTP", "true").env("AWS_REGION", "us-east-1");
    example.env("AWS_ACCESS_KEY_ID", "any").env("AWS_SECRET_ACCESS_KEY", "any");
    let output = run(&mut example);
    assert!(output.status.success(), "{output:?}");
    let lines: Vec<_> = output.out.lines().collect();
    assert!(lines[0] == "written:  8000003 bytes" && lines[2].starts_with("restored: in "), "{}", output.out);
    assert_eq!(lines[3], "changed:  refused");
}
