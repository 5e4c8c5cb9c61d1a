//! Images built from the fixtures' tree and from small layers: formats, determinism, deduplication,
//! and layers that are broken or hostile.
//!
//! Needs root, python3 and tar, and a kernel that mounts EROFS files.

mod support;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use sluice::build::{BlobRole, Builder, Compression, Image, Options};
use sluice::error::{Error, Result};
use sluice::image::{BlobId, Bootstrap, DigestAlgorithm};
use support::image::{Folder, blob_files, lines, list};
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn options(compression: Compression, chunk_size: u32) -> Options {
    Options { compression, chunk_size, threads: 2, ..Options::default() }
}

fn ordinary() -> Options {
    options(Compression::Zstd(3), 64 << 10)
}

/// The tree the fixtures were made from.
fn source() -> TempDir {
    let root = tempfile::tempdir().expect("a folder");
    let status = Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf"])
        .arg(fixture("source.tar.gz"))
        .arg("-C")
        .arg(root.path())
        .status();
    assert!(status.expect("tar runs").success());
    root
}

fn expected() -> Vec<String> {
    lines(&std::fs::read_to_string(fixture("tree.txt")).expect("the fixtures' listing"))
}

fn build_tars(options: Options, out: &Path, layers: &[&[u8]]) -> Result<Image> {
    let mut builder = Builder::new(options, out)?;
    for layer in layers {
        builder.add_tar(*layer, &|_| ())?;
    }
    builder.finish()
}

/// A tar of files with these contents.
fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, data) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, path, *data).expect("appended");
    }
    tar.into_inner().expect("finished")
}

fn noise(size: usize, seed: u64) -> Vec<u8> {
    let mut state = 2 * seed + 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u8
    };
    (0..size).map(|_| next()).collect()
}

#[test]
fn every_compressor_and_chunk_size_keeps_the_fixtures_tree() {
    let (source, expected) = (source(), expected());
    let compressions = [Compression::None, Compression::Lz4Block, Compression::Zstd(3)];
    for compression in compressions {
        for chunk_size in [4 << 10, 64 << 10, 1 << 20, 16 << 20] {
            let out = tempfile::tempdir().expect("a folder");
            let options = options(compression, chunk_size);
            let digest =
                [DigestAlgorithm::Blake3, DigestAlgorithm::Sha256][usize::from(chunk_size > 65536)];
            let mut builder = Builder::new(Options { digest, ..options }, out.path()).unwrap();
            builder.add_directory(source.path(), &|_| ()).expect("a layer");
            let image = Folder::of(out.path(), &builder.finish().expect("an image"));
            let what = format!("{compression:?}, chunks of {chunk_size}");
            assert_eq!(image.unpacked(), expected, "{what}, unpacked");
            assert_eq!(list(&image.mount().0), expected, "{what}, mounted");
        }
    }
}

/// `SLUICE_ROUNDTRIP` names the directory, as tools/roundtrip does with a Debian root; our own
/// sources otherwise.
#[test]
fn any_directory_comes_back_as_it_was() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let directory = std::env::var_os("SLUICE_ROUNDTRIP").map_or(own, PathBuf::from);
    let expected = list(&directory);
    assert!(expected.len() > 100, "{}: too small to say anything", directory.display());
    let out = tempfile::tempdir().expect("a folder");
    let options = options(Compression::Zstd(3), 1 << 20);
    let mut builder = Builder::new(options, out.path()).expect("good options");
    builder.add_directory(&directory, &|_| ()).expect("a layer");
    let image = Folder::of(out.path(), &builder.finish().expect("an image"));
    assert_eq!(image.unpacked(), expected, "unpacked");
    assert_eq!(list(&image.mount().0), expected, "mounted");
}

