//! The same from a server that we didn't write: Debian's nginx.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

use userfaultfd::pager::{HttpSource, PageSource};

use crate::support::{has, require, test_name};
use crate::{check, content};

/// A server of a directory, which ends when it is dropped.
struct Nginx(Child);

impl Drop for Nginx {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where Debian has it.
const PROGRAMS: [&str; 2] = ["nginx", "/usr/sbin/nginx"];

/// Serves a directory at a port. `None`: there is no nginx.
fn start(directory: &std::path::Path, port: u16) -> Option<Nginx> {
    let text = format!(
        "daemon off; master_process off; pid {0}/pid; error_log stderr; events {{}}\n\
         http {{ access_log off; client_body_temp_path {0}/body; proxy_temp_path {0}/proxy;\n\
         fastcgi_temp_path {0}/fastcgi; uwsgi_temp_path {0}/uwsgi; scgi_temp_path {0}/scgi;\n\
         server {{ listen 127.0.0.1:{port}; root {0}; }} }}\n",
        directory.display()
    );
    let file = directory.join("nginx.conf");
    fs::write(&file, text).unwrap();
    let named = std::env::var("USERFAULTFD_TEST_NGINX").ok();
    let programs = named.iter().map(String::as_str).chain(PROGRAMS);
    for program in programs {
        let mut command = Command::new(program);
        command.arg("-p").arg(directory).arg("-c").arg(&file).stderr(Stdio::null());
        match command.spawn() {
            Ok(child) => return Some(Nginx(child)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => panic!("{program}: {error}"),
        }
    }
    None
}

/// Waits until the server answers a request.
fn wait_until_up(port: u16, server: &mut Nginx) {
    loop {
        if let Some(status) = server.0.try_wait().unwrap() {
            panic!("nginx: {status}");
        }
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else {
            std::thread::yield_now();
            continue;
        };
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        assert!(stream.read(&mut [0]).unwrap() > 0);
        return;
    }
}

#[test]
fn nginx_serves_ranges_and_tells_of_a_changed_file() {
    require!();
    let directory = std::env::temp_dir().join(format!("userfaultfd-nginx-{}", std::process::id()));
    fs::create_dir(&directory).unwrap();
    let bytes = content(3_000_001);
    fs::write(directory.join("object"), &bytes).unwrap();
    // Free a moment ago, and nothing else of this machine takes it that fast.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let server = start(&directory, port);
    if has(test_name!(), "nginx", server.is_some()) {
        let mut server = server.unwrap();
        wait_until_up(port, &mut server);
        let source = HttpSource::open(format!("http://127.0.0.1:{port}/object")).unwrap();
        assert!(source.etag().is_some_and(|etag| etag.starts_with('"')));
        for step in 0..200 {
            check(&source, &bytes, step * 77_777 % 3_000_100, 1 + step * 300);
        }
        check(&source, &bytes, 0, 4_000_000);
        fs::write(directory.join("object"), content(2_000_000)).unwrap();
        let error = source.read(0, &mut [0; 4096]).unwrap_err();
        assert!(error.to_string().starts_with("the object has changed"), "{error}");
        let missing = HttpSource::open(format!("http://127.0.0.1:{port}/another")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
    fs::remove_dir_all(directory).unwrap();
}
