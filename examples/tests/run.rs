//! Runs every example and checks what it prints; and holds the READMEs to the program that they show.
//!
//! An example that says that something is missing here is shown as `SKIP`. That is a failure where the run was
//! told that it is there: by `USERFAULTFD_EXPECT_FEATURES` (a mask in hexadecimal) and `USERFAULTFD_EXPECT`
//! (`CAP_SYS_PTRACE`, `hugetlb`), as for the tests of the library. `USERFAULTFD_EXAMPLES` names the directory of
//! the built examples, where it isn't the one beside this test's.

#[cfg(feature = "object-store")]
mod from_s3;
mod support;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
#[cfg(feature = "handoff")]
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::{env, process};

use support::{
    MemoryGroup, Need, blocks, command, forbid_userfaultfd, is_root, masked, nobodys_command,
    reserve_huge_pages, run, skip, start,
};
use userfaultfd::{FeatureFlags, Support, Uffd, page_size};
use userfaultfd_examples::{UNMET, huge_page_size, receive, since};

#[test]
fn hello_fault_reads_what_was_copied() {
    let output = run(&mut command("hello_fault"));
    assert!(output.status.success(), "{output:?}");
    let expected = format!("Read fault at 0x…\ncopied {} bytes, the first is 42\n", page_size());
    assert_eq!(masked(&output.out), expected);
}

#[test]
fn manpage_fills_each_page_that_main_reads() {
    let output = run(command("manpage").arg("3"));
    assert!(output.status.success(), "{output:?}");
    let first =
        output.out.lines().next().and_then(|line| line.strip_prefix("Address returned by mmap() = 0x"));
    let start = usize::from_str_radix(first.expect("the address of the mapping"), 16).unwrap();

    let mut expected = format!("Address returned by mmap() = {start:#x}\n");
    for (at, page) in (0xf..3 * page_size()).step_by(1024).map(|at| (at, at / page_size())) {
        if at % page_size() == 0xf {
            expected += &format!(
                "\nfault_handler_thread():\n    \
                 poll() returns: nready = 1; POLLIN = 1; POLLERR = 0\n    \
                 UFFD_EVENT_PAGEFAULT event: Missing, Read; address = {:#x}\n        \
                 (uffdio_copy.copy returned {})\n",
                start + page * page_size(),
                page_size(),
            );
        }
        expected += &format!("Read address {:#x} in main(): {}\n", start + at, ["A", "B", "C"][page]);
    }
    assert_eq!(output.out, expected);
}

#[test]
fn manpage_prints_usage() {
    for argument in [None, Some("0"), Some("-1"), Some("three")] {
        let output = run(command("manpage").args(argument));
        assert_eq!(output.status.code(), Some(1), "{argument:?}: {output:?}");
        assert_eq!(output.err, "usage: cargo run --example manpage -- NUMBER-OF-PAGES\n", "{argument:?}");
    }
    let output = run(command("manpage").arg(usize::MAX.to_string()));
    assert_eq!((output.status.code(), &*output.err), (Some(1), "too many pages\n"));
}

#[test]
fn write_protect_keeps_the_content_of_its_moment() {
    let need = Need::Features(FeatureFlags::PAGEFAULT_FLAG_WP);
    let Some(output) = run(&mut command("write_protect"))
        .unless_unmet("write_protect_keeps_the_content_of_its_moment", need)
    else {
        return;
    };
    let page = page_size();
    let expected = format!(
        "write to page 1: saved {page} bytes of B\nwrite to page 3: saved {page} bytes of D\n\
         memory now: AxCx\nsnapshot:   ABCD\n"
    );
    assert_eq!(output.out, expected);
}

#[test]
fn minor_maps_what_the_other_mapping_wrote() {
    let need = Need::Features(FeatureFlags::MINOR_SHMEM);
    let Some(output) =
        run(&mut command("minor")).unless_unmet("minor_maps_what_the_other_mapping_wrote", need)
    else {
        return;
    };
    let expected: String = ["A", "B", "C"]
        .iter()
        .enumerate()
        .map(|(index, letter)| {
            let bytes = page_size();
            format!(
                "minor fault at page {index}: mapped {bytes} bytes\nmain reads {letter} from page {index}\n"
            )
        })
        .collect();
    assert_eq!(output.out, expected);
}

#[test]
fn move_leaves_the_source_empty() {
    let need = Need::Features(FeatureFlags::MOVE);
    let Some(output) = run(&mut command("move")).unless_unmet("move_leaves_the_source_empty", need) else {
        return;
    };
    // Copied where the source can't be moved, which the kernel may decide at any time.
    assert!(
        output.out == "the page was moved: main reads M, the source holds 0\n"
            || output.out == "the page was copied: main reads M, the source holds 77\n",
        "{output:?}"
    );
}

