//! The program as a user runs it: exit codes, what is said where, what a broken image is called.
//!
//! Needs no root, no device and no network; everything happens in a temporary directory.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::program::{sluice, stderr, stdout};

const LZ4_BLOB: &str = "87e1f1ab466391410c6662b5a67d7ff6f1197a91e65e6bc184001eb2dde6bd0a";
const ONE_IMAGE: &str = r#"[{"id":"demo","domain_id":"demo","blobs":[{"id":"b","size":4096}]}]"#;
const TAR_GZ_BLOB: &str = "08807168adada4826de984acf3d96f1607a78af98ff1d1f6ccde6da1f38a9a17";

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)
}

/// A private copy of an image: its bootstrap's path and the directory of its blobs.
fn copy(image: &str) -> (tempfile::TempDir, String, String) {
    let directory = tempfile::tempdir().expect("a directory");
    for entry in fs::read_dir(fixture(image)).expect("a fixture") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), directory.path().join(entry.file_name())).expect("copied");
    }
    if image == "zran" {
        let blob = directory.path().join(TAR_GZ_BLOB);
        fs::copy(fixture("source.tar.gz"), blob).expect("copied");
    }
    let path = directory.path().to_str().expect("text").to_owned();
    (directory, format!("{path}/image.boot"), path)
}

fn flip(path: &str, offset: usize) {
    let mut bytes = fs::read(path).expect("readable");
    bytes[offset] ^= 1;
    fs::write(path, bytes).expect("written");
}

/// Answers connections at a fresh socket, each with the next of `answers` (an empty one is a 204,
/// one that is not JSON a 500), and gives back what was asked.
fn daemon(
    answers: &'static [&'static str],
) -> (tempfile::TempDir, String, std::thread::JoinHandle<Vec<String>>) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("api.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    let serve = move |answer: &&str| {
        let (mut stream, _) = listener.accept().expect("a caller");
        let mut request = vec![0; 64 * 1024];
        let count = stream.read(&mut request).expect("a request");
        let code = match answer.as_bytes().first() {
            None => "204",
            Some(b'{' | b'[') => "200",
            Some(_) => "500",
        };
        let head = format!("HTTP/1.1 {code} \r\nContent-Length: {}\r\n\r\n", answer.len());
        stream.write_all(head.as_bytes()).expect("sent");
        stream.write_all(answer.as_bytes()).expect("sent");
        String::from_utf8_lossy(&request[..count]).into_owned()
    };
    let thread = std::thread::spawn(move || answers.iter().map(serve).collect());
    (directory, path.to_str().expect("text").to_owned(), thread)
}

#[test]
fn every_fixture_is_good() {
    for image in ["lz4-1m", "zstd-64k", "zran"] {
        let (_directory, bootstrap, blobs) = copy(image);
        let output = sluice(&["check", &bootstrap, "--blobs", &blobs]);
        assert_eq!(
            output.status.code(),
            Some(0),
            "{image}: {}{}",
            stdout(&output),
            stderr(&output)
        );
        assert!(stdout(&output).contains("structure  ok: 387 names"), "{}", stdout(&output));
        assert!(stdout(&output).contains("  ok: "), "{}", stdout(&output));
    }
}

#[test]
fn a_flipped_bit_is_named_with_blob_chunk_and_files() {
    for (image, blob) in [("lz4-1m", LZ4_BLOB), ("zran", TAR_GZ_BLOB)] {
        let (_directory, bootstrap, blobs) = copy(image);
        flip(&format!("{blobs}/{blob}"), 300_000);
        let output = sluice(&["check", &bootstrap, "--blobs", &blobs]);
        let text = stdout(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(&format!("blob {blob}  BAD: ")), "{text}");
        assert!(text.contains(&format!("image.boot, blob {blob}, chunk ")), "{text}");
        assert!(text.contains("    used by /"), "{text}");
    }
}

#[test]
fn only_the_chunk_with_the_flipped_bit_is_bad() {
    let (_directory, bootstrap, blobs) = copy("lz4-1m");
    flip(&format!("{blobs}/{LZ4_BLOB}"), 5);
    let output = sluice(&["check", "--json", &bootstrap, "--blobs", &blobs]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["ok"], false);
    let blob = &report["blobs"][0];
    assert_eq!((&blob["bad_chunks"], &blob["good_chunks"]), (&1.into(), &330.into()), "{report}");
    assert_eq!(blob["bad"][0]["chunk"], 0);
    assert!(blob["bad"][0]["file_count"].as_u64() >= Some(1), "{report}");
}

