//! What `sluice convert` makes, as a user has it: mounted from a registry by the daemon, read
//! lazily, equal to its source; and started faster after `mount --trace` and `optimize`, since what
//! the start needs comes at the mount in few long requests.
//!
//! Needs root, Linux 6.14 or later with file-backed EROFS, and python3.

mod support;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use support::daemon::{Daemon, forget_pages};
use support::layouts::{layout, noise, tar};
use support::registry::Registry;
use support::tree::assert_same_tree;
use support::truth::folder;
use tempfile::TempDir;

const KINDS: [&[&str]; 3] =
    [&["--compressor", "lz4_block"], &["--compressor", "zstd"], &["--to", "zran"]];

/// A registry, and a folder with the image `src:v1` in a layout.
struct Bench {
    registry: Registry,
    root: TempDir,
}

impl Bench {
    fn new(layers: &[Vec<u8>]) -> Bench {
        let bench = Bench { registry: Registry::start(&[]), root: TempDir::new().unwrap() };
        layout(&bench.root.path().join("src"), "v1", layers, &["amd64"]);
        bench
    }

    fn image(&self, tag: &str) -> String {
        format!("{}/team/app:{tag}", self.registry.address())
    }

    fn sluice(&self, arguments: &[&str]) -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command.args(arguments).args(["--plain-http", "--json"]).stdin(Stdio::null());
        command.env("HOME", self.root.path()).env("TMPDIR", self.root.path());
        let output = command.output().expect("the program runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}");
        serde_json::from_slice(&output.stdout).expect("a report")
    }

    fn convert(&self, kind: &[&str], tag: &str) {
        let source = format!("oci:{}:v1", self.root.path().join("src").display());
        self.sluice(&[&["convert"], kind, &[&source, &self.image(tag)]].concat());
    }

    /// GETs of blobs, without those that only warm a connection up.
    fn data_reads(&self) -> usize {
        self.registry.blob_reads().iter().filter(|read| read["bytes"].as_u64() > Some(1)).count()
    }

    fn mount(&self, daemon: &Daemon, tag: &str, more: &[&str]) -> PathBuf {
        let place = daemon.path(tag);
        std::fs::create_dir_all(&place).expect("a mountpoint");
        let (state, image) = (daemon.path("state"), self.image(tag));
        let arguments = ["mount", "--plain-http", "--state-dir", state.to_str().unwrap()];
        let names = [&image[..], place.to_str().unwrap()];
        let output = daemon.run(&[&arguments, more, &names].concat());
        assert!(output.status.success(), "{}", daemon.log());
        place
    }
}

/// The fixtures' tree (modes, owners, xattrs, hard links, devices, large and odd files) over a
/// layer of which nothing may be left.
fn tricky_layers() -> Vec<Vec<u8>> {
    let gzip = std::fs::read(folder("source.tar.gz")).expect("a fixture");
    let mut source = Vec::new();
    flate2::read::MultiGzDecoder::new(&gzip[..]).read_to_end(&mut source).expect("gzip");
    let junk = noise(100_000, 5);
    let below = tar(&[("junk", &junk), ("big/", b""), ("big/random-5m", b"not this")]);
    vec![below, source, tar(&[(".wh.junk", b"")])]
}

fn start_trace(bench: &Bench, daemon: &Daemon, tag: &str, files: &[&str]) -> PathBuf {
    let trace = daemon.path("trace");
    let place = bench.mount(daemon, tag, &["--trace", trace.to_str().unwrap()]);
    files.iter().for_each(|file| drop(std::fs::read(place.join(file)).expect("a file")));
    daemon.unmount(&place);
    trace
}

#[test]
fn what_is_converted_is_read_lazily_and_equals_its_source() {
    let bench = Bench::new(&tricky_layers());
    for (number, kind) in KINDS.iter().enumerate() {
        let tag = format!("k{number}");
        bench.convert(kind, &tag);
        bench.registry.forget();
        let daemon = Daemon::start(&[]);
        let place = bench.mount(&daemon, &tag, &[]);
        assert_eq!(bench.data_reads(), 1, "{kind:?}: the bootstrap's layer");
        assert_same_tree(&place);
        assert!(bench.data_reads() > 1, "{kind:?}: the data came when it was read");
        forget_pages();
        assert_same_tree(&place);
        daemon.unmount(&place);
        let trace = start_trace(&bench, &daemon, &tag, &["big/random-5m", "big/text-7m"]);
        let image = bench.image(&tag);
        let report =
            bench.sluice(&["optimize", &image, "--trace", trace.to_str().unwrap(), "--tag", "o"]);
        // Everything the two files have, the long one's repetitions once.
        assert_eq!(report["missed"], 0, "{kind:?}: {report}");
        assert!(report["data_bytes"].as_u64() >= Some(262_267 + 1_048_576), "{kind:?}: {report}");
        let place = bench.mount(&daemon, "o", &[]);
        assert_same_tree(&place);
        daemon.unmount(&place);
        assert_eq!(daemon.count("reads_failed"), 0, "{kind:?}");
    }
}

