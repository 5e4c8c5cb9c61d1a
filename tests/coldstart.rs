//! The measuring itself: coldstart, origin and the emulated device, with our daemon as it is
//! shipped. That every byte is right is part of each measurement.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};

use serde_json::Value;

/// What a page may need: the two chunks it lies in.
const ANSWER_MAX_BYTES: u64 = 2 * (64 << 10);

/// The small image of tests/fixtures: 64 KiB chunks, zstd.
fn image() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/zstd-64k")
}

fn example(name: &str) -> Command {
    let built = Path::new(env!("CARGO_BIN_EXE_sluice")).with_file_name("examples").join(name);
    assert!(built.exists(), "{}: `cargo build --examples` makes it", built.display());
    Command::new(built)
}

/// tools/origin over the image; ends with this value.
struct Origin {
    child: Child,
    stdin: Option<ChildStdin>,
    address: String,
}

impl Origin {
    fn start(profile: &[&str]) -> Origin {
        let mut command = example("origin");
        command.arg("--root").arg(image()).arg("--until-stdin-closes").args(profile);
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = spawned.expect("origin starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped above");
        BufReader::new(stdout).read_line(&mut line).expect("its first line");
        let line: Value = serde_json::from_str(&line).expect("JSON");
        let address = line["address"].as_str().expect("an address").to_owned();
        let stdin = child.stdin.take();
        Origin { child, stdin, address }
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        drop(self.stdin.take());
        self.child.wait().expect("it ends with its standard input");
    }
}

/// A run of coldstart and the JSON it wrote.
fn run(target: &str, origin: &Origin, options: &[&str], daemon: &[&str]) -> (Output, Value) {
    run_with(&image(), target, origin, options, daemon)
}

fn run_with(
    image: &Path,
    target: &str,
    origin: &Origin,
    options: &[&str],
    daemon: &[&str],
) -> (Output, Value) {
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let json = work.path().join("run.json");
    let mut command = example("coldstart");
    command.args([target, "--origin", &origin.address]).arg("--image").arg(image);
    command.arg("--work").arg(work.path()).arg("--json").arg(&json).args(options);
    if !daemon.is_empty() {
        command.arg("--").args(daemon);
    }
    let output = command.output().expect("coldstart starts");
    let document = std::fs::read(&json).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let left = std::fs::read_dir(work.path()).expect("the folder").count();
    assert!(left <= 1, "coldstart leaves nothing but its JSON");
    (output, document.unwrap_or_default())
}

fn sluice() -> [&'static str; 11] {
    [
        env!("CARGO_BIN_EXE_sluice"),
        "daemon",
        "--fscache",
        "{cache}",
        "--state-dir",
        "{state}",
        "--apisock",
        "{socket}",
        "--rlimit-nofile",
        "0",
        "--log-level=warn",
    ]
}

fn measure(target: &str, origin: &Origin, options: &[&str]) -> Value {
    let ours = sluice();
    let daemon: &[&str] = if target == "blob" { &ours } else { &[] };
    let (output, document) = run(target, origin, options, daemon);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert_eq!(document["refused"], 0, "{document}");
    document
}

#[test]
fn cold_reads_of_a_daemon_are_right_and_counted() {
    let origin = Origin::start(&[]);
    let options = ["--slot-kib", "64", "--readers", "3", "--verify"];
    let random = measure("blob", &origin, &options);
    let count = |run: &Value, key: &str| run[key].as_u64().expect("a number");
    assert!(count(&random, "verified_bytes") > 0);
    // Chunks do not begin where slots do: two slots may share one.
    assert!(count(&random, "misses") > count(&random, "operations") / 2);
    assert_eq!(random["upcalls"], random["misses"]);
    assert_eq!(random["asked_bytes"], 4096 * count(&random, "operations"));

    let all = ["--order", "sequential", "--block-kib", "128", "--verify"];
    let whole = measure("blob", &origin, &all);
    assert_eq!(whole["asked_bytes"], whole["size_bytes"]);
    assert_eq!(whole["filled_bytes"], whole["size_bytes"]);
    assert_eq!(whole["verified_bytes"], whole["size_bytes"]);
    assert!(whole["cpu_s"].as_f64().expect("processor time") > 0.0);
}

