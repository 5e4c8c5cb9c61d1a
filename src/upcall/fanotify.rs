//! The codec of fanotify's pre-content events: bytes to values, answers to bytes. Pure.
//!
//! Layouts are those of include/uapi/linux/fanotify.h, in the machine's byte order. A group that
//! was made without FAN_REPORT_* flags gets 48 bytes for each event: 24 of metadata, 24 that say
//! which range is about to be read. What read(2) gave is hostile until parsed.

use std::ops::Range;

use super::sys::PRE_ACCESS;
use crate::engine::Fd;
use crate::error::{Error, Result};

/// What an event takes in a buffer: room for `n` times as much takes at most `n` events.
pub const EVENT_BYTES: usize = METADATA_BYTES + RANGE_BYTES;
/// What an answer takes; the kernel takes one for each write(2).
pub const ANSWER_BYTES: usize = 8;

const METADATA_BYTES: usize = 24;
const RANGE_BYTES: usize = 24;
const INFO_HEADER_BYTES: usize = 4;
const VERSION: u8 = libc::FANOTIFY_METADATA_VERSION;
/// FAN_EVENT_INFO_TYPE_RANGE.
const INFO_RANGE: u8 = 6;
const ALLOW: u32 = libc::FAN_ALLOW;
/// FAN_DENY_ERRNO(EIO): a reader through EROFS gets EIO for any number, a direct one this one. Any
/// that the kernel does not know makes it refuse the answer, and the reader waits on.
const DENY: u32 = libc::FAN_DENY | (libc::EIO as u32) << 24;

/// Somebody is about to read a file, and waits.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Event {
    /// The file, opened for us: installed in this process, to be closed after the answer. It is
    /// the name of the event, too. `None` if the kernel could not open it: then nobody waits.
    pub file: Option<Fd>,
    /// Who reads; 0 for one outside our pid namespace.
    pub pid: i32,
    /// What is going to happen.
    pub mask: u64,
    /// Which bytes; all there may be if the kernel does not say. May be empty, and may reach
    /// behind the end of the file.
    pub range: Range<u64>,
}

impl Event {
    /// Whether this is the one kind of event we ask for.
    pub fn is_pre_access(&self) -> bool {
        self.mask & PRE_ACCESS != 0
    }

    /// Whether events were lost, and with them the readers' wait: they got what was there. Cannot
    /// happen to a group with an unlimited queue.
    pub fn is_overflow(&self) -> bool {
        self.mask & libc::FAN_Q_OVERFLOW != 0
    }
}

/// What a reader gets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// What is in the file now.
    Allow,
    /// EIO.
    Deny,
}

/// The events in what one read(2) gave. Ends behind the first error: where the next one starts is
/// not known then.
#[derive(Clone, Debug)]
pub struct Events<'a> {
    rest: &'a [u8],
}

/// Takes what read(2) gave apart.
pub fn parse(bytes: &[u8]) -> Events<'_> {
    Events { rest: bytes }
}

/// The answer to an event, for write(2) into its group.
pub fn encode(file: Fd, answer: Answer) -> [u8; ANSWER_BYTES] {
    let response = match answer {
        Answer::Allow => ALLOW,
        Answer::Deny => DENY,
    };
    let mut bytes = [0; ANSWER_BYTES];
    bytes[..4].copy_from_slice(&file.0.to_ne_bytes());
    bytes[4..].copy_from_slice(&response.to_ne_bytes());
    bytes
}

impl Iterator for Events<'_> {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let parsed = split_event(self.rest);
        self.rest = parsed.as_ref().map_or(&[][..], |(_, rest)| rest);
        Some(parsed.map(|(event, _)| parse_event(event)))
    }
}

/// The bytes of the first event, whose metadata is whole, and what is behind them.
fn split_event(bytes: &[u8]) -> Result<(&[u8], &[u8])> {
    let Some((metadata, _)) = bytes.split_first_chunk::<METADATA_BYTES>() else {
        return Err(malformed(format!("{} bytes", bytes.len())));
    };
    let (length, version) = (u32_at(metadata, 0) as usize, metadata[4]);
    let metadata_length = usize::from(u16::from_ne_bytes([metadata[6], metadata[7]]));
    if version != VERSION {
        return Err(malformed(format!("version {version}, {VERSION} is known")));
    }
    if length > bytes.len() || metadata_length > length || metadata_length < METADATA_BYTES {
        return Err(malformed(format!(
            "length {length}, {metadata_length} of it metadata, in {} bytes",
            bytes.len()
        )));
    }
    Ok(bytes.split_at(length))
}

fn parse_event(event: &[u8]) -> Event {
    let metadata_length = usize::from(u16::from_ne_bytes([event[6], event[7]]));
    let file = u32_at(event, 16) as i32;
    Event {
        file: (file >= 0).then_some(Fd(file)),
        pid: u32_at(event, 20) as i32,
        mask: u64_at(event, 8),
        range: find_range(&event[metadata_length..]).unwrap_or(0..u64::MAX),
    }
}