#[test]
fn a_blob_cut_short_loses_its_tail_and_keeps_its_front() {
    // The context table stands behind the data: without it nothing of the blob is believed.
    let (_directory, bootstrap, blobs) = copy("lz4-1m");
    let path = format!("{blobs}/{LZ4_BLOB}");
    let whole = fs::read(&path).expect("readable");
    fs::write(&path, &whole[..whole.len() - 1]).expect("written");
    let output = sluice(&["check", &bootstrap, "--blobs", &blobs]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("it is cut short"), "{}", stdout(&output));
    // A tar.gz has its table elsewhere: what is left of it is still good.
    let (_directory, bootstrap, blobs) = copy("zran");
    let path = format!("{blobs}/{TAR_GZ_BLOB}");
    let whole = fs::read(&path).expect("readable");
    fs::write(&path, &whole[..whole.len() / 2]).expect("written");
    let output = sluice(&["check", "--json", &bootstrap, "--blobs", &blobs]);
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let blob = &report["blobs"][0];
    assert!(blob["good_chunks"].as_u64() > Some(0), "{report}");
    assert!(blob["bad_chunks"].as_u64() > Some(0), "{report}");
    assert!(report.to_string().contains("it is cut short"), "{report}");
}

#[test]
fn a_missing_blob_is_named_and_not_called_good() {
    let (_directory, bootstrap, blobs) = copy("zstd-64k");
    let empty = format!("{blobs}/empty");
    fs::create_dir(&empty).expect("made");
    let output = sluice(&["check", &bootstrap, "--blobs", &empty]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("nothing verified: there is no blob"), "{}", stdout(&output));
}

#[test]
fn a_bootstrap_cut_short_or_damaged_is_an_error_with_its_name() {
    let (_directory, bootstrap, _) = copy("lz4-1m");
    let whole = fs::read(&bootstrap).expect("readable");
    for size in [0, 100, 4096, whole.len() - 4096] {
        fs::write(&bootstrap, &whole[..size]).expect("written");
        for command in ["check", "inspect"] {
            let output = sluice(&[command, &bootstrap]);
            assert_eq!(output.status.code(), Some(1), "{command} of {size} bytes");
            assert!(stderr(&output).starts_with("sluice: "), "{}", stderr(&output));
            assert!(stderr(&output).contains(&bootstrap), "{}", stderr(&output));
        }
    }
}

#[test]
fn inspect_agrees_in_both_forms_and_lists_the_tree() {
    let (_directory, bootstrap, _) = copy("zran");
    let text = stdout(&sluice(&["inspect", &bootstrap]));
    assert!(text.contains("zran") && text.contains(TAR_GZ_BLOB), "{text}");
    let output = sluice(&["inspect", "--json", &bootstrap]);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(value["blobs"][0]["id"], TAR_GZ_BLOB);
    assert_eq!(value["files"]["directory"], 51);
    let all = stdout(&sluice(&["inspect", "--files", &bootstrap]));
    assert_eq!(all.lines().count(), 387);
    let part = stdout(&sluice(&["inspect", "--tree", "/sizes", &bootstrap]));
    assert!(
        part.lines().count() > 1 && part.lines().all(|line| line.contains(" /sizes")),
        "{part}"
    );
    let absent = sluice(&["inspect", "--tree", "/no/such", &bootstrap]);
    assert_eq!(absent.status.code(), Some(1));
}

#[test]
fn a_reader_that_hangs_up_is_no_error() {
    let (_directory, bootstrap, _) = copy("lz4-1m");
    let mut child = Command::new(env!("CARGO_BIN_EXE_sluice"))
        .args(["inspect", "--files", "--json", &bootstrap])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(stderr(&output), "");
}