#[test]
fn poison_kills_a_process_that_touches_it() {
    let need = Need::Features(FeatureFlags::POISON);
    let Some(output) =
        run(&mut command("poison")).unless_unmet("poison_kills_a_process_that_touches_it", need)
    else {
        return;
    };
    assert_eq!(output.out, "page 0: the child reads A\npage 1: SIGBUS ended the child\n");
    assert_eq!(output.err, "the source fails at page 1\n");
}

#[test]
fn fork_events_bring_the_childs_faults() {
    let Some(output) =
        run(&mut command("fork_events")).unless_unmet("fork_events_bring_the_childs_faults", Need::Ptrace)
    else {
        return;
    };
    let expected = "fork: its userfaultfd has EVENT_FORK\nthe child read C\nthe parent reads P\n";
    assert_eq!(output.out, expected);
}

#[test]
fn huge_pages_are_filled_whole() {
    let _reserved = reserve_huge_pages(2);
    let Some(output) =
        run(&mut command("huge_pages")).unless_unmet("huge_pages_are_filled_whole", Need::HugePages(2))
    else {
        return;
    };
    let size = huge_page_size().expect("the example found it");
    let mut expected = format!("2 huge pages of {} KiB at 0x…\n", size / 1024);
    for (index, letter) in ["A", "B"].iter().enumerate() {
        expected +=
            &format!("fault at 0x…: copied {size} bytes\nmain reads {letter} at the end of page {index}\n");
    }
    assert_eq!(masked(&output.out), expected);
}

/// A directory of a test's own, which goes with it.
struct Directory(PathBuf);

impl Directory {
    fn new(test: &str) -> Self {
        let path = env::temp_dir().join(format!("userfaultfd-{}-{test}", process::id()));
        fs::create_dir(&path).expect("a directory of a new name");
        Self(path)
    }

    /// A file of bytes that tell where they are, and no whole number of pages. In the middle there is a hole.
    fn snapshot(&self) -> PathBuf {
        let path = self.0.join("snapshot");
        let mut content = Vec::new();
        content.extend((0_u64..40_000).flat_map(u64::to_ne_bytes));
        let file = File::create_new(&path).expect("a new file");
        file.write_all_at(&content, 0).expect("room on the disk");
        file.write_all_at(b"the end", 1_000_000).expect("room on the disk");
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).expect("the directory is the test's own");
    }
}

#[test]
fn sparse_reads_reads_bytes_of_100_gib_file() {
    let directory = Directory::new("sparse_reads");
    let path = directory.snapshot();
    File::options().write(true).open(&path).unwrap().set_len(100 << 30).expect("a hole takes no room");
    let output = run(command("sparse_reads").arg(path));
    if usize::BITS < 64 {
        assert!(!output.status.success(), "{output:?}");
        return;
    }
    assert!(output.status.success() && output.err.is_empty(), "{output:?}");
    let numbers: Vec<u64> =
        output.out.split(' ').filter_map(|word| word.trim_end_matches(';').parse().ok()).collect();
    let [_, read, not] = numbers[..] else { panic!("{output:?}") };
    assert_eq!(read + not, (100 << 30) / page_size() as u64);
    assert!((900..=1000).contains(&read), "{output:?}");
}

#[test]
fn bigger_than_memory_touches_every_page_within_its_limit() {
    const LEN: usize = 64 << 20;
    let directory = Directory::new("bigger_than_memory");
    let path = directory.snapshot();
    let mut file = File::create(&path).unwrap();
    let mut bytes = vec![0; 1 << 20];
    for part in 0..LEN >> 20 {
        bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = (part * 7 + at * 31 + at / 999) as u8);
        file.write_all(&bytes).unwrap();
    }
    file.write_all(b"the end isn't a whole page").unwrap();
    // A quarter of the file, in a group of processes that may have no more than that and a little for the program.
    let group = MemoryGroup::new("bigger_than_memory", 40 << 20);
    for arguments in [&["--limit", "16M", "--all"][..], &["--limit", "16M"]] {
        let mut command = command("bigger_than_memory");
        command.args(arguments).arg(&path);
        if let Some(group) = &group {
            group.holds(&mut command);
        }
        let need = Need::Features(FeatureFlags::PAGEFAULT_FLAG_WP);
        let name = "bigger_than_memory_touches_every_page_within_its_limit";
        let Some(output) = run(&mut command).unless_unmet(name, need) else { return };
        assert!(output.out.contains("as read(2) has them"), "{output:?}");
        let number = |name: &str| -> usize {
            let line =
                output.out.lines().find_map(|line| line.strip_prefix(name)).expect("a line of its name");
            line.trim_start_matches(": ").split([' ', ',']).next().unwrap().parse().expect("a number")
        };
        if arguments.contains(&"--all") {
            let pages = LEN / page_size() + 1;
            assert_eq!(number("pages"), pages, "{output:?}");
            assert!(number("evicted") >= pages - (16 << 20) / page_size(), "{output:?}");
        }
        assert!(number("resident") <= 16 << 20, "{output:?}");
    }
    let output = run(command("bigger_than_memory").args(["--limit", "1K"]).arg(&path));
    assert!(!output.status.success() && output.err.contains("too small"), "{output:?}");
    let output = run(command("bigger_than_memory").arg("--limit"));
    assert!(!output.status.success() && output.err.contains("usage"), "{output:?}");
}

