//! What a tree refuses, and what whiteouts leave: the cases that other tools do not agree on or
//! cannot be asked about. The rest is in tests/layers.rs, against those tools.

use super::entry::{Attributes, Entry, FileData};
use super::tree::{Content, Tree};
use crate::config::BOOTSTRAP_MAX_BYTES;
use crate::error::Error;
use crate::image::FileKind;

fn file() -> Entry {
    Entry::File(Attributes::unknown(), FileData::default())
}

fn directory() -> Entry {
    Entry::Directory(Attributes::unknown())
}

fn link(target: &str) -> Entry {
    Entry::Link(Attributes::unknown(), target.into())
}

fn hard(target: &str) -> Entry {
    Entry::HardLink(target.into())
}

fn tree_of(entries: &[(&str, Entry)]) -> Tree {
    let mut tree = Tree::new();
    tree.begin_layer();
    for (path, entry) in entries {
        tree.apply(path.as_bytes(), entry.clone()).unwrap();
    }
    tree
}

/// All paths, directories with a slash behind.
fn paths(tree: &Tree) -> Vec<String> {
    let mut found = Vec::new();
    let mut pending = vec![(String::new(), Tree::ROOT)];
    while let Some((path, inode)) = pending.pop() {
        let Content::Directory(children) = &tree.node(inode).content else {
            found.push(path);
            continue;
        };
        for (name, child) in children {
            pending.push((format!("{path}/{}", String::from_utf8_lossy(name)), child.inode));
        }
        found.push(path + "/");
    }
    found.sort();
    found
}

#[test]
fn what_no_runtime_could_unpack_is_refused_by_name() {
    let long = "x".repeat(256);
    let deep = "d/".repeat(2000) + &"y".repeat(200);
    let cases: Vec<(&str, Entry, &str)> = vec![
        ("a", hard("nothing"), "not there"),
        ("a", hard("file/below"), "not there"),
        ("a", hard("dir"), "a directory"),
        ("a", hard(""), "a directory"),
        ("file", hard("file"), "itself"),
        ("file", hard("./dir/../file"), "itself"),
        ("file/below", file(), "not a directory"),
        ("loop/below", file(), "symbolic links"),
        ("a", hard("loop/x"), "symbolic links"),
        ("", file(), "the root"),
        ("dir/..", link("x"), "the root"),
        (".wh.", file(), "whiteout of nothing"),
        ("dir/.wh..", file(), "whiteout of nothing"),
        ("dir/.wh...", file(), "whiteout of nothing"),
        (&long, file(), "a name of 256 bytes"),
        (&deep, file(), "a path of 4200 bytes"),
        ("far/far2/z", file(), "more than 4096 bytes"),
        ("a\0b", file(), "NUL"),
        ("a", link(""), "target of 0 bytes"),
        ("a", link(&"t".repeat(4096)), "target of 4096 bytes"),
        ("a", Entry::Device(Attributes::unknown(), FileKind::BlockDevice, 4096, 0), "range"),
        ("a", Entry::Device(Attributes::unknown(), FileKind::BlockDevice, 0, 1 << 20), "range"),
    ];
    // Two links that make paths longer than they look.
    let half = "h/".repeat(1200);
    let mut tree = tree_of(&[
        ("file", file()),
        ("dir", directory()),
        ("loop", link("loop")),
        (&half, directory()),
        ("far", link(&half)),
        (&format!("{half}far2"), link(&"i/".repeat(1200))),
    ]);
    let before = paths(&tree).len();
    for (path, entry, why) in cases {
        let error = tree.apply(path.as_bytes(), entry).expect_err(path);
        assert!(matches!(error, Error::Malformed(_)), "{error:?}");
        assert!(error.to_string().contains(why), "{path:?}: {error}");
    }
    tree.apply(b"dir/new", hard("file")).expect("it is still of use");
    // The new name; and directories on the way to a path that turned out too long.
    assert!(paths(&tree).len() > before);
    assert!(paths(&tree).iter().all(|path| path.len() <= 4098));
}

#[test]
fn links_that_lead_to_links_may_only_make_a_path_so_long() {
    let mut tree = tree_of(&[("d", directory()), ("l0", link("d/../d"))]);
    for number in 1..39 {
        let target = format!("{}l{}", "d/../".repeat(800), number - 1);
        tree.apply(format!("l{number}").as_bytes(), link(&target)).unwrap();
    }
    // Two of 1601 names each are well; a third is one too many.
    tree.apply(b"l2/x", file()).unwrap();
    assert!(tree.apply(b"l3/x", file()).is_err());
    for entry in [file(), hard("l38/x")] {
        let error = tree.apply(b"l38/x", entry).unwrap_err().to_string();
        assert!(error.contains("more than 4096 names") && error.contains("l38/x"), "{error}");
    }
}

