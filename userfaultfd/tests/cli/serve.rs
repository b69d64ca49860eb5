//! `uffd serve`: monitors are processes of their own, which hand their memory over and read it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use userfaultfd::handoff::Dialect;
use userfaultfd::pager::WorkingSet;

use crate::monitor::{HALF, Monitor, PAGES, Style, byte, shown};
use crate::program::{Folder, Running, run};
use crate::support::gate::Gate;
use crate::support::{child, page, require, test_name};
use crate::web::{Answer, Web};

/// The first pages of the image.
pub(crate) fn image(pages: usize) -> Vec<u8> {
    (0..pages).flat_map(|number| std::iter::repeat_n(byte(number), page())).collect()
}

/// Monitors that wait to be let go. They are forked before there are threads.
fn monitors<const N: usize>(socket: &str) -> [Monitor; N] {
    std::array::from_fn(|_| Monitor::fork(Style::new(Dialect::Firecracker), socket.into()))
}

/// Starts `uffd serve`, and waits until it listens.
fn serve(socket: &str, image: &str, more: &[&str]) -> Running {
    let arguments = ["serve", "--socket", socket, "--image", image];
    let mut server = Running::start(&[&arguments, more].concat());
    assert_eq!(server.line(), "serving");
    server
}

/// Lets a monitor go, and waits until it is served.
fn go(monitor: &mut Monitor, server: &mut Running, number: usize) {
    monitor.go();
    let (line, pid) = (server.line(), monitor.process.pid());
    assert!(line.starts_with(&format!("vm {number}: process {pid} (user ")), "{line}");
    assert!(line.ends_with("Firecracker, 0.0 MiB in 2 regions"), "{line}");
}

/// Waits until the end of a machine is reported.
fn ended(server: &mut Running, number: usize) -> String {
    let line = server.line();
    assert!(line.starts_with(&format!("vm {number}: ended after ")), "{line}");
    line
}

#[test]
fn machines_go_on_by_themselves_after_sigterm() {
    require!();
    child::run_well(test_name!(), || {
        let folder = Folder::new(test_name!());
        let socket = folder.path("socket");
        let image = folder.file("image", &image(PAGES));
        let [mut exits, mut killed, mut stays] = monitors(&socket);
        let mut server = serve(&socket, &image, &["--threads", "2"]);
        for (number, monitor) in [&mut exits, &mut killed, &mut stays].into_iter().enumerate() {
            go(monitor, &mut server, number + 1);
            (1..HALF).for_each(|page| assert_eq!(monitor.read(page), shown(page)));
        }
        exits.exit();
        let line = ended(&mut server, 1);
        assert!(line.contains(" faults, 0.0 MiB filled"), "{line}");
        killed.process.kill();
        ended(&mut server, 2);
        server.signal(libc::SIGTERM);
        let said = server.end();
        assert!(said.code == Some(0) && said.out.is_empty(), "{said:?}");
        assert!(said.err.contains("\nvm 3: complete, and goes on by itself, after "), "{said:?}");
        assert!(!Path::new(&socket).exists());
        (0..PAGES).for_each(|page| assert_eq!(stays.read(page), shown(page)));
        stays.exit();
    });
}

#[test]
fn machines_of_a_killed_handler_are_served_on() {
    require!();
    child::run_well(test_name!(), || {
        let folder = Folder::new(test_name!());
        let socket = folder.path("socket");
        let (image, other) = (folder.file("image", &image(PAGES)), folder.file("other", &[7]));
        let states = format!("/dev/shm/userfaultfd-cli-states-{}", std::process::id());
        fs::create_dir(&states).unwrap();
        let [mut monitor] = monitors(&socket);
        let mut server = serve(&socket, &image, &["--state", &states]);
        go(&mut monitor, &mut server, 1);
        assert_eq!([monitor.read(1), monitor.read(2)], [shown(1), shown(2)]);
        monitor.remove(1);
        monitor.remove(3);
        server.signal(libc::SIGKILL);
        assert_eq!(server.end().code, None);
        monitor.ask(4);

        let start = |image: &str| {
            let arguments = ["serve", "--socket", &socket, "--image", image, "--state", &states];
            Running::start(&arguments)
        };
        let mut server = start(&other);
        let line = server.line();
        assert!(line.starts_with("not adopted: process ") && line.contains("image"), "{line}");
        assert_eq!(server.line(), "serving");
        server.signal(libc::SIGTERM);
        assert_eq!(server.end().code, Some(0));

        let mut server = start(&image);
        let (line, pid) = (server.line(), monitor.process.pid());
        assert!(line.starts_with(&format!("vm 1: process {pid} (user ")), "{line}");
        assert_eq!(server.line(), "serving");
        assert_eq!(monitor.answer(), shown(4));
        for page in 0..PAGES {
            assert_eq!(
                monitor.read(page),
                if [1, 3].contains(&page) { 0 } else { shown(page) },
                "page {page}"
            );
        }
        monitor.exit();
        ended(&mut server, 1);
        server.signal(libc::SIGTERM);
        assert_eq!(server.end().code, Some(0));
        fs::remove_dir(&states).expect("no file is left");
    });
}