#[test]
fn far_memory_keeps_a_process_within_its_limit() {
    let need = Need::Features(FeatureFlags::WP_UNPOPULATED);
    let output = run(command("far_memory").args(["--limit", "1M", "--size", "4M", "--rounds", "2"]));
    let name = "far_memory_keeps_a_process_within_its_limit";
    let Some(output) = output.unless_unmet(name, need) else { return };
    assert!(output.out.contains("all as they were written"), "{output:?}");
    let number = |name: &str| -> usize {
        let line = output.out.lines().find_map(|line| line.strip_prefix(name)).expect("a line of its name");
        line.split(' ').next().unwrap().parse().expect("a number")
    };
    let pages = |bytes: usize| bytes / page_size();
    assert!(number("resident: ") <= 1 << 20, "{output:?}");
    assert!(number("evicted: ") >= pages(3 << 20) && number("refaulted: ") > 0, "{output:?}");
    assert!(number("spilled: ") > 0, "{output:?}");
    // With room for all of it nothing leaves, and a limit that is too small is refused.
    let output = run(command("far_memory").args(["--limit", "16M", "--size", "1M", "--rounds", "1"]));
    assert!(output.status.success() && output.out.contains("evicted: 0\n"), "{output:?}");
    let output = run(command("far_memory").args(["--limit", "4K", "--size", "1M"]));
    assert!(!output.status.success() && output.err.contains("too small"), "{output:?}");
    let output = run(command("far_memory").arg("--limit"));
    assert!(!output.status.success() && output.err.contains("usage"), "{output:?}");
}

#[test]
fn store_answers_from_an_index_larger_than_its_limit() {
    let directory = Directory::new("store");
    let path = directory.snapshot().with_file_name("index");
    let need = Need::Features(FeatureFlags::PAGEFAULT_FLAG_WP);
    let output = run(command("store").args(["--limit", "512K"]).arg(&path));
    let name = "store_answers_from_an_index_larger_than_its_limit";
    let Some(output) = output.unless_unmet(name, need) else { return };
    let len = fs::metadata(&path).unwrap().len() as usize;
    assert!(len >= 10 * (512 << 10), "{output:?}");
    assert!(output.out.starts_with(&format!("index: {len} bytes")), "{output:?}");
    assert!(output.out.contains("as they were put in"), "{output:?}");
    let line =
        |name: &str| output.out.lines().find(|line| line.starts_with(name)).expect("a line of its name");
    let plot = |name: &str| line(name).split('│').nth(1).expect("what is drawn").chars().count();
    assert_eq!((plot("resident"), plot("misses")), (60, 60), "{output:?}");
    // An index that can't be made leaves the old one as it was: a file may have a few blocks here.
    let bytes = fs::read(&path).unwrap();
    let example = command("store");
    let mut limited = process::Command::new("sh");
    limited.args(["-c", "ulimit -f 64 && exec \"$@\"", "sh"]).arg(example.get_program());
    let output = run(limited.args(["--limit", "512K"]).arg(&path));
    assert!(!output.status.success() && output.out.is_empty(), "{output:?}");
    assert!(fs::read(&path).unwrap() == bytes);
    // Damage of the file is found.
    let mut bytes = bytes;
    bytes[len / 2..len / 2 + 64].fill(0xff);
    fs::write(&path, bytes).unwrap();
    let output = run(command("store").args(["--limit", "512K", "--keep"]).arg(&path));
    assert!(!output.status.success(), "{output:?}");
    let output = run(command("store").arg("--limit"));
    assert!(!output.status.success() && output.err.contains("usage"), "{output:?}");
}

