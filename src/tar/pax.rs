//! The records of a PAX extended header: `length key=value`, one after the other.
//!
//! Pure. Keeps what changes an entry; ignores keys that do not matter for an image, as the
//! standard wants. Later records win, and an empty value takes an earlier one back.

use super::{Segment, XATTR_PREFIX};
use crate::config::TAR_SEGMENTS_MAX;
use crate::error::Result;
use base64::Engine as _;
use std::collections::BTreeMap;

/// What extended headers say of the next entry.
#[derive(Clone, Debug, Default)]
pub(super) struct Extension {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<i64>,
    pub(super) gid: Option<i64>,
    /// Seconds and nanoseconds.
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) sparse: Sparse,
}

/// What extended headers say of a sparse file, in one of the three versions.
#[derive(Clone, Debug, Default)]
pub(super) struct Sparse {
    /// The file's size when unpacked.
    pub(super) size: Option<u64>,
    /// The file's real path.
    pub(super) path: Option<Vec<u8>>,
    /// Version 1.0: the map stands in front of the data.
    pub(super) map_in_data: bool,
    /// Versions 0.0 and 0.1: the map.
    pub(super) segments: Option<Vec<Segment>>,
    /// The offset of a version 0.0 segment whose length comes next.
    pending_offset: Option<u64>,
}

impl Extension {
    /// Takes in all records of one extended header.
    pub(super) fn read(&mut self, mut records: &[u8]) -> Result<()> {
        // The end may be padded.
        while records.first().is_some_and(|&byte| byte != 0) {
            let (record, rest) = split_record(records)?;
            let equals = record.iter().position(|&byte| byte == b'=');
            let equals = equals.ok_or_else(|| malformed!("an extended header without '='"))?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            let shown = || String::from_utf8_lossy(key).into_owned();
            self.take(key, value).map_err(|error| error.context(format!("{:?}", shown())))?;
            records = rest;
        }
        Ok(())
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let given = (!value.is_empty()).then_some(value);
        match key {
            b"path" => self.path = given.map(<[u8]>::to_vec),
            b"linkpath" => self.link = given.map(<[u8]>::to_vec),
            b"size" => self.size = given.map(decimal).transpose()?,
            b"uid" => self.uid = given.map(signed).transpose()?,
            b"gid" => self.gid = given.map(signed).transpose()?,
            b"mtime" => self.mtime = given.map(timestamp).transpose()?,
            // GNU tar's name for the label; its value ends in a NUL as the kernel's does.
            b"RHT.security.selinux" => self.set_xattr(b"security.selinux".to_vec(), value),
            _ if key.starts_with(b"GNU.sparse.") => return self.take_sparse(&key[11..], value),
            _ => {
                if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
                    self.set_xattr(name.to_vec(), value);
                } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                    self.take_libarchive(name, value)?;
                }
            }
        }
        Ok(())
    }

    fn set_xattr(&mut self, name: Vec<u8>, value: &[u8]) {
        self.xattrs.insert(name, value.to_vec());
    }

    /// libarchive writes both forms; where they differ, SCHILY's cannot hold the value.
    fn take_libarchive(&mut self, name: &[u8], value: &[u8]) -> Result<()> {
        let engine = base64::engine::GeneralPurpose::new(
            &base64::alphabet::STANDARD,
            base64::engine::general_purpose::GeneralPurposeConfig::new()
                .with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent),
        );
        let value = engine.decode(value).map_err(|error| malformed!("no base64: {error}"))?;
        self.set_xattr(percent_decoded(name), &value);
        Ok(())
    }

    fn take_sparse(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let sparse = &mut self.sparse;
        match key {
            b"major" => sparse.map_in_data = decimal(value)? == 1,
            b"name" => sparse.path = Some(value.to_vec()),
            b"size" | b"realsize" => sparse.size = Some(decimal(value)?),
            b"map" => sparse.segments = Some(pairs(value)?),
            b"offset" => sparse.pending_offset = Some(decimal(value)?),
            b"numbytes" => {
                let offset = sparse.pending_offset.take();
                let offset = offset.ok_or_else(|| malformed!("a length without an offset"))?;
                let segments = sparse.segments.get_or_insert_default();
                if segments.len() >= TAR_SEGMENTS_MAX {
                    return Err(too_many());
                }
                segments.push((offset, decimal(value)?));
            }
            _ => {}
        }
        Ok(())
    }
}

/// The error for a sparse file with too many segments.
pub(super) fn too_many() -> crate::error::Error {
    unsupported!("a sparse file of more than {TAR_SEGMENTS_MAX} segments")
}

/// The first record, without its length, and what follows.
fn split_record(records: &[u8]) -> Result<(&[u8], &[u8])> {
    let broken = || malformed!("an extended header whose lengths are wrong");
    let space = records.iter().take(20).position(|&byte| byte == b' ').ok_or_else(broken)?;
    let length = usize::try_from(decimal(&records[..space])?).map_err(|_| broken())?;
    let record = records.get(space + 1..length).ok_or_else(broken)?;
    let record = record.strip_suffix(b"\n").ok_or_else(broken)?;
    Ok((record, &records[length..]))
}