#[test]
fn what_is_replaced_or_taken_away_holds_nothing() {
    let heavy = || {
        let xattrs = [(b"user.a"[..].into(), vec![7; 60_000].into())].into();
        Attributes { xattrs, ..Attributes::unknown() }
    };
    let kinds = || {
        [
            Entry::File(heavy(), FileData::default()),
            Entry::Directory(heavy()),
            Entry::Link(heavy(), vec![b't'; 4000]),
            Entry::Special(heavy(), FileKind::Pipe),
        ]
    };
    let mut tree = Tree::new();
    tree.begin_layer();
    for entry in kinds().into_iter().chain(kinds()) {
        tree.apply(b"a", entry).unwrap();
        assert!((60_000..70_000).contains(&tree.held_bytes), "{}", tree.held_bytes);
    }
    // A file holds what it has as long as one name leads to it, whatever replaces its directory.
    tree.apply(b"d/sub/x", Entry::File(heavy(), FileData::default())).unwrap();
    tree.apply(b"d", hard("d/sub/x")).unwrap();
    assert!((120_000..130_000).contains(&tree.held_bytes), "{}", tree.held_bytes);
    tree.begin_layer();
    for path in ["", "", "e"] {
        tree.apply(path.as_bytes(), Entry::Directory(heavy())).unwrap();
    }
    assert!((240_000..250_000).contains(&tree.held_bytes), "{}", tree.held_bytes);
    tree.begin_layer();
    tree.apply(b"", directory()).unwrap();
    tree.apply(b".wh..wh..opq", file()).unwrap();
    assert_eq!((tree.held_bytes, paths(&tree)), (0, vec!["/".to_owned()]));
}

#[test]
fn more_than_a_bootstrap_could_hold_is_refused() {
    let mut tree = Tree::new();
    tree.begin_layer();
    tree.held_bytes = BOOTSTRAP_MAX_BYTES - 20;
    tree.apply(b"a", file()).unwrap();
    let error = tree.apply(b"b", link("a target")).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error:?}");
    assert!(error.to_string().starts_with("\"b\": "), "{error}");
}

#[test]
fn whiteouts_spare_their_own_layer_and_ignore_what_is_not_there() {
    let mut tree = tree_of(&[("a/low", file()), ("b", file()), ("c", file())]);
    tree.begin_layer();
    for path in ["a/high", ".wh.a", "b", ".wh.b", ".wh.c", "no/.wh.where", ".wh..wh.x"] {
        tree.apply(path.as_bytes(), file()).unwrap();
    }
    assert_eq!(paths(&tree), ["/", "/a/", "/a/high", "/b"]);
}

#[test]
fn a_repeated_whiteout_goes_through_a_directory_once_a_layer() {
    let mut tree = tree_of(&[("d/low", file()), ("d/sub/low", file())]);
    for layer in [2, 3] {
        tree.begin_layer();
        let before = tree.visits;
        for number in 0..100 {
            tree.apply(format!("d/{layer}-{number}").as_bytes(), file()).unwrap();
        }
        tree.apply(format!("d/sub/{layer}").as_bytes(), file()).unwrap();
        for _ in 0..100 {
            for mark in ["d/.wh..wh..opq", ".wh.d", "d/sub/.wh..wh..opq"] {
                tree.apply(mark.as_bytes(), file()).unwrap();
            }
        }
        // The names of this layer and of the one below, and `d` each time it is named itself.
        assert!(tree.visits - before <= 102 + 102 + 2 + 100, "{}", tree.visits - before);
        assert_eq!(paths(&tree).len(), 1 + 1 + 100 + 2, "{:?}", paths(&tree));
    }
}

#[test]
fn what_a_layer_adds_after_its_whiteout_is_there_for_the_next_one() {
    let mut tree = tree_of(&[("d/low", file())]);
    tree.begin_layer();
    for path in ["d/.wh..wh..opq", "d/sub/one", "d/.wh..wh..opq", ".wh.d"] {
        tree.apply(path.as_bytes(), file()).unwrap();
    }
    assert_eq!(paths(&tree), ["/", "/d/", "/d/sub/", "/d/sub/one"]);
    tree.begin_layer();
    for path in ["d/sub/two", "d/sub/.wh..wh..opq"] {
        tree.apply(path.as_bytes(), file()).unwrap();
    }
    assert_eq!(paths(&tree), ["/", "/d/", "/d/sub/", "/d/sub/two"]);
    tree.begin_layer();
    tree.apply(b".wh.d", file()).unwrap();
    assert_eq!(paths(&tree), ["/"]);
}

#[test]
fn another_name_does_not_shield_the_first_from_a_whiteout() {
    let mut tree = tree_of(&[("a", file())]);
    tree.begin_layer();
    tree.apply(b"b", hard("a")).unwrap();
    tree.apply(b".wh.a", file()).unwrap();
    assert_eq!(paths(&tree), ["/", "/b"]);
}

#[test]
fn a_hard_link_may_be_said_again_in_its_layer_and_in_later_ones() {
    let mut tree = tree_of(&[("b", file()), ("a", hard("b")), ("a", hard("b")), ("c", file())]);
    tree.begin_layer();
    for (path, entry) in [("a", hard("b")), (".wh.a", file()), (".wh.c", file())] {
        tree.apply(path.as_bytes(), entry).unwrap();
    }
    // The second layer has it too, so its whiteout spares it.
    assert_eq!(paths(&tree), ["/", "/a", "/b"]);
    assert_eq!(tree.find(b"a").unwrap(), tree.find(b"b").unwrap());
    assert!(tree.apply(b"a", hard("a")).unwrap_err().to_string().contains("itself"));
}

#[test]
fn names_of_a_directory_on_the_host_are_no_whiteouts() {
    let mut tree = Tree::new();
    tree.begin_layer();
    for path in [".wh.a", ".wh..wh..opq", "d/.wh."] {
        tree.put(path.as_bytes(), file()).unwrap();
    }
    assert_eq!(paths(&tree), ["/", "/.wh..wh..opq", "/.wh.a", "/d/", "/d/.wh."]);
}

#[test]
fn bookkeeping_of_aufs_is_no_part_of_an_image() {
    let tree = tree_of(&[(".wh..wh.plnk/1.2", file()), (".wh..wh.aufs", file()), ("a", file())]);
    assert_eq!(paths(&tree), ["/", "/a"]);
}
