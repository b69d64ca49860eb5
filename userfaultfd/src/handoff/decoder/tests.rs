use super::*;
use crate::RegisterMode;
use crate::handoff::{MemoryRegion, region};
use crate::support::random::{Random, for_a_while};
use crate::support::require;

fn regions() -> Vec<MemoryRegion> {
    let page = crate::page_size();
    vec![
        MemoryRegion::new(0x10_0000, 16 * page, 0).guest_address(0).file_offset(0),
        MemoryRegion::new(0x4000_0000, 2 * page, 16 * page as u64)
            .guest_address(1 << 32)
            .file_offset(16 * page as u64),
    ]
}

/// What each dialect can say, all at once.
fn messages(dialect: Dialect) -> Vec<Message> {
    let pid = Some(1234);
    let handoff =
        |pid, files| Message::Handoff { regions: regions(), mode: RegisterMode::MISSING, pid, files };
    match dialect {
        Dialect::Firecracker | Dialect::E2b | Dialect::CodeSandbox => vec![Message::handoff(regions()); 2],
        Dialect::Nydus => vec![Message::Stat, Message::handoff(regions())],
        Dialect::CloudHypervisor => {
            vec![handoff(pid, Some(0)), Message::AddRegions(vec![regions().remove(1)])]
        }
        Dialect::CloudHypervisorBackend => vec![
            handoff(None, Some(2)),
            Message::AddRegions(regions()),
            Message::RemoveRegions(vec![regions().remove(0)]),
        ],
        Dialect::CloudHypervisorPageFault => vec![
            Message::PageFault { guest_address: 1 << 40, len: 4096 },
            Message::PageFault { guest_address: u64::MAX, len: u64::MAX },
        ],
        Dialect::Criu => vec![
            Message::Handoff { regions: vec![], mode: RegisterMode::MISSING, pid, files: Some(0) },
            Message::Zombie { pid: 77 },
            Message::Complete,
        ],
    }
}

/// What is left of a message on the wire: not every dialect says all of a region.
fn said(dialect: Dialect, message: &Message) -> Message {
    let forget = |regions: &[MemoryRegion]| {
        let mut regions = regions.to_vec();
        for region in &mut regions {
            if dialect != Dialect::CloudHypervisor {
                region.guest_address = None;
            }
            if dialect != Dialect::CloudHypervisorBackend {
                region.file_offset = None;
            }
        }
        regions
    };
    match message.clone() {
        Message::Handoff { regions, mode, pid, files } => {
            Message::Handoff { regions: forget(&regions), mode, pid, files }
        }
        Message::AddRegions(regions) => Message::AddRegions(forget(&regions)),
        Message::RemoveRegions(regions) => Message::RemoveRegions(forget(&regions)),
        other => other,
    }
}

/// All messages of bytes that arrive in some parts.
fn decode<'a>(
    mut decoder: Decoder,
    parts: impl Iterator<Item = &'a [u8]>,
) -> Result<Vec<Message>, PeerError> {
    let mut messages = Vec::new();
    for part in parts {
        decoder.push(part);
        while let Some(message) = decoder.next_message()? {
            messages.push(message);
        }
    }
    Ok(messages)
}

#[test]
fn messages_arrive_whatever_their_parts() {
    require!();
    let mut random = Random::new(0x5eed);
    for dialect in Dialect::ALL.iter().copied() {
        let sent = messages(dialect);
        let bytes: Vec<u8> = sent.iter().flat_map(|message| dialect.encode(message).unwrap()).collect();
        let expected: Vec<_> = sent.iter().map(|message| said(dialect, message)).collect();
        let decoder = || Decoder::new([dialect]);
        assert_eq!(decode(decoder(), [&bytes[..]].into_iter()).unwrap(), expected, "{dialect} at once");
        assert_eq!(decode(decoder(), bytes.chunks(1)).unwrap(), expected, "{dialect} by bytes");
        for _ in 0..20 {
            let mut cuts: Vec<_> = (0..4).map(|_| random.below(bytes.len() + 1)).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let parts = cuts.windows(2).map(|cut| &bytes[cut[0]..cut[1]]);
            assert_eq!(decode(decoder(), parts).unwrap(), expected, "{dialect} cut at {cuts:?}");
        }
        // Part of a message is none, and no error.
        let first = dialect.encode(&sent[0]).unwrap();
        for len in 0..first.len() {
            assert_eq!(decode(decoder(), [&first[..len]].into_iter()).unwrap(), [], "{dialect}: {len}");
        }
    }
}

