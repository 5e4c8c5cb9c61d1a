//! Tars of every dialect, whole, cut and damaged.

use super::tar::{BLOCK_BYTES, Kind, Member, encode_head};
use super::tar_read::TarReader;
use crate::error::{Error, Result};
use std::process::Command;

/// Every member with its content, holes as zeros.
fn read(tar: &[u8]) -> Result<Vec<(Member, Vec<u8>)>> {
    let mut reader = TarReader::new(tar);
    let mut members = Vec::new();
    while let Some(member) = reader.member()? {
        let mut content = vec![0; member.size.min(1 << 24) as usize];
        if member.kind == Kind::File {
            reader.copy(|offset, bytes| {
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

#[test]
fn promises_are_not_believed() {
    let mut head = Member {
        path: b"a".to_vec(),
        kind: Kind::File,
        link: Vec::new(),
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        size: u64::MAX >> 2,
        device: (0, 0),
        xattrs: Vec::new(),
    };
    assert!(read(&encode_head(&head)).is_err(), "no content");
    head.size = 0;
    let mut long = encode_head(&head);
    long[156] = b'L';
    long[124..136].copy_from_slice(b"77777777777\0");
    long[148..156].fill(b' ');
    let sum: u32 = long.iter().map(|&byte| u32::from(byte)).sum();
    long[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert!(matches!(read(&long), Err(Error::Unsupported(_))), "a name of 8 GiB");
    assert!(read(&[b'x'; 2 * BLOCK_BYTES]).is_err(), "no tar");
    assert_eq!(read(b""), Ok(Vec::new()));
}

proptest::proptest! {
    #[test]
    fn a_damaged_archive_is_no_panic(at in 0usize..4096, with in 0u8.., cut in 0usize..8192) {
        let records = b"21 GNU.sparse.major=1\n25 GNU.sparse.realsize=9\n";
        let mut head = encode_head(&Member {
            path: vec![b'p'; 150], kind: Kind::File, link: vec![b'l'; 150], mode: 0, uid: 0, gid: 0,
            mtime: (-1, 0), size: 600, device: (0, 0),
            xattrs: vec![(b"user.x".to_vec(), records.to_vec())],
        });
        head.extend([b'1'; 1024]);
        let at = at % head.len();
        head[at] = with;
        head.truncate(cut);
        let _ = read(&head);
    }
}