/// The range among the records behind the metadata. One that is cut off ends the search: a reader
/// is then answered as if it had asked for everything.
fn find_range(mut records: &[u8]) -> Option<Range<u64>> {
    while records.len() >= INFO_HEADER_BYTES {
        let length = usize::from(u16::from_ne_bytes([records[2], records[3]]));
        if length < INFO_HEADER_BYTES || length > records.len() {
            return None;
        }
        if records[0] == INFO_RANGE && length >= RANGE_BYTES {
            let (offset, count) = (u64_at(records, 8), u64_at(records, 16));
            return Some(offset..offset.saturating_add(count));
        }
        records = &records[length..];
    }
    None
}

/// Callers have checked the length.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(field)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(field)
}

fn malformed(text: String) -> Error {
    Error::Malformed(format!("an event of fanotify: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event(mask: u64, file: i32, records: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((METADATA_BYTES as u32 + records.len() as u32).to_ne_bytes());
        bytes.extend([3, 0]);
        bytes.extend(24u16.to_ne_bytes());
        bytes.extend(mask.to_ne_bytes());
        bytes.extend(file.to_ne_bytes());
        bytes.extend(77i32.to_ne_bytes());
        bytes.extend(records);
        bytes
    }

    fn record(kind: u8, length: u16, longs: &[u64]) -> Vec<u8> {
        let mut bytes = vec![kind, 0];
        bytes.extend(length.to_ne_bytes());
        bytes.extend([0; 4]);
        longs.iter().for_each(|long| bytes.extend(long.to_ne_bytes()));
        bytes
    }

    fn only(bytes: &[u8]) -> Result<Event> {
        let mut events = parse(bytes);
        let first = events.next().expect("there is one");
        assert!(events.next().is_none());
        first
    }

    #[test]
    fn event_says_which_file_range_and_reader() {
        let bytes = event(PRE_ACCESS, 9, &record(6, 24, &[4096, 65536]));
        assert_eq!(bytes.len(), EVENT_BYTES);
        let range = 4096..69632;
        let expected = Event { file: Some(Fd(9)), pid: 77, mask: PRE_ACCESS, range };
        assert_eq!(only(&bytes), Ok(expected));
        assert!(only(&bytes).unwrap().is_pre_access());
    }

    #[test]
    fn several_events_come_in_one_buffer() {
        let bytes: Vec<u8> =
            (0..3).flat_map(|fd| event(PRE_ACCESS, fd, &record(6, 24, &[0, 1]))).collect();
        let files: Vec<_> = parse(&bytes).map(|event| event.unwrap().file.unwrap().0).collect();
        assert_eq!(files, [0, 1, 2]);
        assert_eq!(parse(&[]).count(), 0);
    }

    #[test]
    fn records_of_other_kinds_are_passed_over() {
        let records = [record(4, 8, &[]), record(200, 16, &[5]), record(6, 24, &[1, 2])].concat();
        assert_eq!(only(&event(PRE_ACCESS, 1, &records)).unwrap().range, 1..3);
    }

    #[test]
    fn range_that_is_not_told_is_everything_and_one_too_long_has_an_end() {
        let cut = &record(6, 24, &[1, 2])[..20];
        let endless = record(4, 0, &[]);
        for records in [&[][..], cut, &endless, &record(6, 16, &[1])] {
            assert_eq!(only(&event(PRE_ACCESS, 1, records)).unwrap().range, 0..u64::MAX);
        }
        let wide = event(PRE_ACCESS, 1, &record(6, 24, &[8, u64::MAX]));
        assert_eq!(only(&wide).unwrap().range, 8..u64::MAX);
        let empty = event(PRE_ACCESS, 1, &record(6, 24, &[8, 0]));
        assert!(only(&empty).unwrap().range.is_empty());
    }

    #[test]
    fn event_without_a_file_waits_for_no_answer() {
        let overflow = only(&event(libc::FAN_Q_OVERFLOW, -1, &[])).unwrap();
        assert!(overflow.is_overflow() && !overflow.is_pre_access());
        assert_eq!(overflow.file, None);
    }

    #[test]
    fn damaged_events_end_the_buffer() {
        let good = event(PRE_ACCESS, 1, &record(6, 24, &[0, 1]));
        let damages: [(usize, &[u8]); 5] = [
            (0, &0u32.to_ne_bytes()),
            (0, &23u32.to_ne_bytes()),
            (0, &u32::MAX.to_ne_bytes()),
            (4, &[2]),
            (6, &25u16.to_ne_bytes()),
        ];
        for (at, field) in damages {
            let mut bytes = [good.clone(), good.clone()].concat();
            bytes[at..at + field.len()].copy_from_slice(field);
            if at == 6 {
                bytes[0] = 24;
            }
            assert!(only(&bytes).is_err(), "{at}");
        }
        assert!(only(&good[..47]).is_err());
    }

    #[test]
    fn answers_are_the_kernels_numbers() {
        let words = |answer| {
            let bytes = encode(Fd(7), answer);
            (u32_at(&bytes, 0), u32_at(&bytes, 4))
        };
        assert_eq!(words(Answer::Allow), (7, 1));
        assert_eq!(words(Answer::Deny), (7, 0x0500_0002));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_go_on_for_ever(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            prop_assert!(parse(&bytes).count() <= bytes.len() / METADATA_BYTES + 1);
        }
    }
}
