//! The codec of /dev/cachefiles in on-demand mode: messages to values, answers to text. Pure.
//!
//! Layouts are those of include/uapi/linux/cachefiles.h, in the machine's byte order. A message is
//! hostile until parsed: lengths are checked against what was read.

use std::ops::Range;

use crate::error::{Error, Result};

/// The longest message: the kernel refuses to write into less room (CACHEFILES_MSG_MAX_SIZE).
pub const MESSAGE_MAX_BYTES: usize = 1024;

const HEADER_BYTES: usize = 16;
const OPEN_BYTES: usize = 16;
const OPCODE_OPEN: u32 = 0;
const OPCODE_CLOSE: u32 = 1;
const OPCODE_READ: u32 = 2;
/// What EROFS puts in front of its volume keys.
const VOLUME_PREFIX: &[u8] = b"erofs,";

/// A request's number, for its answer.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct MessageId(pub u32);

/// A cache object's number.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct ObjectId(pub u32);

/// What the kernel asks.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Message<'a> {
    /// A cookie is being looked up; `fd` is installed in this process.
    Open {
        /// For the answer.
        id: MessageId,
        /// What later messages call it.
        object: ObjectId,
        /// The file to fill it through.
        fd: i32,
        /// The volume, without EROFS's prefix and the closing NUL.
        volume: &'a [u8],
        /// The cookie: a fsid or a device tag.
        cookie: &'a [u8],
    },
    /// The object is gone; no answer is wanted.
    Close {
        /// Which.
        object: ObjectId,
    },
    /// A reader waits for these bytes.
    Read {
        /// For the answer.
        id: MessageId,
        /// Of which object.
        object: ObjectId,
        /// Which bytes; page-aligned, not empty.
        range: Range<u64>,
    },
}

/// Parses one message as read(2) gave it.
///
/// # Errors
/// `Malformed` naming the field. An OPEN whose keys are bad has a file all the same: [`open_fd`].
pub fn parse(bytes: &[u8]) -> Result<Message<'_>> {
    let length = word(bytes, 8)? as usize;
    if length > bytes.len() || length < HEADER_BYTES {
        return Err(malformed(format!("length {length} in {} bytes", bytes.len())));
    }
    let payload = &bytes[HEADER_BYTES..length];
    let (id, object) = (MessageId(word(bytes, 0)?), ObjectId(word(bytes, 12)?));
    match word(bytes, 4)? {
        OPCODE_OPEN => parse_open(id, object, payload),
        OPCODE_CLOSE => Ok(Message::Close { object }),
        OPCODE_READ => parse_read(id, object, payload),
        opcode => Err(malformed(format!("opcode {opcode} is not known"))),
    }
}

/// The number of a message that may be damaged, and the file of an OPEN that may be: both are
/// needed to refuse it without leaving the kernel waiting.
pub fn open_fd(bytes: &[u8]) -> Option<(MessageId, i32)> {
    let is_open = word(bytes, 4).ok()? == OPCODE_OPEN;
    let fd = word(bytes, HEADER_BYTES + 8).ok()? as i32;
    let id = MessageId(word(bytes, 0).ok()?);
    (is_open && fd >= 0).then_some((id, fd))
}

fn parse_open(id: MessageId, object: ObjectId, payload: &[u8]) -> Result<Message<'_>> {
    let (volume_size, cookie_size) = (word(payload, 0)? as usize, word(payload, 4)? as usize);
    let fd = word(payload, 8)? as i32;
    let keys = payload.get(OPEN_BYTES..).unwrap_or_default();
    if volume_size.checked_add(cookie_size).is_none_or(|size| size > keys.len()) || fd < 0 {
        return Err(malformed(format!(
            "an open with keys of {volume_size} and {cookie_size} bytes in {}, file {fd}",
            keys.len()
        )));
    }
    let (volume, rest) = keys.split_at(volume_size);
    let volume = trim_nul(volume);
    let volume = volume.strip_prefix(VOLUME_PREFIX).unwrap_or(volume);
    Ok(Message::Open { id, object, fd, volume, cookie: trim_nul(&rest[..cookie_size]) })
}

