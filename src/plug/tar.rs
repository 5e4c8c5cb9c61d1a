//! The tar format: one member's head, from and to its blocks.
//!
//! Pure. Reads POSIX (ustar, pax), GNU and old heads the way Go's archive/tar does, because Docker
//! takes a layer apart with that: both must see the same members. Writes ustar heads, with a pax
//! extension in front when a value does not fit.

use crate::error::{Error, Result};

/// Everything in a tar is a multiple of this.
pub const BLOCK_BYTES: usize = 512;

/// The pax key prefix of an extended attribute.
pub const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file with `size` bytes of content.
    File,
    /// Another name of a member that came before; `link` is its path.
    HardLink,
    /// A symbolic link to `link`.
    Symlink,
    /// A character device.
    Character,
    /// A block device.
    Block,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// One member without its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// As it stands in the archive: not yet normalised, not to be trusted.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// The target of a link.
    pub link: Vec<u8>,
    /// Permission bits, set-id and sticky bits included.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification: seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Bytes of content, holes included.
    pub size: u64,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes: whole names and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What one block says, before extensions are applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The type flag as stored.
    pub flag: u8,
    /// The member; its kind is `File` where the flag is none of a member's.
    pub member: Member,
}

/// Reads a head block; None for a block of zeros, which ends an archive.
pub fn parse_head(block: &[u8; BLOCK_BYTES]) -> Result<Option<Head>> {
    if block.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    check_sum(block)?;
    let format = &block[257..265];
    let is_ustar = &format[..6] == b"ustar\0";
    let is_gnu = format == b"ustar  \0";
    let mut path = text(&block[..100]).to_vec();
    if is_ustar {
        // The archiver star keeps times in the last bytes of the prefix and signs with its name.
        let width = if &block[508..512] == b"tar\0" { 131 } else { 155 };
        let prefix = text(&block[345..345 + width]);
        if !prefix.is_empty() {
            path = [prefix, b"/", &path].concat();
        }
    }
    let flag = block[156];
    let kind = match flag {
        b'1' => Kind::HardLink,
        b'2' => Kind::Symlink,
        b'3' => Kind::Character,
        b'4' => Kind::Block,
        b'5' | b'D' => Kind::Directory,
        b'6' => Kind::Fifo,
        // Before there were flags, a slash at the end made a directory.
        0 if path.ends_with(b"/") => Kind::Directory,
        _ => Kind::File,
    };
    let device = match is_ustar || is_gnu {
        true => (narrow(&block[329..337], "device")?, narrow(&block[337..345], "device")?),
        false => (0, 0),
    };
    let member = Member {
        kind,
        link: text(&block[157..257]).to_vec(),
        mode: narrow(&block[100..108], "mode")? & 0o7777,
        uid: narrow(&block[108..116], "owner")?,
        gid: narrow(&block[116..124], "group")?,
        mtime: (number(&block[136..148], "time")?, 0),
        size: size(&block[124..136])?,
        device,
        xattrs: Vec::new(),
        path,
    };
    Ok(Some(Head { flag, member }))
}

/// The records of a pax extension, `LENGTH KEY=VALUE\n` each, in order.
pub fn parse_records(mut bytes: &[u8]) -> Result<Vec<(&[u8], &[u8])>> {
    let broken = || Error::Malformed("a layer has a pax extension with a broken record".to_owned());
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let space = bytes.iter().take(20).position(|&byte| byte == b' ').ok_or_else(broken)?;
        let length = decimal(&bytes[..space]).ok_or_else(broken)? as usize;
        let record = bytes.get(space + 1..length).ok_or_else(broken)?;
        let record = record.strip_suffix(b"\n").ok_or_else(broken)?;
        let equals = record.iter().position(|&byte| byte == b'=').ok_or_else(broken)?;
        records.push((&record[..equals], &record[equals + 1..]));
        bytes = &bytes[length..];
    }
    Ok(records)
}

/// Digits and nothing else.
pub fn decimal(digits: &[u8]) -> Option<u64> {
    let is_plain = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(digits).ok().filter(|_| is_plain)?.parse().ok()
}

/// Seconds with a fraction, perhaps negative: `-1.5` is one and a half seconds before 1970.
pub fn parse_time(value: &[u8]) -> Result<(i64, u32)> {
    let broken = || Error::Malformed("a layer has a pax extension with a broken time".to_owned());
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let mut halves = value.splitn(2, |&byte| byte == b'.');
    let whole = halves.next().and_then(decimal).ok_or_else(broken)?;
    let whole = i64::try_from(whole).map_err(|_| broken())?;
    let mut nanoseconds = 0;
    let fraction = halves.next().unwrap_or(b"");
    for place in 0..9 {
        let digit = fraction.get(place).copied().unwrap_or(b'0');
        if !digit.is_ascii_digit() {
            return Err(broken());
        }
        nanoseconds = nanoseconds * 10 + u32::from(digit - b'0');
    }
    Ok(match (negative, nanoseconds) {
        (false, _) => (whole, nanoseconds),
        (true, 0) => (-whole, 0),
        (true, _) => (-whole - 1, 1_000_000_000 - nanoseconds),
    })
}

