//! Other people's programs read our images, and we read theirs: nydus-image and nydusd 2.2.0.
//!
//! `SLUICE_PEERS` names the folder they are in (tools/peers installs them) and `none` says that
//! they are left out on purpose; without either there is nothing to test, and that fails. Needs
//! root, python3 and tar.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use sluice::build::{Builder, Compression, Options};
use sluice::image::{BlobId, DigestAlgorithm};
use support::image::{Folder, lines, list};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// `None` if they are left out on purpose.
fn peers() -> Option<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers");
    let folder = std::env::var_os("SLUICE_PEERS").map_or(own, PathBuf::from);
    if folder.as_os_str() == "none" {
        println!("without nydus-image and nydusd: nothing was compared");
        return None;
    }
    let programs = folder.join("bin");
    let found = programs.join("nydus-image").exists() && programs.join("nydusd").exists();
    assert!(found, "no peers in {}: tools/peers, or SLUICE_PEERS=none", programs.display());
    Some(programs)
}

fn expected() -> Vec<String> {
    lines(&std::fs::read_to_string(fixture("tree.txt")).expect("the fixtures' listing"))
}

fn source() -> TempDir {
    let root = tempfile::tempdir().expect("a folder");
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf"]);
    tar.arg(fixture("source.tar.gz")).arg("-C").arg(root.path());
    assert!(tar.status().expect("tar runs").success());
    root
}

/// nydusd in FUSE mode; ends, unmounted, when dropped.
struct Served {
    daemon: Child,
    mountpoint: PathBuf,
    _work: TempDir,
}

impl Served {
    fn start(programs: &Path, image: &Folder) -> Served {
        let work = tempfile::tempdir().expect("a folder");
        let at = |name: &str| work.path().join(name);
        let (cache, mountpoint, config) = (at("cache"), at("mount"), at("config.json"));
        std::fs::create_dir(&cache).expect("a folder");
        std::fs::create_dir(&mountpoint).expect("a folder");
        let text = serde_json::json!({
            "device": {
                "backend": {"type": "localfs", "config": {"dir": image.path}},
                "cache": {"type": "blobcache", "config": {"work_dir": cache}},
            },
            "mode": "direct", "digest_validate": false, "enable_xattr": true,
        });
        std::fs::write(&config, text.to_string()).expect("written");
        let mut command = Command::new(programs.join("nydusd"));
        command.args(["fuse", "--rlimit-nofile", "0", "--log-level", "error", "--bootstrap"]);
        command.arg(image.path.join("image.boot")).arg("--config").arg(config);
        command.arg("--mountpoint").arg(&mountpoint).arg("--apisock").arg(at("api.sock"));
        let daemon = command.stdout(Stdio::null()).spawn().expect("nydusd starts");
        let served = Served { daemon, mountpoint, _work: work };
        served.wait();
        served
    }