#[test]
fn lazy_file_reads_by_faults_what_the_file_holds() {
    let directory = Directory::new("lazy_file");
    let output = run(command("lazy_file").arg(directory.snapshot()));
    assert!(output.status.success() && output.err.is_empty(), "{output:?}");
    let lines: Vec<_> = output.out.lines().collect();
    assert_eq!(lines[0], "1000007 bytes of memory, and nothing is read yet");
    let hash = lines[1].strip_prefix("by page faults: ").expect("a checksum");
    assert_eq!((hash.len(), lines[2]), (16, &*format!("by read(2):     {hash}")));
    let pages = 1_000_007_usize.div_ceil(page_size()) * page_size();
    assert_eq!(numbers(&output.out)["bytes"], pages as u64, "{}", output.out);
    // The hole is filled with zeros, unless the file system has none.
    assert_eq!(numbers(&output.out)["poisoned"], 0, "{}", output.out);
    assert!(output.out.contains("\nfault_latency "), "{}", output.out);
}

#[test]
fn lazy_file_reports_unreadable_file() {
    let output = run(command("lazy_file").arg("/nowhere"));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.err.starts_with("No such file or directory"), "{output:?}");
    let output = run(command("lazy_file").arg("/dev/zero"));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(output.err, "neither a regular file nor a block device\n");
}

#[test]
fn layers_show_each_clone_its_own_memory() {
    let output = run(&mut command("layers"));
    assert!(output.status.success() && output.err.is_empty(), "{output:?}");
    let expected = "base:    1024 pages\ndiff:    103 pages, some of zeros, in a sparse file\n\
                    fork:    52 pages by their extents\nclone 0: 1024 pages are right\nclone 1: 1024 pages are right\n";
    assert_eq!(output.out, expected);
}

#[cfg(feature = "http")]
#[test]
fn from_http_reads_by_faults_what_the_server_has() {
    let output = run(&mut command("from_http"));
    assert!(output.status.success() && output.err.is_empty(), "{output:?}");
    let lines: Vec<_> = output.out.lines().collect();
    let hash = |line: &str, what: &str| line.strip_prefix(what).expect("a checksum")[..16].to_owned();
    assert_eq!(lines[0], "version: \"1\"");
    assert_eq!(hash(lines[2], "faults:  "), hash(lines[3], "at once: "));
    let again: u64 =
        lines[4].rsplit_once(" bytes, ").unwrap().1.strip_suffix(" of them again").unwrap().parse().unwrap();
    assert!(again > 0, "{}", output.out);
}

#[cfg(feature = "tokio")]
#[test]
fn async_source_has_many_loads_in_flight() {
    let output = run(&mut command("async_source"));
    assert!(output.status.success() && output.err.is_empty(), "{output:?}");
    let most = output.out.lines().nth(1).and_then(|line| line.split_once(' ')).unwrap().0;
    assert!(most.parse::<usize>().unwrap() > 8, "{}", output.out);
}

#[test]
fn replay_has_filled_what_was_needed_before() {
    let output = run(&mut command("replay"));
    assert!(output.status.success() && output.err.is_empty(), "{output:?}");
    let lines: Vec<_> = output.out.lines().collect();
    assert!(lines[0].starts_with("first start:  2000 faults in "), "{}", output.out);
    assert!(lines[1].starts_with("working set:  2000 pages in "), "{}", output.out);
    let faults = lines[3].strip_prefix("second start: ").and_then(|rest| rest.split_once(' ')).unwrap().0;
    assert!(faults.parse::<usize>().unwrap() <= 100, "{}", output.out);
    assert!(lines[4].ends_with(&format!(
        "faults for {faults} of them and 0 others; about 0 % for nothing, as {faults} tell"
    )));
}

/// The table of statistics.
fn numbers(text: &str) -> HashMap<&str, u64> {
    let rows = text.lines().filter_map(|line| line.split_once(' '));
    rows.filter_map(|(name, number)| Some((name, number.trim().parse().ok()?))).collect()
}

#[test]
fn serve_fills_the_memory_of_restore() {
    let directory = Directory::new("serve");
    let (snapshot, socket) = (directory.snapshot(), directory.0.join("socket"));
    let mut serve = start(command("serve").args([&snapshot, &socket]).arg("2"));
    assert_eq!(serve.line(), "serving 1000007 bytes\n");
    for _ in 0..2 {
        let restored = run(command("restore").args([&snapshot, &socket]));
        assert!(restored.status.success() && restored.err.is_empty(), "{restored:?}");
        assert_eq!(restored.out, "restored 1000007 bytes, as they are in the snapshot\n");
    }
    let served = serve.output();
    assert!(served.status.success() && served.err.is_empty(), "{served:?}");
    let pages = 1_000_007_usize.div_ceil(page_size()) * page_size();
    let ended = format!("a process has ended, and 0 bytes of its {pages} were never needed\n");
    assert_eq!(served.out.matches(&ended).count(), 2, "{}", served.out);
    assert_eq!(numbers(&served.out)["bytes"], 2 * pages as u64, "{}", served.out);
    assert!(!socket.exists());
}