fn parse_read(id: MessageId, object: ObjectId, payload: &[u8]) -> Result<Message<'_>> {
    let (start, length) = (long(payload, 0)?, long(payload, 8)?);
    match start.checked_add(length) {
        Some(end) if length > 0 => Ok(Message::Read { id, object, range: start..end }),
        _ => Err(malformed(format!("a read at {start} of {length} bytes"))),
    }
}

/// The answer to an OPEN: the object's size in bytes, or an errno. Gives the text's length in
/// `into`.
pub fn copen(id: MessageId, answer: std::result::Result<u64, i32>, into: &mut [u8; 64]) -> usize {
    use std::io::Write;
    let mut rest = &mut into[..];
    let written = match answer {
        Ok(size) => write!(rest, "copen {},{size}", id.0),
        Err(errno) => write!(rest, "copen {},-{errno}", id.0),
    };
    written.expect("two numbers fit 64 bytes");
    let left = rest.len();
    into.len() - left
}

fn trim_nul(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    &bytes[..end]
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    let field = bytes.get(at..at + 4).and_then(|field| field.try_into().ok());
    field.map(u32::from_ne_bytes).ok_or_else(|| malformed(format!("ends before byte {}", at + 4)))
}

fn long(bytes: &[u8], at: usize) -> Result<u64> {
    let field = bytes.get(at..at + 8).and_then(|field| field.try_into().ok());
    field.map(u64::from_ne_bytes).ok_or_else(|| malformed(format!("ends before byte {}", at + 8)))
}

fn malformed(text: String) -> Error {
    Error::Malformed(format!("message of /dev/cachefiles: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(id: u32, opcode: u32, object: u32, payload: &[u8]) -> Vec<u8> {
        let length = (HEADER_BYTES + payload.len()) as u32;
        let mut bytes = Vec::new();
        for field in [id, opcode, length, object] {
            bytes.extend(field.to_ne_bytes());
        }
        bytes.extend(payload);
        bytes
    }

    fn open_payload(volume: &[u8], cookie: &[u8], fd: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        for field in [volume.len() as u32, cookie.len() as u32, fd, 0] {
            bytes.extend(field.to_ne_bytes());
        }
        bytes.extend(volume);
        bytes.extend(cookie);
        bytes
    }

    #[test]
    fn open_names_domain_cookie_and_file() {
        let bytes = message(7, 0, 9, &open_payload(b"erofs,demo\0", b"demo", 5));
        let (id, object) = (MessageId(7), ObjectId(9));
        let expected = Message::Open { id, object, fd: 5, volume: b"demo", cookie: b"demo" };
        assert_eq!(parse(&bytes), Ok(expected));
    }

    #[test]
    fn read_and_close_are_what_they_say() {
        let mut payload = 8192u64.to_ne_bytes().to_vec();
        payload.extend(4096u64.to_ne_bytes());
        let (id, object) = (MessageId(1), ObjectId(2));
        let read = message(1, 2, 2, &payload);
        assert_eq!(parse(&read), Ok(Message::Read { id, object, range: 8192..12288 }));
        assert_eq!(parse(&message(3, 1, 2, &[])), Ok(Message::Close { object }));
    }

    #[test]
    fn damaged_messages_are_errors_and_an_open_still_has_its_file() {
        let mut bytes = message(7, 0, 9, &open_payload(b"erofs,demo\0", b"demo", 5));
        bytes[HEADER_BYTES..HEADER_BYTES + 4].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(matches!(parse(&bytes), Err(Error::Malformed(_))));
        assert_eq!(open_fd(&bytes), Some((MessageId(7), 5)));
        let empty_read = message(1, 2, 2, &[0; 16]);
        assert!(parse(&empty_read).is_err());
        let wide_read = message(1, 2, 2, &[0xff; 16]);
        assert!(parse(&wide_read).is_err());
        assert!(parse(&message(1, 9, 2, &[])).is_err());
    }

    #[test]
    fn answers_are_the_kernels_text() {
        let mut text = [0; 64];
        let size = copen(MessageId(3), Ok(4096), &mut text);
        assert_eq!(&text[..size], b"copen 3,4096");
        let size = copen(MessageId(u32::MAX), Err(2), &mut text);
        assert_eq!(&text[..size], b"copen 4294967295,-2");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse(&bytes);
            let _ = open_fd(&bytes);
        }
    }
}