/// 48 MiB in files of 64 KiB, of which a start needs one in every MiB, the last first.
fn scattered() -> (Vec<u8>, Vec<String>) {
    let files: Vec<(String, Vec<u8>)> =
        (0..768).map(|number| (format!("f{number:03}"), noise(64 << 10, number))).collect();
    let listed: Vec<(&str, &[u8])> =
        files.iter().map(|(name, data)| (&name[..], &data[..])).collect();
    let wanted = files.iter().step_by(16).rev().map(|(name, _)| name.clone()).collect();
    (tar(&listed), wanted)
}

#[test]
fn a_recorded_start_is_optimised_and_takes_fewer_requests() {
    let (layer, wanted) = scattered();
    let wanted: Vec<&str> = wanted.iter().map(|name| &name[..]).collect();
    let bench = Bench::new(&[layer]);
    // Blob reads of a start on a node that has nothing, besides the bootstrap's.
    let requests = |tag: &str, is_there: &dyn Fn(&Daemon) -> bool| -> usize {
        let daemon = Daemon::start(&[]);
        bench.registry.forget();
        let place = bench.mount(&daemon, tag, &[]);
        daemon.wait_until("it comes by itself", is_there);
        wanted.iter().for_each(|file| drop(std::fs::read(place.join(file)).expect("a file")));
        daemon.unmount(&place);
        bench.data_reads() - 1
    };
    for (number, kind) in KINDS.iter().enumerate() {
        let tag = format!("k{number}");
        bench.convert(kind, &tag);
        let daemon = Daemon::start(&[]);
        // What is on the node already is traced as well.
        let place = bench.mount(&daemon, &tag, &[]);
        std::fs::read(place.join(wanted[3])).expect("a file");
        daemon.unmount(&place);
        let trace = start_trace(&bench, &daemon, &tag, &wanted);
        assert_eq!(paths_of(&trace), wanted, "{kind:?}: in the order of their first touches");
        let (image, trace) = (bench.image(&tag), trace.to_string_lossy().into_owned());
        let report = bench.sluice(&["optimize", &image, "--trace", &trace, "--tag", "fast"]);
        assert_eq!((&report["files"], &report["missed"]), (&48.into(), &0.into()), "{report}");
        let (before, after) = (requests(&tag, &|_| true), requests("fast", &|_| true));
        println!("{kind:?}: {before} requests before, {after} after");
        assert!(before >= 5 * after, "{kind:?}: {before} before, {after} after");
        // Nobody has to read for the start to come, all of it and nothing else: 3 MiB.
        let alone = requests("fast", &|daemon| daemon.cached_bytes() >= 3 << 20);
        assert_eq!(alone, 3, "{kind:?}: a start that was waited for");
    }
}

#[test]
fn a_trace_is_written_whoever_unmounts_and_refused_where_it_cannot_be() {
    let bench = Bench::new(&[tar(&[("a", &noise(10_000, 1))])]);
    bench.convert(&[], "n");
    let mut daemon = Daemon::start(&[]);
    let trace = daemon.path("trace");
    let options = ["--trace", trace.to_str().unwrap()];
    let place = bench.mount(&daemon, "n", &options);
    std::fs::read(place.join("a")).expect("a file");
    nix::mount::umount(&place).expect("nobody uses it");
    daemon.wait_until("it notices", |_| paths_of(&trace) == ["a"]);
    let place = bench.mount(&daemon, "n", &options);
    assert!(paths_of(&trace).is_empty(), "a new recording");
    std::fs::read(place.join("a")).expect("a file");
    daemon.stop();
    assert_eq!(paths_of(&trace), ["a"], "a daemon that goes down writes what it has");
    nix::mount::umount(&place).expect("nobody uses it");
    daemon.start_again();
    let absent = daemon.path("absent/trace");
    let (image, at) = (bench.image("n"), place.to_string_lossy().into_owned());
    let arguments = ["mount", "--plain-http", "--trace", absent.to_str().unwrap(), &image, &at];
    let output = daemon.run(&arguments);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("absent/trace"));
    assert!(!place.join("a").exists(), "nothing is mounted");
}

fn paths_of(trace: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(trace).expect("it is there");
    let mut paths: Vec<String> = Vec::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let path = line["path"].as_str().expect("a path").trim_start_matches('/');
        if paths.last().is_none_or(|last| last != path) {
            paths.push(path.to_owned());
        }
    }
    paths
}