#[test]
fn serve_outlives_process_asking_for_unserved_memory() {
    let directory = Directory::new("refused");
    let (snapshot, socket) = (directory.snapshot(), directory.0.join("socket"));
    let longer = directory.0.join("longer");
    fs::write(&longer, vec![1; 2_000_000]).unwrap();
    let mut serve = start(command("serve").args([&snapshot, &socket]).arg("3"));
    serve.line();
    let refused = run(command("restore").args([&longer, &socket]));
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert_eq!(refused.err, "the other process doesn't serve this memory: it says why\n");
    drop(UnixStream::connect(&socket).unwrap());
    assert!(run(command("restore").args([&snapshot, &socket])).status.success());
    let served = serve.output();
    assert!(served.status.success(), "{served:?}");
    let problems: Vec<_> = served.err.lines().collect();
    assert!(problems[0].starts_with("a process isn't served: "), "{served:?}");
    assert_eq!(problems[1..], ["a process isn't served: it asks for nothing"], "{served:?}");
}

#[test]
fn restore_shows_no_zeros_when_serve_dies() {
    let directory = Directory::new("dies");
    let (snapshot, socket) = (directory.snapshot(), directory.0.join("socket"));
    // A serve that reads a fault, and dies before it answers.
    let listener = UnixListener::bind(&socket).unwrap();
    let restore = start(command("restore").args([&snapshot, &socket]));
    let (mut stream, _) = listener.accept().unwrap();
    let (_, uffd) = receive::<2>(&stream).unwrap().expect("a descriptor");
    stream.write_all(b"\n").unwrap();
    let uffd = Uffd::from(uffd);
    uffd.read_event().unwrap().expect("a fault");
    // What keeps the fault waiting when the other descriptor is closed.
    assert!(restore.open_files().contains(&"anon_inode:[userfaultfd]".into()), "{:?}", restore.open_files());
    drop((uffd, stream));
    let restored = restore.output();
    assert_eq!(restored.status.code(), Some(1), "{restored:?}");
    assert_eq!(restored.err, "the other process has gone, and with it the rest of the memory\n");
    assert!(restored.out.is_empty(), "{restored:?}");
}

#[test]
fn serve_and_restore_print_usage() {
    for (example, usage) in [
        ("serve", "usage: cargo run --example serve -- SNAPSHOT SOCKET [PROCESSES]\n"),
        ("restore", "usage: cargo run --example restore -- SNAPSHOT SOCKET\n"),
    ] {
        for arguments in [&[][..], &["one"], &["one", "two", "three"], &["one", "two", "3", "four"]] {
            let output = run(command(example).args(arguments));
            assert_eq!((output.status.code(), &*output.err), (Some(1), usage), "{arguments:?}");
        }
    }
}

#[cfg(feature = "handoff")]
#[test]
fn serve_vms_fills_the_memory_of_each_machine() {
    let directory = Directory::new("serve_vms");
    let (snapshot, socket) = (directory.snapshot(), directory.0.join("socket"));
    const MACHINES: usize = 8;
    let mut serve = start(command("serve_vms").args([&snapshot, &socket]).arg((MACHINES + 1).to_string()));
    assert_eq!(serve.line(), "serving\n");
    // One whose memory is longer than the snapshot would sleep for ever: it is killed.
    let longer = directory.0.join("longer");
    fs::write(&longer, vec![1; 2_000_000]).unwrap();
    let refused = run(command("hand_over").args([&longer, &socket]));
    assert_eq!(refused.status.signal(), Some(libc::SIGKILL), "{refused:?}");
    // One that differs is noticed, so that the comparison shows something.
    let other = directory.0.join("other");
    let mut content = fs::read(&snapshot).unwrap();
    content[500_000] ^= 1;
    fs::write(&other, content).unwrap();
    let different = run(command("hand_over").args([&other, &socket]));
    assert_eq!(different.status.code(), Some(1), "{different:?}");
    assert!(different.err.ends_with("isn't as in the snapshot\n"), "{different:?}");
    let machines: Vec<_> =
        (0..MACHINES).map(|_| start(command("hand_over").args([&snapshot, &socket]))).collect();
    for machine in machines {
        let restored = machine.output();
        assert!(restored.status.success() && restored.err.is_empty(), "{restored:?}");
        assert_eq!(restored.out, "restored 1000007 bytes, as they are in the snapshot\n");
    }
    let served = serve.output();
    assert!(served.status.success(), "{served:?}");
    let pages = 1_000_007_usize.div_ceil(page_size()) * page_size();
    let ended = format!("faults, {pages} bytes\n");
    assert_eq!(served.out.matches(&ended).count(), MACHINES, "{}", served.out);
    // The machine that is refused, and what the pager says of those that end.
    assert_eq!(served.err.matches("isn't served: ").count(), 1, "{}", served.err);
    assert!(!socket.exists());
}