/// Such as a logger that was restarted.
#[test]
fn machines_are_served_on_when_nobody_reads_what_is_said() {
    require!();
    child::run_well(test_name!(), || {
        let folder = Folder::new(test_name!());
        let socket = folder.path("socket");
        let image = folder.file("image", &image(PAGES));
        let [mut one, mut other] = monitors(&socket);
        let mut server = serve(&socket, &image, &[]);
        go(&mut one, &mut server, 1);
        server.hang_up();
        other.go();
        for monitor in [&mut one, &mut other] {
            (0..HALF).for_each(|page| assert_eq!(monitor.read(page), shown(page)));
        }
        server.signal(libc::SIGTERM);
        assert_eq!(server.end().code, Some(0));
        for mut monitor in [one, other] {
            (0..PAGES).for_each(|page| assert_eq!(monitor.read(page), shown(page)));
            monitor.exit();
        }
    });
}

#[test]
fn working_set_of_all_machines_is_recorded_and_filled() {
    require!();
    child::run_well(test_name!(), || {
        let folder = Folder::new(test_name!());
        let (socket, set) = (folder.path("socket"), folder.path("set"));
        let image = folder.file("image", &image(PAGES));
        let [mut one, mut other, mut third] = monitors(&socket);
        let mut server = serve(&socket, &image, &["--record", &set]);
        go(&mut one, &mut server, 1);
        for page in [5, 1, 4] {
            assert_eq!(one.read(page), shown(page));
        }
        one.exit();
        ended(&mut server, 1);
        assert_eq!(WorkingSet::load(&set).unwrap().pages().collect::<Vec<_>>(), [1, 5, 4]);
        go(&mut other, &mut server, 2);
        assert_eq!([other.read(1), other.read(2)], [shown(1), shown(2)]);
        // It is still at work: what was recorded ends before the rest is filled.
        server.signal(libc::SIGINT);
        let said = server.end();
        assert_eq!(said.code, Some(0), "{said:?}");
        assert_eq!(WorkingSet::load(&set).unwrap().pages().collect::<Vec<_>>(), [1, 5, 4, 2]);
        other.exit();
        let mut server = serve(&socket, &image, &["--replay", &set]);
        go(&mut third, &mut server, 1);
        assert_eq!([third.read(5), third.read(7), third.read(2)], [shown(5), shown(7), shown(2)]);
        third.exit();
        let line = ended(&mut server, 1);
        assert!(line.ends_with(", working set of 4 pages with 1 faults outside"), "{line}");
        server.signal(libc::SIGTERM);
        assert_eq!(server.end().code, Some(0));
    });
}

#[test]
fn layers_lie_on_an_image_that_is_cached() {
    require!();
    child::run_well(test_name!(), || {
        let folder = Folder::new(test_name!());
        let (socket, cache) = (folder.path("socket"), folder.path("cache"));
        fs::create_dir(&cache).unwrap();
        let layer = folder.path("layer");
        let file = File::create(&layer).unwrap();
        file.set_len((PAGES * page()) as u64).unwrap();
        file.write_all_at(&vec![200; page()], (3 * page()) as u64).unwrap();
        let mut all: [_; 2] = monitors(&socket);
        let web = Web::new(image(PAGES));
        let mut requests = Vec::new();
        for monitor in &mut all {
            let more = ["--layer", &layer, "--cache", &cache, "--cache-limit", "64M"];
            let mut server = serve(&socket, &web.url(), &more);
            go(monitor, &mut server, 1);
            for number in 0..PAGES {
                let expected = if shown(number) == byte(3) { 200 } else { shown(number) };
                assert_eq!(monitor.read(number), expected, "page {number}");
            }
            server.signal(libc::SIGTERM);
            let said = server.end();
            assert_eq!(said.code, Some(0), "{said:?}");
            requests.push(web.requests().len());
        }
        let [first, both] = requests[..] else { unreachable!() };
        assert!(first > 1 && both - first == 1, "the second start asks for the version alone: {requests:?}");
        all.into_iter().for_each(Monitor::exit);
    });
}

