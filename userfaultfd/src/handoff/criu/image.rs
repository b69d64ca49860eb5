//! What is read of CRIU's images: records of protocol buffers behind their lengths.

use std::io;

/// All images begin with it, of CRIU 2.0 and later.
const COMMON_MAGIC: u32 = 0x5456_4319;
const PAGEMAP_MAGIC: u32 = 0x5608_4025;
const MM_MAGIC: u32 = 0x5749_2820;

/// Flags of an entry of a pagemap.
const IN_PARENT: u64 = 1;
const PRESENT: u64 = 4;

/// Kinds of mappings that CRIU never leaves to the userfaultfd: vsyscall, vDSO, vvar, rings of asynchronous I/O.
const SPECIAL: u64 = 1 << 2 | 1 << 3 | 1 << 12 | 1 << 13;

/// The size of the pages that an image counts.
pub(super) const PAGE_BYTES: u64 = 4096;

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn cut_off() -> io::Error {
    invalid("it is cut off")
}

/// A `varint` at the beginning of bytes, and what follows it.
fn varint(bytes: &[u8]) -> io::Result<(u64, &[u8])> {
    let mut value = 0;
    for (at, byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f).checked_shl(7 * at as u32).unwrap_or(0);
        if byte & 0x80 == 0 {
            return Ok((value, &bytes[at + 1..]));
        }
    }
    Err(cut_off())
}

/// A field of a record.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    /// Of a fixed length: images that are read here have none.
    Other,
}

/// Passes on the fields of a record, with their numbers.
fn each_field<'a>(
    mut bytes: &'a [u8],
    mut visit: impl FnMut(u64, Field<'a>) -> io::Result<()>,
) -> io::Result<()> {
    while !bytes.is_empty() {
        let (key, rest) = varint(bytes)?;
        let fixed =
            |len: usize| rest.split_at_checked(len).map(|(_, rest)| (Field::Other, rest)).ok_or_else(cut_off);
        let (field, rest) = match key & 7 {
            0 => varint(rest).map(|(number, rest)| (Field::Number(number), rest))?,
            1 => fixed(8)?,
            2 => {
                let (len, rest) = varint(rest)?;
                let len = usize::try_from(len).map_err(|_| cut_off())?;
                let (bytes, rest) = rest.split_at_checked(len).ok_or_else(cut_off)?;
                (Field::Bytes(bytes), rest)
            }
            5 => fixed(4)?,
            _ => return Err(invalid("it has a field of an unknown kind")),
        };
        visit(key >> 3, field)?;
        bytes = rest;
    }
    Ok(())
}

/// The fields of a record that are numbers, of which the first ones are wanted.
fn numbers<const N: usize>(bytes: &[u8]) -> io::Result<[Option<u64>; N]> {
    let mut numbers = [None; N];
    each_field(bytes, |number, field| {
        if let (Some(slot), Field::Number(value)) = (numbers.get_mut(number as usize), field) {
            *slot = Some(value);
        }
        Ok(())
    })?;
    Ok(numbers)
}

/// The records of an image, checked for its kind.
fn records(bytes: &[u8], magic: u32) -> io::Result<impl Iterator<Item = io::Result<&[u8]>>> {
    let word = |bytes: &[u8]| bytes.first_chunk().map(|word| u32::from_le_bytes(*word));
    if word(bytes) != Some(COMMON_MAGIC) || bytes.get(4..).and_then(word) != Some(magic) {
        return Err(invalid("it is no such image of CRIU"));
    }
    let mut rest = &bytes[8..];
    Ok(std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let record = word(rest).and_then(|len| rest[4..].split_at_checked(len as usize));
        match record {
            Some((record, next)) => {
                rest = next;
                Some(Ok(record))
            }
            None => {
                rest = &[];
                Some(Err(cut_off()))
            }
        }
    }))
}

/// Some pages, in the order of the image with pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) start: u64,
    pub(super) end: u64,
    /// Whether the checkpoint before has them.
    pub(super) in_parent: bool,
    /// Whether the image with pages has them.
    pub(super) present: bool,
}

/// Which pages of a process there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pagemap {
    /// The number in the name of the image that has the pages.
    pub(super) pages_id: u64,
    /// By address.
    pub(super) entries: Vec<Entry>,
}