#[test]
fn images_are_the_same_with_any_number_of_threads() {
    // Many duplicates, so that workers compete for the first of each.
    let pieces: Vec<Vec<u8>> = (0..40).map(|seed| noise(9000 + seed * 1000, 7)).collect();
    let mut files = Vec::new();
    let names: Vec<String> = (0..1500).map(|number| format!("d{}/f{number}", number % 7)).collect();
    for (number, name) in names.iter().enumerate() {
        files.push((&name[..], &pieces[number * number % 40][..]));
    }
    let layer = tar_of(&files);
    let fixtures = std::fs::read(fixture("source.tar.gz")).expect("the fixture");
    for compression in [Compression::Lz4Block, Compression::Zstd(3), Compression::Zstd(8)] {
        let mut before: Option<(Vec<u8>, Vec<Vec<u8>>)> = None;
        for threads in [1, 2, 4, 4, 2] {
            let out = tempfile::tempdir().expect("a folder");
            let options = Options { threads, ..options(compression, 16 << 10) };
            let image = build_tars(options, out.path(), &[&layer, &fixtures]).expect("an image");
            let now = (image.bootstrap, blob_files(&image.blobs));
            assert_eq!(now.1.len(), 2);
            let same = before.as_ref().is_none_or(|before| *before == now);
            assert!(same, "{compression:?} with {threads} threads");
            before = Some(now);
        }
    }
}

/// Builds the image of a tar.gz that stays as it is; the layer goes beside it, under its name.
fn build_as_is(out: &Path, layer: &[u8], options: Options) -> Result<Folder> {
    let id = BlobId::of_digest(&DigestAlgorithm::Sha256.digest(layer));
    std::fs::write(out.join(id.as_str()), layer).expect("written");
    let mut builder = Builder::new(options, out)?;
    builder.add_gzip_as_is(layer, id.clone(), &|_| ())?;
    let image = builder.finish()?;
    assert_eq!(image.blobs[0].role, BlobRole::Layer);
    assert_eq!(image.blobs[0].id, id);
    Ok(Folder::of(out, &image))
}

#[test]
fn gzip_layers_can_stay_as_they_are() {
    let layer = std::fs::read(fixture("source.tar.gz")).expect("the fixture");
    let mut tar = Vec::new();
    flate2::read::MultiGzDecoder::new(&layer[..]).read_to_end(&mut tar).expect("it is gzip");
    for (chunk_size, step) in [(4 << 10, 0), (1 << 20, 0), (64 << 10, 300_000), (64 << 10, 1000)] {
        let out = tempfile::tempdir().expect("a folder");
        let layer = if step == 0 { layer.clone() } else { gzip_members(&tar, step) };
        let options = options(Compression::Zstd(3), chunk_size);
        let image = build_as_is(out.path(), &layer, options).expect("an image");
        assert_eq!(image.unpacked(), expected(), "{chunk_size}, {step}");
        assert_eq!(list(&image.mount().0), expected(), "{chunk_size}, {step}");
    }
}

/// One gzip member for every `step` bytes.
fn gzip_members(plain: &[u8], step: usize) -> Vec<u8> {
    use std::io::Write;
    let mut out = Vec::new();
    for part in plain.chunks(step) {
        let builder = flate2::GzBuilder::new().filename("part");
        let mut encoder = builder.write(Vec::new(), flate2::Compression::fast());
        encoder.write_all(part).expect("memory");
        out.extend(encoder.finish().expect("memory"));
    }
    out
}

#[test]
fn layers_share_chunks_and_needless_blobs_go() {
    let (same, other) = (noise(200_000, 1), noise(50_000, 2));
    let first = tar_of(&[("a", &same), ("gone", &other)]);
    let second = tar_of(&[("b", &same), ("c", &noise(70_000, 3))]);
    let third = tar_of(&[("d", &same)]);
    let replaced = tar_of(&[("c", b"short"), (".wh.gone", b"")]);
    let out = tempfile::tempdir().expect("a folder");
    let layers: [&[u8]; 4] = [&first, &second, &third, &replaced];
    let image = build_tars(ordinary(), out.path(), &layers).expect("an image");
    let made: Vec<_> = image.blobs.iter().map(|blob| blob.layer).collect();
    assert_eq!(made, [Some(0), Some(3)], "layer 1 was replaced, layer 2 had nothing new");
    let left = std::fs::read_dir(out.path()).expect("a folder").count();
    assert_eq!(left, 2, "only the blobs the image names are left");
    assert_eq!(image.report.layers[2].shared_bytes, 200_000);
    assert_eq!(Folder::of(out.path(), &image).unpacked().len(), 5);
}

