//! Layers in both directions: what a tar says comes out as it went in, and nothing gets out of the
//! directory. Needs root, as the product does: devices, owners and overlayfs's attributes.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::changes::{self, Kind};
use super::pack;
use super::stack::Stack;
use super::unpack::{Unpacked, unpack};
use crate::error::{Error, Result};

/// A directory with a layer, a scrap directory and whatever a test puts beside them.
struct Bench {
    place: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let place = tempfile::tempdir().expect("a directory");
        for name in ["layer", "scrap", "other"] {
            fs::create_dir(place.path().join(name)).expect("made");
        }
        Bench { place }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn unpack(&self, tar: &[u8]) -> Result<Unpacked> {
        let result = unpack(&self.path("layer"), &self.path("scrap"), tar);
        assert_eq!(fs::read_dir(self.path("scrap")).expect("listed").count(), 0, "scrap is left");
        result
    }
}

fn packed(roots: &[PathBuf]) -> Vec<u8> {
    let mut tar = Vec::new();
    pack::pack(Stack::open(roots, false).expect("opens"), &mut tar).expect("packs");
    tar
}

fn shell(directory: &Path, script: &str) {
    let status = Command::new("bash").args(["-euc", script]).current_dir(directory).status();
    assert!(status.expect("a shell").success(), "{script}");
}