    fn wait(&self) {
        let deadline = Instant::now() + PATIENCE;
        let is_mounted = || {
            let mounts = std::fs::read_to_string("/proc/mounts").expect("the kernel says");
            mounts.contains(self.mountpoint.to_str().expect("text"))
        };
        while !is_mounted() {
            assert!(Instant::now() < deadline, "nydusd does not mount");
            std::thread::sleep(Duration::from_millis(20)); // tidy: polling
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = umount2(&self.mountpoint, MntFlags::MNT_DETACH);
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn assert_accepted(programs: &Path, image: &Folder, what: &str) {
    let mut check = Command::new(programs.join("nydus-image"));
    let output = check.arg("check").arg("-B").arg(image.path.join("image.boot")).output();
    let output = output.expect("nydus-image runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what}: nydus-image check: {said}");
    let served = Served::start(programs, image);
    assert_eq!(list(&served.mountpoint), expected(), "{what}: as nydusd serves it");
}

#[test]
fn nydus_accepts_our_images() {
    let Some(programs) = peers() else { return };
    let source = source();
    let styles = [
        (Compression::None, 4 << 10, DigestAlgorithm::Sha256),
        (Compression::Lz4Block, 64 << 10, DigestAlgorithm::Blake3),
        (Compression::Zstd(3), 1 << 20, DigestAlgorithm::Blake3),
        (Compression::Zstd(9), 16 << 20, DigestAlgorithm::Sha256),
    ];
    for (compression, chunk_size, digest) in styles {
        let out = tempfile::tempdir().expect("a folder");
        let options = Options { compression, chunk_size, digest, ..Options::default() };
        let mut builder = Builder::new(options, out.path()).expect("good options");
        builder.add_directory(source.path(), &|_| ()).expect("a layer");
        let image = Folder::of(out.path(), &builder.finish().expect("an image"));
        assert_accepted(&programs, &image, &format!("{compression:?}, {chunk_size}"));
    }
}

#[test]
fn nydus_accepts_layers_that_stay_as_they_are() {
    let Some(programs) = peers() else { return };
    let out = tempfile::tempdir().expect("a folder");
    let layer = std::fs::read(fixture("source.tar.gz")).expect("the fixture");
    let id = BlobId::of_digest(&DigestAlgorithm::Sha256.digest(&layer));
    std::fs::write(out.path().join(id.as_str()), &layer).expect("written");
    let mut builder = Builder::new(Options::default(), out.path()).expect("good options");
    builder.add_gzip_as_is(&layer[..], id, &|_| ()).expect("a layer");
    let image = Folder::of(out.path(), &builder.finish().expect("an image"));
    assert_accepted(&programs, &image, "zran");
}

/// What nydus-image makes of a source.
fn create(programs: &Path, how: &[&str], source: &Path) -> TempDir {
    let out = tempfile::tempdir().expect("a folder");
    let mut create = Command::new(programs.join("nydus-image"));
    create.args(["create", "--fs-version", "6"]).args(how).arg("--bootstrap");
    create.arg(out.path().join("image.boot")).arg("--blob-dir").arg(out.path());
    let output = create.arg(source).output().expect("nydus-image runs");
    assert!(output.status.success(), "{how:?}: {}", String::from_utf8_lossy(&output.stderr));
    out
}

/// An image of theirs is the fixtures' tree to us, unpacked and mounted.
fn assert_ours(folder: &Path, what: &str) {
    // Their root has no time, or today's.
    let untimed = |lines: Vec<String>| -> Vec<String> {
        lines.into_iter().filter(|line| !line.starts_with("'.' ")).collect()
    };
    let (image, expected) = (Folder::open(folder), untimed(expected()));
    assert_eq!(untimed(image.unpacked()), expected, "{what}, unpacked");
    assert_eq!(untimed(list(&image.mount().0)), expected, "{what}, mounted");
}

#[test]
fn we_read_what_nydus_makes_of_layers() {
    let Some(programs) = peers() else { return };
    let layer = fixture("source.tar.gz");
    let how: [&[&str]; 6] = [
        &["targz-rafs", "--compressor", "none"],
        &["targz-rafs", "--compressor", "lz4_block", "--chunk-size", "0x10000"],
        &["targz-rafs", "--compressor", "zstd", "--digester", "sha256"],
        &["targz-rafs", "--compressor", "zstd", "--features", "blob-toc"],
        &["targz-rafs", "--compressor", "lz4_block", "--aligned-chunk"],
        &["targz-ref", "--chunk-size", "0x10000"],
    ];
    for how in how {
        let theirs = create(&programs, &[&["--type"], how].concat(), &layer);
        if how[0] == "targz-ref" {
            let bytes = std::fs::read(&layer).expect("the fixture");
            let id = BlobId::of_digest(&DigestAlgorithm::Sha256.digest(&bytes));
            std::fs::write(theirs.path().join(id.as_str()), bytes).expect("written");
        }
        assert_ours(theirs.path(), &how.join(" "));
    }
}

#[test]
fn we_read_what_nydus_builds_and_are_not_larger() {
    let Some(programs) = peers() else { return };
    let source = source();
    let styles = [
        ("none", Compression::None, 1 << 20),
        ("lz4_block", Compression::Lz4Block, 4 << 10),
        ("lz4_block", Compression::Lz4Block, 1 << 20),
        ("zstd", Compression::Zstd(3), 64 << 10),
        ("zstd", Compression::Zstd(3), 16 << 20),
    ];
    for (name, compression, chunk_size) in styles {
        let size = format!("{chunk_size:#x}");
        let how = ["--type", "dir-rafs", "--compressor", name, "--chunk-size", &size];
        let theirs = create(&programs, &how, source.path());
        let their_bytes = folder_bytes(theirs.path());
        assert_ours(theirs.path(), &format!("{name}, {chunk_size}"));
        let ours = tempfile::tempdir().expect("a folder");
        let options = Options { compression, chunk_size, ..Options::default() };
        let mut builder = Builder::new(options, ours.path()).expect("good options");
        builder.add_directory(source.path(), &|_| ()).expect("a layer");
        Folder::of(ours.path(), &builder.finish().expect("an image"));
        let bytes = folder_bytes(ours.path());
        assert!(bytes <= their_bytes, "{name}, {chunk_size}: ours {bytes}, {their_bytes}");
    }
}

fn folder_bytes(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).expect("a folder");
    entries.map(|entry| entry.expect("an entry").metadata().expect("its size").len()).sum()
}