#[test]
fn chunks_of_other_images_are_used() {
    let (common, own) = (noise(300_000, 4), noise(100_000, 5));
    let out = tempfile::tempdir().expect("a folder");
    let base = tar_of(&[("x", &common)]);
    let base = build_tars(ordinary(), out.path(), &[&base]).expect("an image");
    let dictionary = Bootstrap::parse(base.bootstrap.clone()).expect("we accept it");
    let mut builder = Builder::new(ordinary(), out.path()).expect("good options");
    builder.add_dictionary(&dictionary).expect("it fits");
    let layer = tar_of(&[("y", &common), ("z", &own)]);
    let report = builder.add_tar(&layer[..], &|_| ()).expect("a layer");
    assert_eq!(report.shared_bytes, 300_000);
    let image = builder.finish().expect("an image");
    let roles: Vec<_> = image.blobs.iter().map(|blob| (blob.role, &blob.id)).collect();
    assert_eq!(roles[0], (BlobRole::Foreign, &base.blobs[0].id));
    assert_eq!(roles[1].0, BlobRole::Data);
    let files = Folder::of(out.path(), &image).unpacked();
    assert!(files.iter().any(|line| line.starts_with("'y'")));
    // Without use, none of its blobs become part of an image.
    let mut builder = Builder::new(ordinary(), out.path()).expect("good options");
    builder.add_dictionary(&dictionary).expect("it fits");
    builder.add_tar(&tar_of(&[("z", &own)])[..], &|_| ()).expect("a layer");
    assert_eq!(builder.finish().expect("an image").blobs.len(), 1);
    let mut other = Builder::new(options(Compression::None, 4096), out.path()).expect("good");
    assert!(matches!(other.add_dictionary(&dictionary), Err(Error::Unsupported(_))));
}

#[test]
fn blobs_that_were_there_stay_whatever_becomes_of_a_build() {
    let out = tempfile::tempdir().expect("a folder");
    let layer = tar_of(&[("a", &noise(100_000, 9))]);
    let first = build_tars(ordinary(), out.path(), &[&layer]).expect("an image");
    let upper = tar_of(&[("a", b"other")]);
    let second = build_tars(ordinary(), out.path(), &[&layer, &upper]).expect("an image");
    assert_eq!(second.blobs.len(), 1, "the first blob is not the second image's");
    let failed = build_tars(ordinary(), out.path(), &[&layer, b"no tar"]);
    assert!(failed.is_err());
    assert_eq!(Folder::of(out.path(), &first).unpacked().len(), 2);
}

#[test]
fn a_damaged_blob_is_made_good_by_the_next_build() {
    let out = tempfile::tempdir().expect("a folder");
    let layer = tar_of(&[("a", &noise(100_000, 9))]);
    let image = build_tars(ordinary(), out.path(), &[&layer]).expect("an image");
    let path = image.blobs[0].path.clone().expect("a file");
    let right = std::fs::read(&path).expect("the blob");
    let mut wrong = right.clone();
    wrong[5] ^= 1;
    std::fs::write(&path, wrong).expect("written");
    let again = build_tars(ordinary(), out.path(), &[&layer]).expect("an image");
    assert!(!again.blobs[0].is_new, "it may be another image's");
    assert!(std::fs::read(&path).expect("the blob") == right);
}

#[test]
fn images_without_data_have_no_blobs() {
    let out = tempfile::tempdir().expect("a folder");
    let image = build_tars(ordinary(), out.path(), &[&tar_of(&[("empty", b"")])]).expect("fine");
    assert!(image.blobs.is_empty());
    let image = Folder::of(out.path(), &image);
    assert_eq!(image.unpacked().len(), 2);
    assert_eq!(list(&image.mount().0).len(), 2);
    let none = build_tars(ordinary(), out.path(), &[]).expect("an image of nothing");
    assert_eq!(none.report.inodes, 1);
}