/// The blocks in front of a member's content. Whole seconds are written, as Docker does: fractions
/// would cost a pax extension for every file.
pub fn encode_head(member: &Member) -> Vec<u8> {
    let mut records = Vec::new();
    let mut record = |key: &[u8], value: &[u8]| records.extend(encode_record(key, value));
    if member.path.len() > 100 {
        record(b"path", &member.path);
    }
    if member.link.len() > 100 {
        record(b"linkpath", &member.link);
    }
    for (key, value, bits) in [
        ("size", member.size as i64, 33),
        ("uid", i64::from(member.uid), 21),
        ("gid", i64::from(member.gid), 21),
        ("mtime", member.mtime.0, 33),
    ] {
        if !(0..1 << bits).contains(&value) {
            record(key.as_bytes(), value.to_string().as_bytes());
        }
    }
    for (name, value) in &member.xattrs {
        record(&[XATTR_PREFIX, name].concat(), value);
    }
    let mut blocks = Vec::new();
    if !records.is_empty() {
        let extension = Member {
            path: b"PaxHeaders/member".to_vec(),
            kind: Kind::File,
            link: Vec::new(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            size: records.len() as u64,
            device: (0, 0),
            xattrs: Vec::new(),
        };
        blocks.extend(encode_block(&extension, b'x'));
        records.resize(records.len().next_multiple_of(BLOCK_BYTES), 0);
        blocks.append(&mut records);
    }
    blocks.extend(encode_block(member, flag_of(member.kind)));
    blocks
}

fn flag_of(kind: Kind) -> u8 {
    match kind {
        Kind::File => b'0',
        Kind::HardLink => b'1',
        Kind::Symlink => b'2',
        Kind::Character => b'3',
        Kind::Block => b'4',
        Kind::Directory => b'5',
        Kind::Fifo => b'6',
    }
}

/// The length counts its own digits: 9 bytes of rest are `10 ...`, so try until it holds.
fn encode_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

fn encode_block(member: &Member, flag: u8) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    let mut put = |at: usize, width: usize, bytes: &[u8]| {
        let count = bytes.len().min(width);
        block[at..at + count].copy_from_slice(&bytes[..count]);
    };
    // What does not fit stands in the pax extension; the block's own field is only a stand-in.
    let octal = |value: i64, digits: u32| {
        let fits = (0..1 << (3 * digits)).contains(&value);
        format!("{:0width$o}\0", if fits { value } else { 0 }, width = digits as usize)
    };
    put(0, 100, &member.path);
    put(100, 8, octal(member.mode.into(), 7).as_bytes());
    put(108, 8, octal(member.uid.into(), 7).as_bytes());
    put(116, 8, octal(member.gid.into(), 7).as_bytes());
    put(124, 12, octal(member.size as i64, 11).as_bytes());
    put(136, 12, octal(member.mtime.0, 11).as_bytes());
    put(148, 8, b"        ");
    put(156, 1, &[flag]);
    put(157, 100, &member.link);
    put(257, 8, b"ustar\x0000");
    put(329, 8, octal(member.device.0.into(), 7).as_bytes());
    put(337, 8, octal(member.device.1.into(), 7).as_bytes());
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// Old archivers added signed bytes; both sums are accepted.
fn check_sum(block: &[u8; BLOCK_BYTES]) -> Result<()> {
    let with_spaces =
        |index: usize, byte: u8| if (148..156).contains(&index) { b' ' } else { byte };
    let bytes = || block.iter().enumerate().map(|(index, &byte)| with_spaces(index, byte));
    let unsigned: i64 = bytes().map(i64::from).sum();
    let signed: i64 = bytes().map(|byte| i64::from(byte as i8)).sum();
    let stored = number(&block[148..156], "checksum")?;
    match stored == unsigned || stored == signed {
        true => Ok(()),
        false => Err(Error::Malformed("a layer is no tar: a head's checksum is wrong".to_owned())),
    }
}

/// A field up to its NUL.
fn text(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|&byte| byte == 0).unwrap_or(field.len())]
}

/// A size, as heads and the maps of sparse files store it.
pub fn size(field: &[u8]) -> Result<u64> {
    u64::try_from(number(field, "size")?)
        .map_err(|_| Error::Malformed("a layer has a member with a negative size".to_owned()))
}

fn narrow(field: &[u8], what: &str) -> Result<u32> {
    let value = number(field, what)?;
    u32::try_from(value)
        .map_err(|_| Error::Malformed(format!("a layer has a member with the {what} {value}")))
}