#[test]
fn the_floor_fetches_what_a_daemon_fetches_and_no_more() {
    let origin = Origin::start(&[]);
    let options = ["--slot-kib", "64"];
    let floor = measure("floor", &origin, &options);
    let ours = measure("blob", &origin, &options);
    let more = |key: &str| {
        let count = |run: &Value| run["origin"][key].as_u64().expect("a counter");
        count(&ours).checked_sub(count(&floor)).expect("ours fetches what the floor does")
    };
    // Dialling ahead, each connection asks for a byte, to learn where the blob is; a request is
    // counted when it comes, its byte when it has gone. An answer that is late on a busy machine
    // is asked for again, and may come twice.
    let repeated = ours["daemon"]["counters"]["requests_repeated"].as_u64().expect("a counter");
    let twice = repeated * ANSWER_MAX_BYTES;
    assert!(
        more("requests") <= 128 && more("bytes") <= more("requests") + twice,
        "{repeated} repeated, {} and {}",
        floor["origin"],
        ours["origin"]
    );
    assert_eq!(floor["filled_bytes"], ours["filled_bytes"]);
}

#[test]
fn lateness_counts_at_a_fixed_rate() {
    let origin = Origin::start(&["--first-byte-ms", "40"]);
    let options = ["--slot-kib", "64", "--limit", "10"];
    let closed = measure("floor", &origin, &options);
    let open = measure("floor", &origin, &[&options[..], &["--rate", "100"]].concat());
    let slowest = |run: &Value| run["latency_us"]["max"].as_f64().expect("a latency") / 1000.0;
    // Ten reads of 40 ms that were due every 10 ms: the last one ends 400 ms after the first was
    // due, 310 ms after it was due itself.
    assert!(slowest(&closed) >= 40.0, "{}", closed["latency_us"]);
    assert!(slowest(&open) >= 300.0, "{}", open["latency_us"]);
}

#[test]
fn trouble_at_the_origin_is_measured_not_hidden() {
    let origin = Origin::start(&["--fail-percent", "100"]);
    let (output, _) = run("floor", &origin, &["--slot-kib", "64"], &[]);
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("503"), "{said}");
}

#[test]
fn a_cache_that_differs_from_the_image_is_found() {
    let (origin, other) = (Origin::start(&[]), tempfile::tempdir().expect("a folder"));
    for entry in std::fs::read_dir(image()).expect("the image") {
        let path = entry.expect("a file of it").path();
        let mut bytes = std::fs::read(&path).expect("its bytes");
        let name = path.file_name().expect("it has one");
        if name != "image.boot" {
            // In the middle of the blob, thus in the middle of a chunk.
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        }
        std::fs::write(other.path().join(name), bytes).expect("written");
    }
    let options = ["--order", "sequential", "--verify"];
    let (output, _) = run_with(other.path(), "blob", &origin, &options, &sluice());
    assert!(!output.status.success());
}

#[test]
fn a_daemon_that_does_not_serve_is_an_error_that_says_so() {
    let origin = Origin::start(&[]);
    let missing = run("blob", &origin, &[], &["/nonexistent/daemon"]).0;
    assert!(!missing.status.success());
    assert!(String::from_utf8_lossy(&missing.stderr).contains("/nonexistent/daemon"));
}

#[test]
fn plots_are_made_from_runs() {
    let origin = Origin::start(&[]);
    let folder = tempfile::tempdir().expect("a folder");
    let (json, page) = (folder.path().join("a.json"), folder.path().join("a.html"));
    let document = measure("floor", &origin, &["--slot-kib", "64", "--name", "a <floor>"]);
    std::fs::write(&json, document.to_string()).expect("written");
    let status = example("coldstart").arg("page").arg("--out").arg(&page).arg(&json).status();
    assert!(status.expect("coldstart starts").success());
    let html = std::fs::read_to_string(&page).expect("the page");
    assert!(html.contains("a &lt;floor&gt;") && !html.contains("<floor>"));
    assert!(html.contains("<polyline") && html.contains("<circle") && html.contains("<rect"));
    assert!(!html.contains("NaN") && !html.contains("inf"));
}