/// Digits only, below 2^63.
pub(super) fn decimal(text: &[u8]) -> Result<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    let value = std::str::from_utf8(text).ok().filter(|_| digits);
    let value = value.and_then(|text| text.parse::<i64>().ok());
    value
        .map(i64::cast_unsigned)
        .ok_or_else(|| malformed!("{:?} is no number", String::from_utf8_lossy(text)))
}

fn signed(text: &[u8]) -> Result<i64> {
    match text.strip_prefix(b"-") {
        Some(rest) => Ok(-decimal(rest)?.cast_signed()),
        None => Ok(decimal(text)?.cast_signed()),
    }
}

/// Seconds with a fraction of any length, perhaps negative; what is below a nanosecond is cut off.
fn timestamp(text: &[u8]) -> Result<(i64, u32)> {
    let mut parts = text.splitn(2, |&byte| byte == b'.');
    let (whole, fraction) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let negative = whole.starts_with(b"-");
    let seconds = signed(whole)?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(malformed!("{:?} is no time", String::from_utf8_lossy(text)));
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0, |value, digit| value * 10 + u32::from(digit - b'0'));
    Ok(match (negative, nanoseconds) {
        (true, 1..) => (seconds - 1, 1_000_000_000 - nanoseconds),
        _ => (seconds, nanoseconds),
    })
}

fn pairs(text: &[u8]) -> Result<Vec<Segment>> {
    let mut numbers = text.split(|&byte| byte == b',').filter(|part| !part.is_empty());
    let mut segments = Vec::new();
    while let Some(offset) = numbers.next() {
        let length = numbers.next().ok_or_else(|| malformed!("an offset without a length"))?;
        if segments.len() >= TAR_SEGMENTS_MAX {
            return Err(too_many());
        }
        segments.push((decimal(offset)?, decimal(length)?));
    }
    Ok(segments)
}

/// `%41` is `A`; what is no such sequence stays.
fn percent_decoded(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail.get(..2).and_then(|code| std::str::from_utf8(code).ok());
        let byte = code.and_then(|code| u8::from_str_radix(code, 16).ok());
        let (decoded, left) = match (first, byte) {
            (b'%', Some(byte)) => (byte, &tail[2..]),
            _ => (first, tail),
        };
        out.push(decoded);
        rest = left;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = [key.as_bytes(), b"=", value, b"\n"].concat();
        let mut length = body.len() + 2;
        while length.to_string().len() + 1 + body.len() != length {
            length = length.to_string().len() + 1 + body.len();
        }
        [length.to_string().as_bytes(), b" ", &body].concat()
    }

    fn read(records: &[Vec<u8>]) -> Result<Extension> {
        let mut extension = Extension::default();
        extension.read(&records.concat()).map(|()| extension)
    }

    #[test]
    fn times_have_nanoseconds_and_signs() {
        assert_eq!(timestamp(b"1700000000.123456789"), Ok((1_700_000_000, 123_456_789)));
        assert_eq!(timestamp(b"5"), Ok((5, 0)));
        assert_eq!(timestamp(b"5.1234567899"), Ok((5, 123_456_789)));
        assert_eq!(timestamp(b"-1.5"), Ok((-2, 500_000_000)));
        assert_eq!(timestamp(b"-0.25"), Ok((-1, 750_000_000)));
        assert_eq!(timestamp(b"-3"), Ok((-3, 0)));
        for text in [&b""[..], b"x", b"1.x", b"--1", b"1.-5"] {
            assert!(timestamp(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn later_records_win_and_empty_ones_take_back() {
        let records = [("path", "a"), ("path", "b"), ("linkpath", "c"), ("linkpath", "")];
        let records = records.map(|(key, value)| record(key, value.as_bytes()));
        let extension = read(&records).unwrap();
        assert_eq!((extension.path, extension.link), (Some(b"b".to_vec()), None));
    }

    #[test]
    fn attributes_of_both_archivers_are_read() {
        let value = [0, 1, 0xff, b'\n', b'='];
        let records = [
            record("SCHILY.xattr.user.a=b", b"x"),
            record("SCHILY.xattr.security.capability", &value),
            record("LIBARCHIVE.xattr.user.c%20d", b"AAH/"),
            record("RHT.security.selinux", b"label\0"),
        ];
        let xattrs = read(&records).unwrap().xattrs;
        assert_eq!(xattrs[&b"user.a"[..]], b"b=x");
        assert_eq!(xattrs[&b"security.capability"[..]], value);
        assert_eq!(xattrs[&b"user.c d"[..]], [0, 1, 0xff]);
        assert_eq!(xattrs[&b"security.selinux"[..]], b"label\0");
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        for text in ["9 a=b\n", "5 a=b\n", "6 a=b", "x a=b\n", "6 abc\n", "0 \n", "99999 a=b\n"] {
            assert!(Extension::default().read(text.as_bytes()).is_err(), "{text:?}");
        }
        assert!(read(&[record("size", b"-1")]).is_err());
        assert!(read(&[record("size", b"9223372036854775808")]).is_err());
        assert!(read(&[record("GNU.sparse.numbytes", b"1")]).is_err());
    }
}
