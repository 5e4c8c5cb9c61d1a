//! Tars that lie. What honest ones mean is in tests/layers.rs, against other tools.

use super::tar::{Archive, FileShape, Member, MemberKind};
use crate::config::{TAR_EXTENSION_MAX_BYTES, TAR_EXTENSIONS_MAX};
use crate::error::{Error, Result};
use std::io::Read;

/// A header with a right checksum; `size` and `kind` as given.
fn header(path: &str, kind: u8, size: u64) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_path(path).unwrap();
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_mode(0o644);
    header.set_size(size);
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let mut body = String::new();
    for (key, value) in records {
        let rest = format!(" {key}={value}\n");
        let mut length = rest.len() + 1;
        while length != rest.len() + length.to_string().len() {
            length = rest.len() + length.to_string().len();
        }
        body.push_str(&format!("{length}{rest}"));
    }
    [header("pax", b'x', body.len() as u64), padded(body.as_bytes())].concat()
}

/// Reads all members with their data.
fn read(tar: &[u8]) -> Result<Vec<Member>> {
    let mut archive = Archive::new(tar);
    let mut members = Vec::new();
    while let Some(member) = archive.next()? {
        let mut data = Vec::new();
        archive.read_to_end(&mut data).unwrap();
        members.push(member);
    }
    Ok(members)
}

#[test]
fn lies_are_refused_with_their_reason() {
    let long = TAR_EXTENSION_MAX_BYTES + 1;
    let sparse = |map: &str, size: &str, stored: u64| {
        let records = [("GNU.sparse.map", map), ("GNU.sparse.size", size)];
        [pax(&records), header("f", b'0', stored), vec![0; 1024]].concat()
    };
    let mut negative = header("f", b'0', 0);
    negative[124..136].copy_from_slice(&[0xff; 12]);
    let sum: u32 = negative.iter().enumerate().fold(0, |sum, (at, &byte)| {
        sum + u32::from(if (148..156).contains(&at) { b' ' } else { byte })
    });
    negative[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let cases = [
        (header("f", b'0', 5), "cut short"),
        (header("f", b'0', 1 << 62), "cut short"),
        (header("f", b'0', 0)[..300].to_vec(), "cut short"),
        (negative, "a length of -1"),
        (header("f", b'M', 0), "a member of type 'M'"),
        (header("x", b'x', long), "an extension header of"),
        (header("x", b'L', long), "an extension header of"),
        (header("x", b'x', 100), "cut short"),
        (pax(&[("a", "b")]).repeat(TAR_EXTENSIONS_MAX), "more than 16 extension headers"),
        ([pax(&[("uid", "4294967296")]), header("f", b'0', 0)].concat(), "owner or group"),
        ([pax(&[("gid", "-1")]), header("f", b'0', 0)].concat(), "owner or group"),
        ([pax(&[("size", "x")]), header("f", b'0', 0)].concat(), "no number"),
        ([vec![0; 512], header("f", b'0', 0)].concat(), "a block of zeros between"),
        (sparse("0,5,3,5", "20", 10), "overlap"),
        (sparse("0,5,18,5", "20", 10), "overlap"),
        (sparse("9223372036854775807,9223372036854775807", "1", 0), "overlap"),
        (sparse("0,5", "20", 6), "a sparse map of 5 bytes with 6"),
        (sparse("0,5,7", "20", 5), "an offset without a length"),
        ([pax(&[("GNU.sparse.map", "0,5")]), header("f", b'0', 5)].concat(), "without its size"),
        (vec![b'x'; 1024], "checksum"),
    ];
    for (tar, why) in cases {
        let error = read(&tar).expect_err(why);
        let known = matches!(error, Error::Malformed(_) | Error::Unsupported(_));
        assert!(known && error.to_string().contains(why), "{why:?}: {error:?}");
    }
}

#[test]
fn map_in_front_of_the_data_is_read_and_checked() {
    let records = [
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", "real"),
        ("GNU.sparse.realsize", "5000"),
    ];
    let with_map = |map: &str, stored: u64| {
        [pax(&records), header("f", b'0', stored), padded(map.as_bytes()), padded(b"abcd")].concat()
    };
    let members = read(&with_map("2\n100\n4\n5000\n0\n", 516)).unwrap();
    let MemberKind::File(shape) = &members[0].kind else { panic!("a file") };
    assert_eq!(*shape, FileShape { size: 5000, segments: Some(vec![(100, 4)]) });
    assert_eq!(members[0].path, b"real");
    for map in ["9999999999\n1\n1\n", "1\n4999\n4\n", "1\n1\n", "x\n", "1\n"] {
        assert!(read(&with_map(map, 516)).is_err(), "{map:?}");
    }
    let digits = "1".repeat(30);
    assert!(read(&with_map(&digits, 516)).is_err());
}

#[test]
fn archives_may_end_without_zeros_but_not_within_a_member() {
    let whole = [header("f", b'0', 3), padded(b"abc")].concat();
    assert_eq!(read(&whole).unwrap().len(), 1);
    assert_eq!(read(&[]).unwrap().len(), 0);
    for end in 1..whole.len() {
        assert!(read(&whole[..end]).is_err(), "{end}");
    }
}

#[test]
fn what_says_nothing_about_files_is_passed_over() {
    let global = [header("g", b'g', 10), padded(b"10 path=x\n")].concat();
    let label = header("label", b'V', 0);
    let tar = [global, label, header("a", b'0', 0), header("old/", b'0', 0)].concat();
    let members = read(&tar).unwrap();
    assert_eq!(members.len(), 2);
    assert_eq!(members[0].path, b"a");
    assert!(matches!(members[1].kind, MemberKind::Directory));
}