#[test]
fn dialect_is_recognised_by_the_first_bytes() {
    require!();
    for dialect in Dialect::ALL.iter().copied() {
        let bytes = dialect.encode(&messages(dialect)[0]).unwrap();
        let mut decoder = Decoder::new(Dialect::ALL.iter().copied());
        for byte in &bytes {
            decoder.push(&[*byte]);
            if decoder.next_message().is_err() {
                break;
            }
        }
        match dialect {
            // The same array as Firecracker's.
            Dialect::E2b | Dialect::CodeSandbox => assert_eq!(decoder.dialect(), Some(Dialect::Firecracker)),
            Dialect::Criu => assert!(!dialect.is_recognised()),
            _ => {
                assert_eq!(decoder.dialect(), Some(dialect));
                assert!(dialect.is_recognised());
            }
        }
    }
    assert!(!Dialect::CodeSandbox.is_recognised());
    // The first that is allowed, of those that begin alike.
    let mut decoder = Decoder::new([Dialect::Criu, Dialect::Nydus, Dialect::Firecracker]);
    decoder.push(b" [");
    decoder.next_message().unwrap();
    assert_eq!(decoder.dialect(), Some(Dialect::Nydus));
    decoder = Decoder::new([Dialect::CloudHypervisor, Dialect::Nydus]);
    decoder.push(b"[");
    assert_eq!(decoder.next_message().unwrap(), None, "it may be a length");
    decoder.push(b"[[[[");
    assert!(matches!(decoder.next_message(), Ok(None) | Err(_)));
}

#[test]
fn unknown_fields_are_ignored_and_unknown_messages_shown() {
    require!();
    let one = |dialect, bytes: &[u8]| decode(Decoder::new([dialect]), [bytes].into_iter());
    let array = br#"[{"base_host_virt_addr":65536,"size":65536,"offset":0,"page_size":65536,
        "page_size_kib":3,"new":{"a":[1,"]"]}}]"#;
    for dialect in [Dialect::Firecracker, Dialect::E2b, Dialect::CodeSandbox, Dialect::Nydus] {
        let expected = MemoryRegion::new(65536, 65536, 0).page_size(65536);
        assert_eq!(one(dialect, array).unwrap(), [Message::handoff([expected])], "{dialect}");
    }
    let length = |text: &str| [&(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let wp = r#"{"type":"handoff","version":0,"vmm_pid":7,"mode":"WP_ASYNC","new":1,"regions":
        [{"guest_phys_addr":1,"host_virt_addr":2,"size":3,"backing_file_offset":4,"new":5}]}"#;
    let [Message::Handoff { mode, regions, pid, .. }] =
        &one(Dialect::CloudHypervisor, &length(wp)).unwrap()[..]
    else {
        panic!("a hand-over")
    };
    assert_eq!((*mode, *pid, regions[0].guest_address), (RegisterMode::WRITE_PROTECT, Some(7), Some(1)));
    for (dialect, bytes, reason) in [
        (Dialect::Firecracker, b"{\"hello\":1}".to_vec(), "invalid type"),
        (Dialect::Firecracker, b"[1]".to_vec(), "invalid type"),
        (Dialect::Firecracker, b"[{\"size\":1}]".to_vec(), "missing field"),
        (Dialect::Firecracker, b"GET / HTTP/1.1".to_vec(), "no array"),
        (
            Dialect::Firecracker,
            b"[{\"base_host_virt_addr\":-1,\"size\":1,\"offset\":0}]".to_vec(),
            "invalid value",
        ),
        (Dialect::Nydus, b"{\"type\":9}".to_vec(), "type 9"),
        (Dialect::Nydus, b"{\"type\":0}".to_vec(), "no regions"),
        (Dialect::Nydus, b"{\"type\":1,\"ranges\":[]}".to_vec(), "type 1"),
        (Dialect::CloudHypervisor, length("{\"type\":\"goodbye\"}"), "goodbye"),
        (Dialect::CloudHypervisor, length(&wp.replace("\"version\":0", "\"version\":1")), "version is 1"),
        (Dialect::CloudHypervisor, length(&wp.replace("WP_ASYNC", "OTHER")), "OTHER"),
        (Dialect::CloudHypervisorPageFault, vec![7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "0x7"),
        (Dialect::CloudHypervisorBackend, vec![10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "ends in"),
        (Dialect::Criu, vec![0; 4], "process 0"),
    ] {
        let error = one(dialect, &bytes).unwrap_err();
        let PeerError::Message { dialect: of, shown, .. } = &error else { panic!("{error:?}") };
        assert_eq!((*of, shown), (dialect, &super::shown(&bytes)));
        assert!(error.to_string().contains(reason), "{error}");
    }
    let mut decoder = Decoder::new(Dialect::ALL.iter().copied());
    decoder.push(b"GET / HTTP/1.1\r\n");
    let error = decoder.next_message().unwrap_err();
    assert!(
        matches!(&error, PeerError::Unrecognised { shown } if shown == r"GET / HTTP/1.1\r\n"),
        "{error:?}"
    );
    assert!(shown(&[0xff; 500]).ends_with("(500 bytes)") && shown(&[0xff; 500]).len() < 600);
}

#[test]
fn endless_messages_meet_the_limit() {
    require!();
    for dialect in Dialect::ALL.iter().copied() {
        let (mut decoder, mut pushed) = (Decoder::new([dialect]).limit(10_000), 0);
        let chunk: Vec<u8> = match dialect.wire().framing {
            crate::handoff::framing::Framing::Json => vec![b'['; 1000],
            // Lengths that no message has.
            _ => vec![0xff; 1000],
        };
        let error = loop {
            decoder.push(&chunk);
            pushed += chunk.len();
            assert!(pushed <= 12_000, "{dialect} takes {pushed} bytes");
            match decoder.next_message() {
                Err(error) => break error,
                Ok(Some(_)) => assert_eq!(dialect, Dialect::Criu, "zombies have no length"),
                Ok(None) => {}
            }
            if dialect == Dialect::Criu && pushed >= 10_000 {
                break PeerError::TooLong { limit: 10_000 };
            }
        };
        assert!(matches!(error, PeerError::TooLong { limit: 10_000 }), "{dialect}: {error:?}");
    }
}

/// Any bytes, and messages with any change, in any parts: an answer or an error, and what is accepted is whole.
#[test]
fn hostile_bytes_are_an_error_or_a_message() {
    require!();
    let mut random = Random::new(0xbad_5eed);
    let (mut accepted, mut refused) = (0, 0);
    for round in 0..4000 {
        let dialect = Dialect::ALL[round % Dialect::ALL.len()];
        let mut bytes: Vec<u8> = if random.below(4) == 0 {
            (0..random.below(200)).map(|_| random.below(256) as u8).collect()
        } else {
            messages(dialect).iter().flat_map(|message| dialect.encode(message).unwrap()).collect()
        };
        for _ in 0..random.below(4) {
            if bytes.is_empty() {
                break;
            }
            let at = random.below(bytes.len().max(1));
            match random.below(4) {
                0 => bytes[at] = random.below(256) as u8,
                1 => bytes.insert(at, b"[]{}\",:0-9\\"[random.below(11)]),
                2 => drop(bytes.drain(at..)),
                _ => bytes[at] ^= 1 << random.below(8),
            }
        }
        let allowed = if random.below(2) == 0 { &Dialect::ALL[round % 8..=round % 8] } else { Dialect::ALL };
        let mut decoder = Decoder::new(allowed.iter().copied()).limit(4096);
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (part, after) = rest.split_at(1 + random.below(rest.len().max(1)));
            rest = after;
            decoder.push(part);
            match decoder.next_message() {
                Ok(Some(Message::Handoff { regions, .. })) => {
                    // What passes the check can be added up.
                    if region::check(&regions).is_ok() {
                        regions
                            .iter()
                            .for_each(|region| assert!(region.address + region.len > region.address));
                    }
                    accepted += 1;
                }
                Ok(_) => {}
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    refused += 1;
                    break;
                }
            }
        }
    }
    assert!(accepted > 500 && refused > 500, "{accepted} accepted, {refused} refused");
}

