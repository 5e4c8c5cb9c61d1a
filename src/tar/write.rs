//! A member's blocks: a ustar header, with a pax extension in front when a value does not fit.
//!
//! Pure.

use super::{BLOCK_BYTES, Kind, Member, XATTR_PREFIX};

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
            mode: 0o644,
            size: records.len() as u64,
            ..Member::new(b"PaxHeaders/member".to_vec(), Kind::File)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tar::Archive;

    fn member(path: &str) -> Member {
        Member {
            mode: 0o4755,
            uid: 7,
            gid: 8,
            mtime: (1_700_000_000, 0),
            ..Member::new(path.as_bytes().to_vec(), Kind::File)
        }
    }

    fn read(blocks: &[u8]) -> Member {
        Archive::new(blocks).next_member().expect("parses").expect("a member")
    }

    #[test]
    fn a_header_survives_both_ways() {
        for kind in [Kind::Directory, Kind::Symlink, Kind::HardLink, Kind::Block, Kind::Fifo] {
            let device = if kind == Kind::Block { (8, 1) } else { (0, 0) };
            let written = Member { kind, link: b"to".to_vec(), device, ..member("a/b") };
            assert_eq!(read(&encode_head(&written)), written);
        }
    }

    #[test]
    fn what_does_not_fit_a_header_goes_into_records() {
        let mut written = member(&"long/".repeat(40));
        written.link = "far/".repeat(40).into_bytes();
        written.uid = u32::MAX;
        written.gid = 1 << 21;
        written.size = 1 << 40;
        written.mtime = (-5, 0);
        written.xattrs = vec![(b"user.a".to_vec(), b"b=\n\0".to_vec())];
        assert_eq!(read(&encode_head(&written)), written);
    }

    #[test]
    fn a_record_counts_its_own_digits() {
        for length in [1, 5, 90, 91, 92, 93, 94, 990] {
            let xattrs = vec![(b"user.k".to_vec(), vec![b'v'; length])];
            let written = Member { xattrs, ..member("a") };
            assert_eq!(read(&encode_head(&written)), written, "{length}");
        }
    }
}