impl Pagemap {
    pub(super) fn decode(bytes: &[u8]) -> io::Result<Self> {
        let mut records = records(bytes, PAGEMAP_MAGIC)?;
        let head = records.next().ok_or_else(cut_off)??;
        let [_, Some(pages_id)] = numbers(head)? else { return Err(invalid("it doesn't name its pages")) };
        let mut entries: Vec<Entry> = Vec::new();
        for record in records {
            let [_, start, few_pages, parent, flags, pages] = numbers(record?)?;
            // Before flags there was a number for the parent alone.
            let flags = flags.unwrap_or(if parent == Some(1) { IN_PARENT } else { PRESENT });
            let (start, pages) =
                start.zip(pages.or(few_pages)).ok_or_else(|| invalid("an entry has no pages"))?;
            let end = pages.checked_mul(PAGE_BYTES).and_then(|len| start.checked_add(len));
            let after = entries.last().map_or(0, |entry| entry.end);
            let end =
                end.filter(|end| start % PAGE_BYTES == 0 && start >= after && usize::try_from(*end).is_ok());
            let end = end.ok_or_else(|| invalid("its entries aren't in the order of addresses"))?;
            let in_parent = flags & IN_PARENT != 0;
            entries.push(Entry { start, end, in_parent, present: !in_parent && flags & PRESENT != 0 });
        }
        Ok(Self { pages_id, entries })
    }
}

/// A mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) start: u64,
    pub(super) end: u64,
    /// Those of mmap(2).
    flags: u64,
    /// Bits that say what it is.
    status: u64,
}

impl Area {
    /// Whether CRIU leaves it to the userfaultfd: as its own code decides.
    pub(super) fn can_be_lazy(&self) -> bool {
        let wanted = (libc::MAP_ANONYMOUS | libc::MAP_PRIVATE) as u64;
        let unwanted = (libc::MAP_LOCKED | libc::MAP_HUGETLB) as u64;
        self.flags & (wanted | unwanted) == wanted && self.status & SPECIAL == 0
    }

    pub(super) fn is_stack(&self) -> bool {
        self.flags & libc::MAP_GROWSDOWN as u64 != 0
    }
}

/// The mappings of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mm {
    /// By address.
    pub(super) areas: Vec<Area>,
}

/// The number of the field that has the mappings.
const AREAS_FIELD: u64 = 14;