/// Messages of any dialect, damaged in any way, in any parts: what is accepted is no longer than the bytes that came, and can be
/// said again where its dialect says all of it.
#[test]
fn damaged_messages_are_an_error_or_messages() {
    require!();
    let of_dialect = |dialect: Dialect| -> Vec<u8> {
        messages(dialect).iter().flat_map(|message| dialect.encode(message).unwrap()).collect()
    };
    let seeds: Vec<Vec<u8>> = Dialect::ALL.iter().map(|dialect| of_dialect(*dialect)).collect();
    for_a_while(|random| {
        let number = random.below(seeds.len());
        let mut bytes = seeds[number].clone();
        for _ in 0..=random.below(4) {
            random.damage(&mut bytes, &seeds);
        }
        let dialect = Dialect::ALL[number];
        let allowed = if random.one_in(2) { std::slice::from_ref(&dialect) } else { Dialect::ALL };
        let mut decoder = Decoder::new(allowed.iter().copied());
        let (mut rest, mut came) = (&bytes[..], 0);
        while !rest.is_empty() {
            let (part, after) = rest.split_at(1 + random.below(rest.len()));
            (rest, came) = (after, came + part.len());
            decoder.push(part);
            loop {
                match decoder.next_message() {
                    Ok(Some(message)) => {
                        if let Message::Handoff { regions, .. }
                        | Message::AddRegions(regions)
                        | Message::RemoveRegions(regions) = &message
                        {
                            assert!(regions.len() <= came / 40, "{} of {came} bytes", regions.len());
                            let _checked = region::check(regions);
                        }
                        let dialect = decoder.dialect().expect("a message is of one");
                        if let Some(again) = dialect.encode(&message) {
                            let again = decode(Decoder::new([dialect]), [&again[..]].into_iter()).unwrap();
                            assert_eq!(again.len(), 1, "{message:?}");
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        assert!(error.to_string().len() < 4000);
                        return;
                    }
                }
            }
        }
    });
}
