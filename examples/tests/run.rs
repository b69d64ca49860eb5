//! Runs every example and checks what it prints; and holds the READMEs to the program that they show.
//!
//! An example that says that something is missing here is shown as `SKIP`. That is a failure where the run was
//! told that it is there: by `USERFAULTFD_EXPECT_FEATURES` (a mask in hexadecimal) and `USERFAULTFD_EXPECT`
//! (`CAP_SYS_PTRACE`, `hugetlb`), as for the tests of the library. `USERFAULTFD_EXAMPLES` names the directory of
//! the built examples, where it isn't the one beside this test's.

mod support;

use support::{
    Need, blocks, command, forbid_userfaultfd, is_root, masked, nobodys_command, reserve_huge_pages, run,
    skip,
};
use userfaultfd::{FeatureFlags, Support, page_size};
use userfaultfd_examples::{huge_page_size, since};

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
fn manpage_tells_its_usage() {
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
fn poison_ends_who_touches_it() {
    let need = Need::Features(FeatureFlags::POISON);
    let Some(output) = run(&mut command("poison")).unless_unmet("poison_ends_who_touches_it", need) else {
        return;
    };
    assert_eq!(output.out, "page 0: the child reads A\npage 1: SIGBUS ended the child\n");
    assert_eq!(output.err, "the source fails at page 1\n");
}

#[test]
fn fork_events_bring_the_childs_faults() {
    let Some(output) = run(&mut command("fork_events"))
        .unless_unmet("fork_events_bring_the_childs_faults", Need::Named("CAP_SYS_PTRACE"))
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
        run(&mut command("huge_pages")).unless_unmet("huge_pages_are_filled_whole", Need::Named("hugetlb"))
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

#[test]
fn probe_tells_what_the_kernel_offers_and_what_memory_accepts() {
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
fn without_rights_probe_tells_what_helps() {
    if !is_root() {
        return skip("without_rights_probe_tells_what_helps", "root, to drop it");
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
fn refused_creation_tells_what_helps() {
    if !is_root() {
        return skip("refused_creation_tells_what_helps", "root, to drop it");
    }
    for example in ["manpage", "hello_fault", "write_protect", "probe"] {
        let mut command = nobodys_command(example);
        forbid_userfaultfd(command.arg("1"));
        let output = run(&mut command);
        let probe = example == "probe";
        if output.status.success() && !probe {
            return skip("refused_creation_tells_what_helps", "a /dev/userfaultfd that isn't everybody's");
        }
        assert_eq!(output.status.code(), Some(i32::from(!probe)), "{output:?}");
        let told = if probe { output.out } else { output.err };
        assert!(told.contains("EPERM"), "{example}: {told}");
        for part in ["/dev/userfaultfd", "hat helps", "seccomp"] {
            assert!(told.contains(part), "{example}: {part} is not in: {told}");
        }
    }
}

#[test]
fn the_readmes_show_hello_fault_and_what_it_prints() {
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
    let crate_page: String = include_str!("../../userfaultfd/src/lib.rs")
        .lines()
        .map_while(|line| line.strip_prefix("//!"))
        .flat_map(|line| [line.strip_prefix(' ').unwrap_or(line), "\n"])
        .collect();
    let first = crate_page.split("```\n").nth(1).expect("a program");
    assert_eq!(first, program);
}