impl Mm {
    pub(super) fn decode(bytes: &[u8]) -> io::Result<Self> {
        let mut records = records(bytes, MM_MAGIC)?;
        let record = records.next().ok_or_else(cut_off)??;
        let mut areas: Vec<Area> = Vec::new();
        each_field(record, |number, field| {
            if let (AREAS_FIELD, Field::Bytes(bytes)) = (number, field) {
                let [_, start, end, _, _, _, flags, status] = numbers(bytes)?;
                let (start, end) = start.zip(end).ok_or_else(|| invalid("a mapping has no addresses"))?;
                let after = areas.last().map_or(0, |area| area.end);
                let is_good = after <= start && start < end && (start | end) % PAGE_BYTES == 0;
                if !is_good || (usize::try_from(end).is_err() && flags.is_none()) {
                    return Err(invalid("its mappings aren't in the order of addresses"));
                }
                let (flags, status) = (flags.unwrap_or(0), status.unwrap_or(0));
                areas.push(Area { start, end, flags, status });
            }
            Ok(())
        })?;
        Ok(Self { areas })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::support::random::for_a_while;
    use crate::support::require;

    fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
        while value >= 0x80 {
            bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        bytes.push(value as u8);
    }

    /// A record of numbers, by their fields.
    pub(in super::super) fn record(fields: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (number, value) in fields {
            put_varint(&mut bytes, number << 3);
            put_varint(&mut bytes, *value);
        }
        bytes
    }

    /// An image of records.
    pub(in super::super) fn image(magic: u32, records: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = [COMMON_MAGIC.to_le_bytes(), magic.to_le_bytes()].concat();
        for record in records {
            bytes.extend((record.len() as u32).to_le_bytes());
            bytes.extend(record);
        }
        bytes
    }

    pub(in super::super) fn pagemap(pages_id: u64, entries: &[Vec<u8>]) -> Vec<u8> {
        image(PAGEMAP_MAGIC, &[&[record(&[(1, pages_id)])], entries].concat())
    }

    #[test]
    fn entries_of_all_releases_are_read() {
        require!();
        let bytes = pagemap(
            7,
            &[
                record(&[(1, 0x1000), (2, 2), (4, 6)]),
                record(&[(1, 0x4000), (2, 1), (3, 1)]),
                record(&[(1, 0x5000), (2, 1)]),
                record(&[(1, 0x6000), (4, 1), (5, 3)]),
                record(&[(1, 0x9000), (2, 1), (4, 2)]),
            ],
        );
        let Pagemap { pages_id, entries } = Pagemap::decode(&bytes).unwrap();
        let found: Vec<_> =
            entries.iter().map(|entry| (entry.start, entry.end, entry.in_parent, entry.present)).collect();
        let expected = [
            (0x1000, 0x3000, false, true),
            (0x4000, 0x5000, true, false),
            (0x5000, 0x6000, false, true),
            (0x6000, 0x9000, true, false),
            (0x9000, 0xa000, false, false),
        ];
        assert_eq!((pages_id, &found[..]), (7, &expected[..]));
        for bad in [
            vec![record(&[(1, 0x1001), (2, 2)])],
            vec![record(&[(1, 0x1000), (2, u64::MAX)])],
            vec![record(&[(1, 0x3000), (2, 1)]), record(&[(1, 0x3000), (2, 1)])],
            vec![record(&[(2, 1)])],
        ] {
            Pagemap::decode(&pagemap(7, &bad)).unwrap_err();
        }
        Pagemap::decode(&image(MM_MAGIC, &[record(&[(1, 7)])])).unwrap_err();
        Pagemap::decode(&bytes[..bytes.len() - 1]).unwrap_err();
    }

    #[test]
    fn lazy_mappings_of_criu_are_told_apart() {
        require!();
        let area = |start: u64, flags: libc::c_int, status| {
            let fields = [(1, start), (2, start + 0x1000), (6, flags as u64), (7, status)];
            let bytes = record(&fields);
            let mut field = Vec::new();
            put_varint(&mut field, AREAS_FIELD << 3 | 2);
            put_varint(&mut field, bytes.len() as u64);
            [field, bytes].concat()
        };
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let bytes = image(
            MM_MAGIC,
            &[[
                record(&[(1, 0xffff_ffff_ffff_ffff)]),
                area(0x1000, libc::MAP_PRIVATE, 1),
                area(0x2000, anonymous, 1 | 1 << 9),
                area(0x3000, anonymous | libc::MAP_LOCKED, 1),
                area(0x4000, anonymous, 1 << 3),
                area(0x5000, anonymous | libc::MAP_GROWSDOWN, 1),
            ]
            .concat()],
        );
        let areas = Mm::decode(&bytes).unwrap().areas;
        let found: Vec<_> = areas.iter().map(|area| (area.can_be_lazy(), area.is_stack())).collect();
        assert_eq!(found, [(false, false), (true, false), (false, false), (false, false), (true, true)]);
    }

    /// Images damaged in any way are errors, or have entries for which there are bytes.
    #[test]
    fn damaged_images_are_an_error_or_in_order() {
        require!();
        let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let mut areas = Vec::new();
        for start in [0x1000, 0x4000, 0x7fff_0000_0000] {
            let area = record(&[(1, start), (2, start + 0x2000), (6, anonymous), (7, 1)]);
            put_varint(&mut areas, AREAS_FIELD << 3 | 2);
            put_varint(&mut areas, area.len() as u64);
            areas.extend(area);
        }
        let entries = [
            record(&[(1, 0x1000), (2, 2), (4, 6)]),
            record(&[(1, 0x4000), (2, 1), (3, 1)]),
            record(&[(1, 0x6000), (4, 1), (5, 3)]),
        ];
        let seeds = [
            pagemap(7, &entries),
            image(MM_MAGIC, &[[record(&[(1, u64::MAX)]), areas].concat()]),
            record(&[(3, u64::MAX), (300, 1)]),
        ];
        let (mut accepted, mut refused) = (0, 0);
        for_a_while(|random| {
            let mut bytes = seeds[random.below(2)].clone();
            for _ in 0..=random.below(3) {
                random.damage(&mut bytes, &seeds);
            }
            let (pagemap, mm) = (Pagemap::decode(&bytes), Mm::decode(&bytes));
            accepted += usize::from(pagemap.is_ok() || mm.is_ok());
            refused += usize::from(pagemap.is_err() && mm.is_err());
            if let Ok(Pagemap { entries, .. }) = pagemap {
                // Each has a length of four bytes, a start and a number.
                assert!(entries.len() <= bytes.len() / 8, "{} of {}", entries.len(), bytes.len());
                assert!(entries.iter().all(|entry| entry.start <= entry.end));
                assert!(entries.is_sorted_by(|entry, next| entry.end <= next.start));
            }
            if let Ok(Mm { areas }) = mm {
                assert!(areas.len() <= bytes.len() / 4, "{} of {}", areas.len(), bytes.len());
                assert!(areas.iter().all(|area| area.start < area.end));
                assert!(areas.is_sorted_by(|area, next| area.end <= next.start));
            }
        });
        assert!(accepted > 10 && refused > 10, "{accepted} {refused}");
    }
}
