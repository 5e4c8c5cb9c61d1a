//! Trees a hostile builder would make, and what is said of them.

use super::Bootstrap;
use super::draft_tests::{CHUNK_SIZE, Draft, put};
use super::erofs::Tree;
use super::inode::FileKind;
use crate::error::{Error, Result};

/// Byte offsets in a draft's bootstrap: the root inode, its directory, the first file's inode.
const ROOT: usize = 8192 + 128 * 32;
const DIRECTORY: usize = ROOT + 64;
const FILE: usize = ROOT + 40 * 32;

/// The draft: a root with `c0000`, `c0001` and `c0002`, the second on one block between others.
fn draft() -> Draft {
    Draft::new(&[CHUNK_SIZE as usize, 4096, CHUNK_SIZE as usize])
}

fn with<T>(fields: &[(usize, &[u8])], act: impl Fn(Tree<'_>) -> Result<T>) -> Result<T> {
    let mut bytes = draft().write().0;
    for (at, field) in fields {
        put(&mut bytes, *at, field);
    }
    act(Bootstrap::parse(bytes).unwrap().tree())
}

/// The text of the error a walk ends in.
fn walk_error(fields: &[(usize, &[u8])]) -> String {
    let walk = |tree: Tree<'_>| tree.walk().try_for_each(|visit| visit.map(drop));
    with(fields, walk).unwrap_err().to_string()
}

/// Start of the names: behind the records of ".", ".." and three files.
const NAMES: usize = DIRECTORY + 5 * 12;

#[test]
fn untouched_draft_has_its_files() {
    let names = with(&[], |tree| {
        let entries = tree.read_dir(&tree.root()?)?;
        Ok(entries.iter().map(|entry| entry.name.to_vec()).collect::<Vec<_>>())
    });
    assert_eq!(names.unwrap(), [b"c0000", b"c0001", b"c0002"]);
    assert_eq!(with(&[], |tree| tree.lookup(b"/c0002")).unwrap().size, u64::from(CHUNK_SIZE));
    for path in [&b"absent"[..], b"c0000/inside", b".."] {
        assert!(matches!(with(&[], |tree| tree.lookup(path)), Err(Error::NotFound(_))));
    }
}

#[test]
fn directory_inside_itself_is_refused_not_followed() {
    let entry = DIRECTORY + 2 * 12;
    let error = walk_error(&[(entry, &128u64.to_le_bytes()), (entry + 10, &[2])]);
    assert!(error.contains("in two places"), "{error}");
}

#[test]
fn entry_and_inode_must_agree_on_the_type() {
    let error = walk_error(&[(DIRECTORY + 2 * 12 + 10, &[7])]);
    assert!(error.contains("says link"), "{error}");
}

#[test]
fn unsorted_repeated_and_illegal_names_are_refused() {
    let first = NAMES + 3;
    for (field, text) in [
        (&b"c0001"[..], "sorted"),
        (b"c0009", "sorted"),
        (b"c/000", "illegal"),
        (b"c\x00000", "illegal"),
    ] {
        let error = walk_error(&[(first, field)]);
        assert!(error.contains(text), "{error}");
    }
    let error = walk_error(&[(NAMES + 1, b".-")]);
    assert!(error.contains("lacks"), "{error}");
}

#[test]
fn records_and_data_outside_are_refused() {
    let fields: [(usize, &[u8]); 7] = [
        // Where names start, and where the second one does.
        (DIRECTORY + 8, &13u16.to_le_bytes()),
        (DIRECTORY + 8, &u16::MAX.to_le_bytes()),
        (DIRECTORY + 12 + 8, &0u16.to_le_bytes()),
        // The inode of a file; size, format and xattrs of the root.
        (DIRECTORY + 2 * 12, &u64::MAX.to_le_bytes()),
        (ROOT + 8, &(1u64 << 40).to_le_bytes()),
        (ROOT, &0xffffu16.to_le_bytes()),
        (ROOT + 2, &u16::MAX.to_le_bytes()),
    ];
    for field in fields {
        walk_error(&[field]);
    }
}

/// The first file made two chunks long, with this chunk format and second entry.
fn two_chunks(format: u32, second: (u16, u32)) -> Result<usize> {
    let entry = [second.0.to_le_bytes(), [1, 0]].concat();
    let fields: [(usize, &[u8]); 4] = [
        (FILE + 8, &(2 * u64::from(CHUNK_SIZE)).to_le_bytes()),
        (FILE + 16, &(0x20 | format).to_le_bytes()),
        (FILE + 72, &entry),
        (FILE + 76, &second.1.to_le_bytes()),
    ];
    with(&fields, |tree| {
        let file = tree.lookup(b"c0000")?;
        assert_eq!(file.kind, FileKind::File);
        Ok(tree.file_chunks(&file)?.collect::<Result<Vec<_>>>()?.len())
    })
}

#[test]
fn chunks_the_kernel_takes_for_one_must_be_adjacent() {
    // Chunks 0 and 2 lie apart, 0 and 1 together.
    let (own, double) = (4, 5);
    assert_eq!(two_chunks(own, (2, 17)).unwrap(), 2);
    assert_eq!(two_chunks(double, (1, 16)).unwrap(), 2);
    let error = two_chunks(double, (2, 17)).unwrap_err().to_string();
    assert!(error.contains("kernel"), "{error}");
}

#[test]
fn chunks_outside_their_blob_and_odd_formats_are_refused() {
    for second in [(3, 16), (1, 33), (1, u32::MAX)] {
        assert!(two_chunks(4, second).is_err(), "{second:?}");
    }
    for format in [3, 0x40 | 4] {
        assert!(two_chunks(format, (1, 16)).is_err());
    }
}