#[cfg(feature = "handoff")]
#[test]
fn serve_vms_and_hand_over_print_usage() {
    for (example, usage) in [
        (
            "serve_vms",
            "usage: cargo run --features handoff --example serve_vms -- SNAPSHOT SOCKET [MACHINES]\n",
        ),
        ("hand_over", "usage: cargo run --features handoff --example hand_over -- SNAPSHOT SOCKET\n"),
    ] {
        for arguments in [&[][..], &["one"], &["one", "two", "three"], &["one", "two", "3", "four"]] {
            let output = run(command(example).args(arguments));
            assert_eq!((output.status.code(), &*output.err), (Some(1), usage), "{arguments:?}");
        }
    }
}

#[test]
fn soak_finds_nothing_wrong() {
    // For one page in each arena.
    let _reserved = reserve_huge_pages(16);
    // Emulated machines are slow.
    let seconds = (support::limit().as_secs() / 20).min(8).to_string();
    let output = run(command("soak").args(["--seconds", &seconds, "--seed", "1", "--processes", "2"]));
    assert!(output.status.success(), "{}\n{}", output.out, output.err);
    let times = |what: &str| {
        let line = output.out.lines().find_map(|line| line.strip_prefix(what));
        line.and_then(|times| times.trim().parse::<u64>().ok()).expect("a line of the table")
    };
    for what in ["pages read", "pages written", "ranges removed", "LazyMemory", "missing_faults", "fills"] {
        assert!(times(what) > 0, "{what}: {}", output.out);
    }
    assert!(output.out.contains("before: ") && output.out.contains("after:  "), "{}", output.out);
}

#[test]
fn soak_prints_usage() {
    for arguments in [&["--seconds"][..], &["--seconds", "many"], &["--threads", "0"], &["--speed", "1"]] {
        let output = run(command("soak").args(arguments));
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
        assert!(
            output.err.ends_with("[--seconds N] [--seed N] [--processes N] [--threads N] [--limit N]\n"),
            "{output:?}"
        );
    }
}

#[test]
fn probe_prints_kernel_features_and_memory_kinds() {
    let output = run(&mut command("probe"));
    assert!(output.status.success() && output.err.is_empty(), "{output:?}");
    let support = Support::probe().unwrap();
    assert!(output.out.contains(&support.to_string()), "{}", output.out);
    for (memory, mode, feature, operation) in [
        ("private anonymous", "MISSING", FeatureFlags::empty(), "ZEROPAGE"),
        ("private anonymous", "WRITE_PROTECT", FeatureFlags::PAGEFAULT_FLAG_WP, "WRITE_PROTECT"),
        ("private anonymous", "READ_WRITE_PROTECT", FeatureFlags::RWP, "READ_WRITE_PROTECT"),
        ("shared (memfd, tmpfs)", "MISSING", FeatureFlags::MISSING_SHMEM, "ZEROPAGE"),
        ("shared (memfd, tmpfs)", "WRITE_PROTECT", FeatureFlags::WP_HUGETLBFS_SHMEM, "WRITE_PROTECT"),
        ("shared (memfd, tmpfs)", "MINOR", FeatureFlags::MINOR_SHMEM, "CONTINUE"),
        ("shared (memfd, tmpfs)", "READ_WRITE_PROTECT", FeatureFlags::RWP, "READ_WRITE_PROTECT"),
    ] {
        let row = format!("{memory:<22} {mode:<19} ");
        let answer = output.out.lines().find_map(|line| line.strip_prefix(&row));
        let answer = answer.unwrap_or_else(|| panic!("no row {row:?} in {}", output.out));
        if support.features().contains(feature) {
            assert!(answer.split(" | ").any(|word| word == operation), "{row}{answer}");
        } else {
            assert_eq!(answer, format!("no: this kernel lacks {}", since(feature)), "{row}");
        }
    }
    let row = format!("{:<22} {:<19} no: ", "private anonymous", "MINOR");
    assert!(output.out.contains(&row), "{}", output.out);
    assert!(output.out.contains("hugetlb "), "{}", output.out);
}