/// Octal digits between spaces and NULs; or, with the top bit set, big-endian two's complement.
fn number(field: &[u8], what: &str) -> Result<i64> {
    let broken = || Error::Malformed(format!("a layer is no tar: the {what} of a head is broken"));
    if field[0] & 0x80 != 0 {
        // Bit 6 is the sign of what follows the marker.
        let sign = if field[0] & 0x40 != 0 { -1 } else { 0 };
        let first = i64::from(field[0] & 0x7f) | if sign < 0 { !0x7f } else { 0 };
        return field[1..].iter().try_fold(first, |value, &byte| {
            value.checked_mul(256).map(|value| value | i64::from(byte)).ok_or_else(broken)
        });
    }
    let digits = field.iter().copied().skip_while(|byte| matches!(byte, b' ' | 0));
    let mut value: i64 = 0;
    for byte in digits {
        match byte {
            b'0'..=b'7' => {
                value = value.checked_mul(8).ok_or_else(broken)? | i64::from(byte - b'0');
            }
            b' ' | 0 => break,
            _ => return Err(broken()),
        }
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(path: &str) -> Member {
        Member {
            path: path.as_bytes().to_vec(),
            kind: Kind::File,
            link: Vec::new(),
            mode: 0o4755,
            uid: 7,
            gid: 8,
            mtime: (1_700_000_000, 0),
            size: 3,
            device: (0, 0),
            xattrs: Vec::new(),
        }
    }

    fn block(bytes: &[u8]) -> [u8; BLOCK_BYTES] {
        bytes.try_into().expect("one block")
    }

    #[test]
    fn a_head_survives_both_ways() {
        for kind in [Kind::Directory, Kind::Symlink, Kind::HardLink, Kind::Block, Kind::Fifo] {
            let written = Member { kind, link: b"to".to_vec(), device: (8, 1), ..member("a/b") };
            let head = parse_head(&block(&encode_head(&written))).expect("parses").expect("a head");
            assert_eq!(head.member, written);
        }
    }

    #[test]
    fn what_does_not_fit_a_head_goes_into_records() {
        let mut written = member(&"long/".repeat(40));
        written.uid = u32::MAX;
        written.size = 1 << 40;
        written.mtime = (-5, 0);
        written.xattrs = vec![(b"user.a".to_vec(), b"b=\n\0".to_vec())];
        let blocks = encode_head(&written);
        let extension = parse_head(&block(&blocks[..512])).expect("parses").expect("a head");
        assert_eq!(extension.flag, b'x');
        let records = parse_records(&blocks[512..512 + extension.member.size as usize]);
        let records = records.expect("records");
        let value = |key: &[u8]| records.iter().find(|(k, _)| *k == key).expect("there").1;
        assert_eq!(value(b"path"), written.path);
        assert_eq!(value(b"uid"), b"4294967295");
        assert_eq!(value(b"size"), (1u64 << 40).to_string().as_bytes());
        assert_eq!(value(b"mtime"), b"-5");
        assert_eq!(value(b"SCHILY.xattr.user.a"), b"b=\n\0");
    }

    #[test]
    fn a_record_counts_its_own_digits() {
        for length in [1, 5, 90, 91, 92, 93, 94, 990] {
            let record = encode_record(b"k", &vec![b'v'; length]);
            assert_eq!(parse_records(&record).expect("one record").len(), 1, "{length}");
        }
    }

    #[test]
    fn broken_records_are_refused() {
        for text in ["1 a=b\n", "x a=b\n", "6 a=b", "7 a=b\n", "5 ab\n", " a=b\n", "99999 a=b\n"] {
            assert!(parse_records(text.as_bytes()).is_err(), "{text:?}");
        }
    }

    #[test]
    fn numbers_may_be_octal_or_binary() {
        assert_eq!(number(b" 644 \0", "x"), Ok(0o644));
        assert_eq!(number(b"\0\0\0\0", "x"), Ok(0));
        assert_eq!(number(&[0x80, 0, 1, 0], "x"), Ok(256));
        assert_eq!(number(&[0xff, 0xff, 0xff, 0xfe], "x"), Ok(-2));
        assert!(number(b"9999", "x").is_err());
        assert!(number(&[0x80, 255, 255, 255, 255, 255, 255, 255, 255, 255], "x").is_err());
    }

    #[test]
    fn times_may_have_fractions_and_signs() {
        assert_eq!(parse_time(b"12.5"), Ok((12, 500_000_000)));
        assert_eq!(parse_time(b"-1.5"), Ok((-2, 500_000_000)));
        assert_eq!(parse_time(b"-3"), Ok((-3, 0)));
        assert_eq!(parse_time(b"1.1234567899"), Ok((1, 123_456_789)));
        for text in ["", "-", "1.x", "1e5", " 1"] {
            assert!(parse_time(text.as_bytes()).is_err(), "{text:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_block_is_read_or_refused(bytes in proptest::collection::vec(0u8.., 512)) {
            let _ = parse_head(&block(&bytes));
        }

        #[test]
        fn any_field_of_a_sound_block_is_read_or_refused(at in 0usize..512, with in 0u8..) {
            let mut bytes = block(&encode_head(&member("a")));
            bytes[at] = with;
            bytes[148..156].fill(b' ');
            let sum: u32 = bytes.iter().map(|&byte| u32::from(byte)).sum();
            bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            let _ = parse_head(&bytes);
        }

        #[test]
        fn any_text_is_records_or_refused(bytes in proptest::collection::vec(0u8.., 0..60)) {
            let _ = parse_records(&bytes);
            let _ = parse_time(&bytes);
        }
    }
}
