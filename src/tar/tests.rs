//! Tars that lie. What honest ones mean is in tests/layers.rs, against other tools.

use super::write::encode_head;
use super::{Archive, BLOCK_BYTES, Kind, Member};
use crate::config::{TAR_EXTENSION_MAX_BYTES, TAR_EXTENSIONS_MAX};
use crate::error::{Error, Result};
use std::process::Command;

/// A header with a right checksum; `size` and `kind` as given.
fn header(path: &str, kind: u8, size: u64) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_path(path).unwrap();
    header.as_mut_bytes()[156] = kind;
    header.set_mode(0o644);
    header.set_size(size);
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn file(path: &str) -> Member {
    Member::new(path.as_bytes().to_vec(), Kind::File)
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

/// Every member with its content, holes as zeros.
fn read(tar: &[u8]) -> Result<Vec<(Member, Vec<u8>)>> {
    let mut archive = Archive::new(tar);
    let mut members = Vec::new();
    while let Some(member) = archive.next_member()? {
        let mut content = vec![0; member.size.min(1 << 24) as usize];
        if member.kind == Kind::File {
            archive.copy(&member, |offset, bytes| {
                content[offset as usize..][..bytes.len()].copy_from_slice(bytes);
                Ok(())
            })?;
        }
        members.push((member, content));
    }
    Ok(members)
}

/// What GNU tar makes of `script`'s doing in an empty directory.
fn gnu_tar(script: &str, options: &[&str]) -> Vec<u8> {
    let directory = tempfile::tempdir().expect("a directory");
    let shell = Command::new("sh").args(["-ec", script]).current_dir(directory.path()).status();
    assert!(shell.expect("a shell").success());
    let mut tar = Command::new("tar");
    let output = tar.args(options).args(["-cf", "-", "."]).current_dir(directory.path()).output();
    let output = output.expect("tar runs");
    assert!(output.status.success());
    output.stdout
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
        (header("f", b'0', 1 << 40), "cut short"),
        (encode_head(&Member { size: u64::MAX >> 1, ..file("f") }), "a length of"),
        (header("f", b'0', 0)[..300].to_vec(), "cut short"),
        (negative, "a length of -1"),
        (header("f", b'M', 0), "the unknown type 'M'"),
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
    let (member, content) = &members[0];
    assert_eq!((member.size, &member.segments), (5000, &Some(vec![(100, 4)])));
    assert_eq!((&member.path[..], &content[99..105]), (&b"real"[..], &b"\0abcd\0"[..]));
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
    let tar = [global, label, header("a", b'0', 0), header("old/", b'\0', 0)].concat();
    let members = read(&tar).unwrap();
    assert_eq!(members.len(), 2);
    assert_eq!(members[0].0.path, b"a");
    assert_eq!(members[1].0.kind, Kind::Directory);
}

#[test]
fn long_names_and_links_come_whole_in_every_dialect() {
    let long = "d".repeat(120);
    let script = format!("d={long}/{long}; mkdir -p $d; echo x >$d/f; ln -s $d/f l; ln $d/f h");
    for format in ["--format=gnu", "--format=pax"] {
        let members = read(&gnu_tar(&script, &[format, "--sort=name"])).expect("reads");
        let paths: Vec<_> = members.iter().map(|(m, _)| String::from_utf8_lossy(&m.path)).collect();
        assert!(paths.contains(&format!("./{long}/{long}/f").into()), "{paths:?}");
        let link = members.iter().find(|(m, _)| m.kind == Kind::Symlink).expect("a link");
        assert_eq!(link.0.link, format!("{long}/{long}/f").as_bytes());
        assert!(members.iter().any(|(m, _)| m.kind == Kind::HardLink && m.link.len() > 200));
    }
}

#[test]
fn sparse_files_keep_their_holes_in_every_dialect() {
    // 60 runs: more than a head, a block and a map's first block hold.
    let script = "for i in $(seq 60); do
            printf $i | dd of=s bs=1 seek=$((i * 65536)) conv=notrunc 2>/dev/null
        done; truncate -s 5000000 s; echo after >t";
    for options in [
        &["--format=gnu", "-S"][..],
        &["--format=pax", "-S", "--sparse-version=0.0"],
        &["--format=pax", "-S", "--sparse-version=0.1"],
        &["--format=pax", "-S", "--sparse-version=1.0"],
    ] {
        let members = read(&gnu_tar(script, options)).expect("reads");
        let of =
            |name: &str| members.iter().find(|(m, _)| m.path == name.as_bytes()).expect("a member");
        let (member, content) = of("./s");
        assert_eq!((member.size, content.len()), (5_000_000, 5_000_000), "{options:?}");
        for i in 1..=60 {
            let text = i.to_string();
            assert_eq!(&content[i * 65536..][..text.len()], text.as_bytes(), "{options:?}");
        }
        assert_eq!(content.iter().filter(|&&byte| byte != 0).count(), 9 + 2 * 51);
        assert_eq!(of("./t").1, b"after\n");
    }
}

#[test]
fn an_archive_cut_anywhere_is_an_error_or_shorter() {
    let whole = gnu_tar("echo one >a; mkdir b; echo two >b/c", &["--format=pax"]);
    let count = read(&whole).expect("reads").len();
    for end in 0..whole.len().min(6 * BLOCK_BYTES) {
        match read(&whole[..end]) {
            Ok(members) => {
                assert!(end.is_multiple_of(BLOCK_BYTES) && members.len() <= count);
            }
            Err(Error::Malformed(_)) => {}
            Err(other) => panic!("{other}"),
        }
    }
}

proptest::proptest! {
    #[test]
    fn a_damaged_archive_is_no_panic(at in 0usize..4096, with in 0u8.., cut in 0usize..8192) {
        let records = b"21 GNU.sparse.major=1\n25 GNU.sparse.realsize=9\n";
        let mut head = encode_head(&Member {
            link: vec![b'l'; 150], mtime: (-1, 0), size: 600,
            xattrs: vec![(b"user.x".to_vec(), records.to_vec())],
            ..Member::new(vec![b'p'; 150], Kind::File)
        });
        head.extend([b'1'; 1024]);
        let at = at % head.len();
        head[at] = with;
        head.truncate(cut);
        let _ = read(&head);
    }
}