#[test]
fn probe_names_remedy_without_rights() {
    if !is_root() {
        return skip("probe_names_remedy_without_rights", "root, to drop it");
    }
    for example in ["hello_fault", "probe"] {
        let output = run(&mut nobodys_command(example));
        assert!(output.status.success() && output.err.is_empty(), "{output:?}");
    }
    let output = run(&mut nobodys_command("probe"));
    assert!(
        output.out.contains("\nrefused: events of forks\nnot permitted to use EVENT_FORK"),
        "{}",
        output.out
    );
    assert!(output.out.contains("cap_sys_ptrace"), "{}", output.out);
    if output.out.contains("no: EPERM") {
        assert!(output.out.contains("vm.unprivileged_userfaultfd=1"), "{}", output.out);
    }
}

#[test]
fn refused_creation_names_remedy() {
    if !is_root() {
        return skip("refused_creation_names_remedy", "root, to drop it");
    }
    for example in ["manpage", "hello_fault", "write_protect", "probe"] {
        let mut command = nobodys_command(example);
        forbid_userfaultfd(command.arg("1"));
        let output = run(&mut command);
        let probe = example == "probe";
        if output.status.success() && !probe {
            return skip("refused_creation_names_remedy", "a /dev/userfaultfd that isn't everybody's");
        }
        let status = match example {
            "probe" => 0,
            // It stands alone, as in README.md.
            "hello_fault" => 1,
            _ => UNMET,
        };
        assert_eq!(output.status.code(), Some(status.into()), "{output:?}");
        let told = if probe { output.out } else { output.err };
        let last = told.lines().last().expect("it says why");
        let needs = last.starts_with("needs the right to create a userfaultfd");
        assert_eq!(needs, status == UNMET, "{told}");
        assert!(told.contains("EPERM"), "{example}: {told}");
        for part in ["/dev/userfaultfd", "hat helps", "seccomp"] {
            assert!(told.contains(part), "{example}: {part} is not in: {told}");
        }
    }
}

#[test]
fn dirty_tracking_reports_and_draws_written_pages() {
    let picture = std::env::temp_dir().join(format!("dirty-{}.svg", std::process::id()));
    let need = Need::Features(FeatureFlags::PAGEFAULT_FLAG_WP);
    let Some(output) = run(command("dirty_tracking").arg(&picture).arg("2"))
        .unless_unmet("dirty_tracking_reports_and_draws_written_pages", need)
    else {
        return;
    };
    let pages = (2 << 20) / page_size();
    let mode =
        if Support::probe().unwrap().features().contains(FeatureFlags::WP_ASYNC) { "async" } else { "sync" };
    let head = format!("{pages} pages of {} bytes, tracked in {mode} mode\n", page_size());
    assert!(output.out.starts_with(&head), "{}", output.out);
    let window = ("a moving window", pages / 4, 1);
    for (name, written, ranges) in [
        ("all of it", pages, 1),
        ("nothing", 0, 0),
        ("the first quarter", pages / 4, 1),
        ("every eighth page", pages / 8, pages / 8),
        ("a hot spot", pages / 16, 1),
        window,
    ] {
        let row = format!("{name:<20}{written:>10}{ranges:>10}");
        assert!(output.out.lines().any(|line| line.starts_with(&row)), "no row {row:?} in {}", output.out);
    }
    assert_eq!(output.out.lines().filter(|line| line.starts_with("a moving window")).count(), 4);
    let svg = std::fs::read_to_string(&picture).unwrap();
    std::fs::remove_file(picture).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{svg}");
    // The background, and a field for each of 128 columns in each of 9 rows; white where nothing was written. Of every
    // eighth page it depends on the page size whether a field is more than a page.
    let (dark, touched) = if pages <= 128 { (16, 16) } else { (0, (pages / 8).min(128)) };
    assert_eq!(svg.matches("<rect ").count(), 1 + 9 * 128);
    assert_eq!(svg.matches("fill=\"rgb(165,20,0)\"").count(), 128 + 32 + 8 + 4 * 32 + dark);
    assert_eq!(svg.matches("fill=\"rgb(255,255,255)\"").count(), 128 + 96 + 120 + 4 * 96 + 128 - touched);
}

#[test]
fn working_set_reports_pages_in_use() {
    let need = Need::Features(FeatureFlags::RWP | FeatureFlags::RWP_ASYNC);
    let Some(output) =
        run(&mut command("working_set")).unless_unmet("working_set_reports_pages_in_use", need)
    else {
        return;
    };
    let expected = "1024 pages, tracked in async mode\n\
        a scan of everything    1024 pages hot, in 1 ranges\n\
        a small loop              32 pages hot, in 1 ranges\n\
        two tables               128 pages hot, in 2 ranges\n\
        one page                   1 pages hot, in 1 ranges\n";
    assert_eq!(output.out, expected);
}