/// A tar of these lines of Python, where `add(name, type, **fields)` adds a member.
fn tar_of(lines: &str) -> Vec<u8> {
    const FRONT: &str = "import tarfile, io, sys\n\
        out = tarfile.open(fileobj=sys.stdout.buffer, mode='w|', format=tarfile.PAX_FORMAT)\n\
        def add(name, kind='0', data=b'', **fields):\n \
        i = tarfile.TarInfo(name); i.type = kind.encode(); i.size = len(data); i.mtime = 1\n \
        for k, v in fields.items(): setattr(i, k, v)\n \
        out.addfile(i, io.BytesIO(data))\n";
    let program = format!("{FRONT}{lines}\nout.close()\n");
    let output = Command::new("python3").args(["-c", &program]).output().expect("python3 runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

const EVERYTHING: &str = r#"
long=d-$(printf 'x%.0s' {1..150}); mkdir -p a/b $long/deep; echo hello >a/file
chown 70000:3000000 a/file; chmod 4751 a/file; ln a/file a/b/second
ln -s ../nowhere a/link; ln -s $(printf 'y%.0s' {1..200}) a/long-link; chown -h 5:6 a/link
mknod a/null c 1 3; mknod a/disk b 259 700; mkfifo a/pipe; : >a/empty; chmod 000 a/empty
touch -d '1965-01-02 03:04:05' a/old; touch -d 2200-01-01 a/new; chmod 1777 a/b
printf data | dd of=a/sparse bs=1 seek=9000000 2>/dev/null
python3 -c "
import os
os.setxattr('a/file', 'user.note', b'a\n=b\0')
capability = '0100000200200000000000000000000000000000'
os.setxattr('a/file', 'security.capability', bytes.fromhex(capability))
acl = '0200000001000700ffffffff04000500ffffffff20000500ffffffff'
os.setxattr('a/b', 'system.posix_acl_default', bytes.fromhex(acl))
"
touch -d '2001-02-03 04:05:06' a/b a $long/deep $long
"#;

#[test]
fn a_layer_comes_out_as_it_went_in() {
    let bench = Bench::new();
    shell(&bench.path("other"), EVERYTHING);
    let tar = packed(&[bench.path("other")]);
    let unpacked = bench.unpack(&tar).expect("unpacks");
    assert_eq!(packed(&[bench.path("layer")]), tar);
    assert!(!unpacked.opaque_root);
    // hello, sparse; the second name of a file counts once.
    assert_eq!(unpacked.size_bytes, 6 + 9_000_004);
    let file = fs::metadata(bench.path("layer/a/file")).expect("there");
    assert_eq!(
        (file.uid(), file.gid(), file.mode() & 0o7777, file.nlink()),
        (70000, 3_000_000, 0o4751, 2)
    );
}

#[test]
fn gnu_tar_reads_what_we_write_and_we_read_what_it_writes() {
    let bench = Bench::new();
    shell(&bench.path("other"), EVERYTHING);
    let tar = packed(&[bench.path("other")]);
    fs::create_dir(bench.path("gnu")).expect("made");
    let mut child = Command::new("tar")
        .args(["-x", "--xattrs", "--xattrs-include=*", "-p", "--numeric-owner", "-C"])
        .arg(bench.path("gnu"))
        .stdin(Stdio::piped())
        .spawn()
        .expect("tar runs");
    child.stdin.take().expect("a pipe").write_all(&tar).expect("written");
    assert!(child.wait().expect("ends").success());
    assert_eq!(packed(&[bench.path("gnu")]), tar);
    let output = Command::new("tar")
        .args(["--format=pax", "--xattrs", "--xattrs-include=*", "-S", "-cC"])
        .arg(bench.path("other"))
        .arg(".")
        .output()
        .expect("tar runs");
    bench.unpack(&output.stdout).expect("unpacks");
    assert_eq!(packed(&[bench.path("layer")]), tar);
    let blocks = |name: &str| fs::metadata(bench.path(name)).expect("there").blocks();
    assert!(blocks("layer/a/sparse") < 64, "the hole is filled");
}

#[test]
fn whiteouts_become_overlays_and_back() {
    let bench = Bench::new();
    let tar = tar_of(
        "add('d/', '5', mode=0o755); add('d/.wh..wh..opq'); add('d/new', data=b'x')\n\
         add('.wh.gone'); add('e/', '5', mode=0o755); add('e/.wh.also', mode=0)\n\
         add('.wh..wh.aufs'); add('.wh..wh.plnk/', '5')",
    );
    bench.unpack(&tar).expect("unpacks");
    let gone = fs::metadata(bench.path("layer/gone")).expect("there");
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    assert_eq!(
        xattr::get(bench.path("layer/d"), super::beneath::OPAQUE).expect("read"),
        Some(b"y".to_vec())
    );
    let listing =
        Command::new("tar").arg("-t").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut listing = listing.expect("tar runs");
    listing
        .stdin
        .take()
        .expect("a pipe")
        .write_all(&packed(&[bench.path("layer")]))
        .expect("written");
    let output = listing.wait_with_output().expect("ends");
    let names = String::from_utf8(output.stdout).expect("text");
    assert_eq!(names, "d/\nd/.wh..wh..opq\nd/new\ne/\ne/.wh.also\n.wh.gone\n");
}

#[test]
fn a_whiteout_and_its_successor_agree_in_either_order() {
    for lines in [
        "add('.wh.d'); add('d/', '5'); add('d/f', data=b'1')",
        "add('d/', '5'); add('d/f', data=b'1'); add('.wh.d')",
        "add('.wh.d'); add('d/f', data=b'1')",
    ] {
        let bench = Bench::new();
        bench.unpack(&tar_of(lines)).expect(lines);
        assert_eq!(fs::read(bench.path("layer/d/f")).expect("there"), b"1", "{lines}");
        let opaque = xattr::get(bench.path("layer/d"), super::beneath::OPAQUE).expect("read");
        assert_eq!(opaque, Some(b"y".to_vec()), "{lines}");
    }
    let bench = Bench::new();
    bench.unpack(&tar_of("add('f', data=b'1'); add('.wh.f')")).expect("unpacks");
    assert_eq!(fs::read(bench.path("layer/f")).expect("there"), b"1");
}

#[test]
fn a_layer_that_hides_everything_says_so() {
    let bench = Bench::new();
    let unpacked = bench.unpack(&tar_of("add('./', '5', mode=0o711, uid=9); add('.wh..wh..opq')"));
    assert!(unpacked.expect("unpacks").opaque_root);
    let root = fs::metadata(bench.path("layer")).expect("there");
    assert_eq!((root.mode() & 0o7777, root.uid(), root.mtime()), (0o711, 9, 1));
}

#[test]
fn nothing_gets_out_of_the_layer() {
    for (lines, refused) in [
        ("add('../outside', data=b'x')", true),
        ("add('a/../../outside', data=b'x')", true),
        ("add('/outside', data=b'x')", false),
        ("add('l', '2', linkname='../other'); add('l/outside', data=b'x')", true),
        ("add('l', '2', linkname='/'); add('l/outside', data=b'x')", false),
        ("add('l', '2', linkname='../other/victim'); add('l', data=b'x')", false),
        ("add('h', '1', linkname='../other/victim')", true),
        ("add('h', '1', linkname='/other/victim')", true),
        ("add('l', '2', linkname='../other'); add('h', '1', linkname='l/victim')", true),
        ("add('l', '2', linkname='../other'); add('l/.wh.victim')", true),
        ("add('l', '2', linkname='../other'); add('l/.wh..wh..opq')", true),
        ("add('.wh...')", true),
        ("add('a/.wh.')", true),
        ("add('l', '2', linkname='../other'); add('l/', '5', mode=0o700)", false),
        ("add('/proc/self/root/outside', data=b'x')", false),
        ("add('f', pax_headers={'SCHILY.xattr.trusted.overlay.redirect': '/other'})", false),
    ] {
        let bench = Bench::new();
        fs::write(bench.path("other/victim"), b"victim").expect("written");
        let before = fs::metadata(bench.path("other")).expect("there");
        let result = bench.unpack(&tar_of(lines));
        assert_eq!(result.is_err(), refused, "{lines}: {result:?}");
        assert!(!Path::new("/outside").exists() && !bench.path("outside").exists(), "{lines}");
        assert_eq!(fs::read(bench.path("other/victim")).expect("there"), b"victim", "{lines}");
        assert_eq!(fs::read_dir(bench.path("other")).expect("listed").count(), 1, "{lines}");
        let after = fs::metadata(bench.path("other")).expect("there");
        assert_eq!(
            (after.mode(), after.ctime_nsec()),
            (before.mode(), before.ctime_nsec()),
            "{lines}"
        );
        if !refused && lines.contains("outside") {
            let found =
                Command::new("find").arg(bench.path("layer")).args(["-name", "outside"]).output();
            assert!(!found.expect("find runs").stdout.is_empty(), "{lines}");
        }
        let redirect = xattr::get(bench.path("layer/f"), "trusted.overlay.redirect");
        assert!(redirect.ok().flatten().is_none(), "{lines}");
    }
}

#[test]
fn later_members_replace_earlier_ones() {
    let bench = Bench::new();
    let tar = tar_of(
        "add('x/', '5'); add('x/y', data=b'1'); add('x', data=b'2'); add('z', data=b'3')\n\
         add('z/', '5', mode=0o750); add('z/', '5', mode=0o711); add('z/in', data=b'4')",
    );
    bench.unpack(&tar).expect("unpacks");
    assert_eq!(fs::read(bench.path("layer/x")).expect("a file"), b"2");
    assert_eq!(fs::read(bench.path("layer/z/in")).expect("a file"), b"4");
    assert_eq!(fs::metadata(bench.path("layer/z")).expect("there").mode() & 0o777, 0o711);
}

#[test]
fn changes_are_what_docker_diff_prints() {
    let bench = Bench::new();
    let script = "mkdir -p keep/in same/in old; echo 1 >keep/in/f; echo 1 >gone; echo 1 >old/a
        echo 1 >old/b; touch same/in/f";
    shell(&bench.path("other"), script);
    fs::create_dir(bench.path("merged")).expect("made");
    fs::create_dir(bench.path("work")).expect("made");
    let script = "o=index=off,metacopy=off,redirect_dir=off
        mount -t overlay -o lowerdir=other,upperdir=layer,workdir=work,$o o merged
        trap 'umount merged' EXIT; cd merged
        echo 2 >keep/in/f; rm gone; rm -r old; mkdir old; echo 2 >old/a; echo 2 >new
        mkdir -p fresh/dir;         chmod 644 same/in/f; rm new; mkdir new; cd ..";
    shell(bench.place.path(), script);
    let (upper, lower) = ([bench.path("layer")], [bench.path("other")]);
    let (upper, lower) =
        (Stack::open(&upper, false).expect("opens"), Stack::open(&lower, false).expect("opens"));
    let found = changes::changes(upper, lower).expect("compared");
    let letter = |kind| match kind {
        Kind::Modified => 'C',
        Kind::Added => 'A',
        Kind::Deleted => 'D',
    };
    let lines: Vec<String> = found
        .iter()
        .map(|change| format!("{} {}", letter(change.kind), String::from_utf8_lossy(&change.path)))
        .collect();
    let wanted = "A /fresh, A /fresh/dir, D /gone, C /keep, C /keep/in, C /keep/in/f, A /new, \
        C /old, C /old/a, D /old/b, C /same, C /same/in, C /same/in/f";
    assert_eq!(lines.join(", "), wanted);
}

#[test]
fn several_layers_pack_as_what_they_show_together() {
    let bench = Bench::new();
    let layers: Vec<PathBuf> = ["top", "middle", "bottom"].map(|name| bench.path(name)).to_vec();
    for (layer, lines) in layers.iter().zip([
        "add('.wh.a'); add('d/.wh.x'); add('e/', '5'); add('e/3', data=b'3'); add('s/n', data=b'')",
        "add('a', data=b'1'); add('d/x', data=b'1'); add('.wh.e'); add('s', data=b'file')",
        "add('e/', '5'); add('e/1', data=b'1'); add('d/y', data=b'1'); add('s/o', data=b'o')",
    ]) {
        fs::create_dir(layer).expect("made");
        unpack(layer, &bench.path("scrap"), &tar_of(lines)[..]).expect("unpacks");
    }
    let tar = packed(&layers);
    let mut child = Command::new("tar")
        .arg("-t")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("tar");
    child.stdin.take().expect("a pipe").write_all(&tar).expect("written");
    let names = String::from_utf8(child.wait_with_output().expect("ends").stdout).expect("text");
    assert_eq!(
        names,
        ".wh.a\nd/\nd/.wh.x\nd/y\ne/\ne/.wh..wh..opq\ne/3\ns/\ns/.wh..wh..opq\ns/n\n"
    );
    let size = pack::size_bytes(Stack::open(&layers, false).expect("opens")).expect("added up");
    assert_eq!(size, 2);
}

#[test]
fn a_tree_too_deep_is_refused_and_one_at_the_limit_is_not() {
    let bench = Bench::new();
    let mut tar =
        tar_of(&format!("add('{}f', data=b'x')", "d/".repeat(crate::config::LAYER_DEPTH_MAX)));
    bench.unpack(&tar).expect("unpacks");
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 4096, 4096).ok();
    tar = packed(&[bench.path("layer")]);
    assert!(!tar.is_empty());
    shell(&bench.path("layer"), "mkdir -p e; mv d e/");
    let stack = Stack::open(&[bench.path("layer")], false).expect("opens");
    assert!(matches!(pack::pack(stack, std::io::sink()), Err(Error::Unsupported(_))));
}

#[test]
fn links_swapped_in_while_packing_are_not_followed() {
    let bench = Bench::new();
    fs::create_dir(bench.path("layer/d")).expect("made");
    fs::write(bench.path("layer/d/f"), b"inside").expect("written");
    let stack = Stack::open(&[bench.path("layer")], false).expect("opens");
    let found = stack.find(b"d").expect("looked").expect("there");
    fs::remove_file(bench.path("layer/d/f")).expect("removed");
    symlink("/etc/passwd", bench.path("layer/d/f")).expect("made");
    assert!(super::beneath::open_file(found.below.layer(0), b"f").is_err());
    fs::rename(bench.path("layer/d"), bench.path("layer/e")).expect("moved");
    symlink("/etc", bench.path("layer/d")).expect("made");
    assert!(super::beneath::open_directory(stack.layer(0), b"d").is_err());
}

#[test]
fn sizes_that_no_disk_has_are_added_up_all_the_same() {
    // A file system on which a container may say that a file has 2^63 - 1 bytes.
    let place = tempfile::tempdir_in("/dev/shm").expect("a directory");
    for name in ["a", "b", "c"] {
        let file = std::fs::File::create(place.path().join(name)).expect("made");
        file.set_len(i64::MAX as u64).expect("sized");
    }
    let stack = Stack::open(&[place.path().to_owned()], false).expect("opens");
    assert_eq!(pack::size_bytes(stack), Ok(i64::MAX as u64), "Docker's sizes have a sign");
}