#[test]
fn misuse_exits_with_2_and_shows_the_usage() {
    for arguments in [
        &["frobnicate"][..],
        &["mount"],
        &["check"],
        &["mount", "--registry", "http://127.0.0.1:1", "a", "b"],
        &["check", "x", "--registry", "http://127.0.0.1:1", "--repo", "r", "--blobs", "/"],
        &["daemon", "--cat-flap"],
    ] {
        let output = sluice(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(stderr(&output).contains("Usage: "), "{arguments:?}: {}", stderr(&output));
    }
}

#[test]
fn every_command_explains_itself() {
    for command in ["daemon", "mount", "umount", "images", "stat", "inspect", "check", "doctor"] {
        let output = sluice(&[command, "--help"]);
        assert_eq!(output.status.code(), Some(0), "{command}");
        assert!(stdout(&output).contains("Example"), "{command}");
    }
    let version = sluice(&["version"]);
    assert_eq!(stdout(&version), concat!("sluice ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn impossible_cores_are_refused_before_anything_starts() {
    let directory = tempfile::tempdir().expect("a directory");
    let cache = directory.path().join("cache");
    let cache = cache.to_str().expect("text");
    let output = sluice(&["daemon", "--fscache", cache, "--cores", "4095"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("--cores 4095"), "{}", stderr(&output));
    assert!(!Path::new(cache).exists());
}

#[test]
fn a_daemon_that_is_not_there_is_said_with_what_to_do() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("api.sock");
    let socket = socket.to_str().expect("text");
    for arguments in [
        &["images", "--apisock", socket][..],
        &["stat", "--apisock", socket],
        &["mount", "--apisock", socket, "127.0.0.1:1/app", "/"],
    ] {
        let output = sluice(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let text = stderr(&output);
        assert!(text.contains(socket) && text.contains("sluice daemon"), "{text}");
    }
}

#[test]
fn images_and_stat_show_what_the_daemon_answers() {
    let (_directory, socket, thread) = daemon(&[ONE_IMAGE]);
    let output = sluice(&["images", "--apisock", &socket]);
    assert!(stdout(&output).contains("demo  demo"), "{}", stdout(&output));
    assert!(thread.join().expect("asked")[0].starts_with("GET /api/sluice/v1/images "));
    let (_directory, socket, thread) = daemon(&[r#"{"upcalls":3,"read":{"p50_ns":1500}}"#]);
    let output = sluice(&["stat", "--apisock", &socket]);
    assert!(stdout(&output).contains("1.5 us"), "{}", stdout(&output));
    assert!(thread.join().expect("asked")[0].starts_with("GET /api/sluice/v1/stat "));
}

#[test]
fn a_mount_is_asked_for_with_all_that_the_daemon_needs() {
    let (_image, bootstrap, blobs) = copy("lz4-1m");
    let (directory, socket, thread) = daemon(&[r#"{"state":"RUNNING"}"#, "the door is stuck"]);
    let place = |name: &str| directory.path().join(name).to_str().expect("text").to_owned();
    let (mountpoint, state) = (place("mnt"), place("state"));
    fs::create_dir(&mountpoint).expect("made");
    let mut arguments = vec!["mount", "--bootstrap", &bootstrap, "--blobs", &blobs];
    arguments.extend(["--state-dir", &state, "--id", "an-image", "--apisock", &socket]);
    arguments.push(&mountpoint);
    let output = sluice(&arguments);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("the door is stuck"), "{}", stderr(&output));
    let asked = thread.join().expect("asked twice");
    assert!(asked[0].starts_with("GET /api/v1/daemon "), "{asked:?}");
    assert!(asked[1].starts_with("PUT /api/sluice/v1/mounts "), "{asked:?}");
    let (_, body) = asked[1].split_once("\r\n\r\n").expect("a body");
    let wish: serde_json::Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(wish["mountpoint"], mountpoint.as_str());
    let entry = &wish["entry"];
    assert_eq!((&entry["id"], &entry["domain_id"]), (&"an-image".into(), &"an-image".into()));
    let stored = entry["config"]["metadata_path"].as_str().expect("a path");
    assert_eq!(fs::read(stored).expect("stored"), fs::read(&bootstrap).expect("there"));
}

#[test]
fn a_mount_without_a_place_for_it_asks_nobody() {
    let (_image, bootstrap, blobs) = copy("lz4-1m");
    for (mountpoint, text) in [("/nonexistent/x", "make it first"), ("/proc/version", "directory")]
    {
        let output = sluice(&[
            "mount",
            "--bootstrap",
            &bootstrap,
            "--blobs",
            &blobs,
            "--apisock",
            "/nonexistent",
            mountpoint,
        ]);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(text), "{}", stderr(&output));
    }
}

#[test]
fn doctor_is_json_that_agrees_with_its_exit_code() {
    let output = sluice(&["doctor", "--json", "--apisock", "/nonexistent/api.sock"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let code = if report["ok"] == true { 0 } else { 1 };
    assert_eq!(output.status.code(), Some(code));
    let checks = report["checks"].as_array().expect("a list");
    let failed = checks.iter().filter(|check| check["level"] == "fail").count();
    assert_eq!(report["ok"] == true, failed == 0);
}

#[test]
fn umount_touches_only_images() {
    let output = sluice(&["umount", "/proc"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("no lazily loaded image"), "{}", stderr(&output));
}

#[test]
fn the_name_nydusd_takes_nydusds_options() {
    let output = Command::new(env!("CARGO_BIN_EXE_sluice"))
        .arg0("/usr/local/bin/nydusd")
        .args(["singleton", "--no-such-option"])
        .output()
        .expect("the program runs");
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("--no-such-option"), "{}", stderr(&output));
    let help = sluice(&["singleton", "--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(stdout(&help).contains("--fscache-threads"), "{}", stdout(&help));
    let absent = sluice(&["singleton", "-A", "/nonexistent/a.sock", "--fscache", "/nonexistent/b"]);
    assert_eq!(absent.status.code(), Some(2));
    assert!(stderr(&absent).contains("/nonexistent/b"), "{}", stderr(&absent));
}