#[test]
fn live_snapshot_is_verified_in_another_process() {
    let need = Need::Features(FeatureFlags::PAGEFAULT_FLAG_WP);
    let Some(output) = run(command("live_snapshot").arg("1"))
        .unless_unmet("live_snapshot_is_verified_in_another_process", need)
    else {
        return;
    };
    let mut lines = output.out.lines();
    assert!(lines.next().is_some_and(|line| line.starts_with("saved 1 MiB as ")), "{}", output.out);
    let last = lines.next_back().unwrap_or_default();
    assert!(last.starts_with("restored in another process: put "), "{}", output.out);
    assert!(last.ends_with(" and all before it are there, and none behind"), "{}", output.out);
}

#[test]
fn readmes_show_hello_fault_and_its_output() {
    let program = include_str!("../hello_fault.rs");
    let (header, program) = program.split_once("\n\n").unwrap();
    assert!(header.lines().all(|line| line.starts_with("//!")), "{header}");
    let printed = masked(&run(&mut command("hello_fault")).out).replace(&page_size().to_string(), "4096");
    for readme in [include_str!("../../README.md"), include_str!("../../userfaultfd/README.md")] {
        let blocks = blocks(readme);
        let at = blocks.iter().position(|(language, _)| *language == "rust").expect("a program");
        assert_eq!(blocks[at].1, program);
        let (language, shown) = blocks[at + 1];
        assert_eq!((language, masked(shown)), ("text", printed.clone()));
    }
    let (_, second) = include_str!("../sparse_reads.rs").split_once("\n\n").unwrap();
    for readme in [include_str!("../../README.md"), include_str!("../../userfaultfd/README.md")] {
        assert!(blocks(readme).iter().any(|(language, shown)| *language == "rust" && *shown == second));
    }
    let crate_page: String = include_str!("../../userfaultfd/src/lib.rs")
        .lines()
        .map_while(|line| line.strip_prefix("//!"))
        .flat_map(|line| [line.strip_prefix(' ').unwrap_or(line), "\n"])
        .collect();
    let first = crate_page.split("```\n").nth(1).expect("a program");
    assert_eq!(first, program);
}

#[test]
fn cookbook_shows_parts_of_examples_as_they_are() {
    macro_rules! page {
        ($name:literal) => {
            include_str!(concat!("../../userfaultfd/src/guide/cookbook/", $name, ".md"))
        };
    }
    let restore_and_serve = concat!(include_str!("../restore.rs"), include_str!("../serve.rs"));
    for (page, example) in [
        (page!("other_process"), restore_and_serve),
        (page!("migration"), include_str!("../migrate.rs")),
        (page!("tokio_loop"), include_str!("../tokio_loop.rs")),
    ] {
        let blocks = blocks(page);
        assert_eq!(blocks.len(), 2, "{page}");
        for (_, block) in blocks {
            // Lines that rustdoc hides make the part a program. Between them each run of lines is of the example.
            let parts = block.split_inclusive('\n').collect::<Vec<_>>();
            for part in parts.split(|line| line.starts_with("# ")).filter(|part| !part.is_empty()) {
                let part = part.concat();
                assert!(example.contains(&part), "not in the example:\n{part}");
            }
        }
    }
}

#[test]
fn migrated_program_computes_same_result() {
    let output = run(command("migrate").arg("1"));
    assert!(output.status.success(), "{output:?}");
    let lines: Vec<&str> = output.out.lines().collect();
    assert_eq!(lines[0], "source: 100000 steps, then handed 16 bytes over");
    assert!(lines[1].starts_with("destination: ran on for "), "{}", output.out);
    assert!(lines[2].starts_with("destination: all 1048576 bytes are here after "), "{}", output.out);
    let result = lines[3].strip_prefix("source: the program came to what it comes to without moving: ");
    assert_eq!(result.map(str::len), Some(16), "{}", output.out);
    assert_eq!(lines.len(), 4);
    let usage = run(command("migrate").arg("0"));
    assert_eq!(
        (usage.status.code(), &*usage.err),
        (Some(1), "usage: cargo run --example migrate -- [MIB]\n")
    );
}

#[cfg(feature = "async-io")]
#[test]
fn async_io_loop_loads_each_page_once() {
    let output = run(&mut command("async_io_loop"));
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.out, "64 threads have read 32 pages\n");
}

#[cfg(feature = "tokio")]
#[test]
fn tokio_loop_resolves_the_fault_of_every_thread() {
    let output = run(&mut command("tokio_loop"));
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.out, "32 threads have read 32 pages\n");
}