/// A snapshot file in chunks is served as the memory that it has, from a file and from a server.
#[test]
fn machines_are_served_from_a_compressed_image() {
    require!();
    child::run_well(test_name!(), || {
        let folder = Folder::new(test_name!());
        let socket = folder.path("socket");
        let (raw, output) = (folder.file("raw", &image(PAGES)), folder.path("output"));
        let mut all: [_; 2] = monitors(&socket);
        assert_eq!(run(&["image", "convert", &raw, "-o", &output]).code, Some(0));
        let web = Web::new(fs::read(&output).unwrap());
        for (monitor, image) in all.iter_mut().zip([&output, &web.url()]) {
            let mut server = serve(&socket, image, &[]);
            go(monitor, &mut server, 1);
            for number in 0..PAGES {
                assert_eq!(monitor.read(number), shown(number), "page {number} of {image}");
            }
            server.signal(libc::SIGTERM);
            let said = server.end();
            assert_eq!(said.code, Some(0), "{said:?}");
        }
        all.into_iter().for_each(Monitor::exit);
    });
}

#[test]
fn machine_whose_memory_is_longer_is_killed_and_counted() {
    require!();
    child::run_well(test_name!(), || {
        let folder = Folder::new(test_name!());
        let socket = folder.path("socket");
        let image = folder.file("image", &image(PAGES - 1));
        let [mut monitor] = monitors(&socket);
        let mut server = serve(&socket, &image, &[]);
        monitor.go();
        let line = server.line();
        assert!(line.starts_with("vm 1: process ") && line.contains("isn't served"), "{line}");
        assert_eq!(monitor.process.wait(), libc::SIGKILL);
        server.signal(libc::SIGTERM);
        let said = server.end();
        assert!(
            said.code == Some(4) && said.err.contains("uffd: 1 virtual machine ended, because"),
            "{said:?}"
        );
    });
}

#[test]
fn second_signal_ends_machines_that_are_not_complete() {
    require!();
    child::run_well(test_name!(), || {
        let folder = Folder::new(test_name!());
        let socket = folder.path("socket");
        let [mut monitor] = monitors(&socket);
        let web = Web::new(image(PAGES));
        let mut server = serve(&socket, &web.url(), &[]);
        let gate = Gate::default();
        let late = gate.clone();
        web.answer(move |_, _| Answer::Late(late.clone()));
        go(&mut monitor, &mut server, 1);
        server.signal(libc::SIGTERM);
        assert!(server.line().starts_with("filling the memory of 1 virtual machine;"));
        server.signal(libc::SIGTERM);
        assert_eq!(server.line(), "not complete: 1 virtual machine");
        assert_eq!(monitor.process.wait(), libc::SIGKILL);
        let said = server.end();
        assert!(
            said.code == Some(4) && said.err.contains("uffd: 1 virtual machine ended, because"),
            "{said:?}"
        );
        gate.open();
    });
}

#[test]
fn socket_is_taken_from_a_killed_handler_alone() {
    require!();
    let folder = Folder::new(test_name!());
    let socket = folder.path("socket");
    let image = folder.file("image", &image(1));
    drop(UnixListener::bind(&socket).unwrap());
    let server = serve(&socket, &image, &[]);
    let refused = run(&["serve", "--socket", &socket, "--image", &image]);
    assert!(refused.code == Some(1) && refused.out.is_empty(), "{refused:?}");
    assert!(refused.err.contains("another handler listens there"), "{refused:?}");
    server.signal(libc::SIGTERM);
    assert_eq!(server.end().code, Some(0));
    // No socket: it is left alone.
    let refused = run(&["serve", "--socket", &image, "--image", &image]);
    assert!(refused.code == Some(1) && Path::new(&image).exists(), "{refused:?}");
}

#[test]
fn what_cannot_be_opened_is_named() {
    require!();
    let folder = Folder::new(test_name!());
    let (socket, image, missing) =
        (folder.path("socket"), folder.file("image", &image(1)), folder.path("no"));
    let socket = ["serve", "--socket", &socket];
    for (more, code, named) in [
        (&["--image", &missing][..], 1, &*missing),
        (&["--image", &image, "--layer", &missing], 1, &missing),
        (&["--image", &image, "--replay", &image], 1, "a file that isn't a working set"),
        (&["--image", &image, "--record", &missing, "--replay", &missing], 2, "--replay"),
        (&["--image", &image, "--cache", &missing], 2, "--cache is for an image that is a URL"),
        (&["--image", &image, "--cache-limit", "1Q"], 2, "512M"),
        (&[], 2, "--image"),
    ] {
        let said = run(&[&socket, more].concat());
        assert!(said.code == Some(code) && said.out.is_empty(), "{more:?}: {said:?}");
        assert!(said.err.contains(named), "{more:?}: {said:?}");
    }
    let said = run(&["serve", "--inherited", "--image", &image]);
    assert!(said.code == Some(3) && said.err.contains("LISTEN_FDS"), "{said:?}");
}