#[test]
fn files_named_for_prefetch_are_listed_in_their_order() {
    let out = tempfile::tempdir().expect("a folder");
    let layer = tar_of(&[("d/a", b"1"), ("b", b"2")]);
    let prefetch = ["b", "/d/a", "absent", "d"].map(|path| path.as_bytes().to_vec()).to_vec();
    let options = Options { prefetch, ..ordinary() };
    let image = build_tars(options, out.path(), &[&layer]).expect("an image");
    let bootstrap = Bootstrap::parse(image.bootstrap).expect("we accept it");
    let nid = |path: &str| bootstrap.tree().lookup(path.as_bytes()).expect("there").nid;
    let listed: Vec<u64> = bootstrap.prefetch_nids().collect();
    assert_eq!(listed, [nid("b"), nid("d/a"), nid("d")]);
}

#[test]
fn a_zstd_layer_may_begin_with_a_frame_to_skip() {
    let plain = tar_of(&[("a", &noise(30_000, 6)), ("b/c", b"text text text text")]);
    let (front, back) = plain.split_at(20_000);
    let mut layer = Vec::new();
    // As pzstd writes: each frame behind one that tells its size.
    for part in [front, back] {
        let frame = zstd::bulk::compress(part, 3).expect("memory");
        layer.extend([0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0]);
        layer.extend((frame.len() as u32).to_le_bytes());
        layer.extend(frame);
    }
    let out = tempfile::tempdir().expect("a folder");
    let image = build_tars(ordinary(), out.path(), &[&layer]).expect("an image");
    assert_eq!(Folder::of(out.path(), &image).unpacked().len(), 4);
}

#[test]
fn layers_that_are_cut_or_damaged_are_refused_and_leave_nothing() {
    let plain = tar_of(&[("a", &noise(30_000, 6)), ("b/c", b"text text text text")]);
    let gzip = gzip_members(&plain, 20_000);
    let zstd = zstd::bulk::compress(&plain, 3).expect("memory");
    for (layer, end) in [(&plain, plain.len() - 1024), (&gzip, gzip.len()), (&zstd, zstd.len())] {
        for cut in (1..end).step_by(997) {
            let out = tempfile::tempdir().expect("a folder");
            // A plain tar cut between two members has no sign of it.
            let result = build_tars(ordinary(), out.path(), &[&layer[..cut]]);
            let border = std::ptr::eq(layer, &plain) && cut == 30_720 + 512;
            let error = if border { continue } else { result.expect_err("cut short") };
            assert!(matches!(error, Error::Malformed(_)), "{cut}: {error:?}");
            let left = std::fs::read_dir(out.path()).expect("a folder").count();
            assert_eq!(left, 0, "{cut}: files are left");
        }
    }
    for at in [500, 10_000, gzip.len() - 6] {
        let mut damaged = gzip.clone();
        damaged[at] ^= 0x10;
        let out = tempfile::tempdir().expect("a folder");
        let as_is = build_as_is(out.path(), &damaged, ordinary());
        assert!(as_is.is_err(), "{at}");
        assert!(build_tars(ordinary(), out.path(), &[&damaged]).is_err(), "{at}");
    }
}

#[test]
fn layers_that_cannot_stay_as_they_are_say_what_to_do() {
    let out = tempfile::tempdir().expect("a folder");
    let plain = tar_of(&[("a", b"x")]);
    for layer in [plain.clone(), zstd::bulk::compress(&plain, 3).expect("memory")] {
        let Err(error) = build_as_is(out.path(), &layer, ordinary()) else { panic!("no gzip") };
        assert!(matches!(error, Error::Unsupported(_)), "{error:?}");
        assert!(error.to_string().contains("convert it instead (--to rafs)"), "{error}");
    }
    // One stream whose blocks are so long that it cannot be entered where it would have to be.
    let zeros = gzip_members(&tar_of(&[("a", &vec![0; 64 << 20])]), usize::MAX);
    match build_as_is(out.path(), &zeros, options(Compression::None, 16 << 20)) {
        Err(error) => assert!(error.to_string().contains("convert the layer"), "{error}"),
        Ok(image) => assert_eq!(image.unpacked().len(), 2),
    }
}
