//! The commands that read a registry, against the loopback one with faults on command.
//!
//! The registry is `tools/registryd`, built as an example; it dies with its standard input, so
//! nothing is left behind however a test ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

const ZSTD_BLOB: &str = "4d37c03fbeb86c36069fa172dbc78997d7432339a2d01f9fb3b9a51e497ac06d";

struct Registry {
    child: Child,
    address: String,
    control: String,
    root: tempfile::TempDir,
}

/// `cargo test` builds examples; `cargo test --test cli_registry` alone does not.
fn registryd() -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_sluice"));
    let path = program.with_file_name("examples").join("registryd");
    if !path.exists() {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--example", "registryd", "--target-dir"]);
        cargo.arg(program.ancestors().nth(2).expect("a target directory"));
        assert!(cargo.status().expect("cargo runs").success());
    }
    path
}

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)
}

impl Registry {
    fn start(images: &[&str]) -> Registry {
        let root = tempfile::tempdir().expect("a directory");
        for image in images {
            let mut load = Command::new(registryd());
            load.arg("load").arg("--root").arg(root.path());
            load.args(["--repo", &format!("team/{image}"), "--tag", "small"]).arg(fixture(image));
            if *image == "zran" {
                load.arg("--also").arg(fixture("source.tar.gz"));
            }
            assert!(load.stdout(Stdio::null()).status().expect("it runs").success());
        }
        let mut serve = Command::new(registryd());
        serve.arg("--root").arg(root.path()).arg("--until-stdin-closes");
        let mut child =
            serve.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it runs");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        let places: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        let place = |key: &str| {
            let text = places[key].as_str().expect("an address");
            text.trim_start_matches("http://").to_owned()
        };
        Registry { address: place("address"), control: place("control"), child, root }
    }

    /// Replaces the faults.
    fn order(&self, rules: &str) {
        let mut stream = TcpStream::connect(&self.control).expect("it listens");
        let size = rules.len();
        write!(
            stream,
            "PUT /_registryd/faults HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
             Content-Length: {size}\r\n\r\n{rules}"
        )
        .expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 2"), "{answer}");
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Without anybody's credentials.
fn sluice(arguments: &[&str], home: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sluice"))
        .args(arguments)
        .env("HOME", home)
        .env_remove("DOCKER_CONFIG")
        .stdin(Stdio::null())
        .output()
        .expect("the program runs")
}

fn text(output: &Output) -> String {
    [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat()
}

#[test]
fn images_of_a_registry_are_inspected_and_checked_by_name() {
    let images = ["lz4-1m", "zstd-64k", "zran"];
    let registry = Registry::start(&images);
    for image in images {
        let name = format!("{}/team/{image}:small", registry.address);
        let shown = sluice(&["inspect", "--plain-http", &name, "--json"], registry.root.path());
        let value: serde_json::Value = serde_json::from_slice(&shown.stdout).expect("JSON");
        assert_eq!(value["inodes"], 387, "{image}");
        let checked = sluice(&["check", "--plain-http", &name], registry.root.path());
        assert_eq!(checked.status.code(), Some(0), "{}", text(&checked));
        assert!(text(&checked).contains("structure  ok: 387 names"), "{}", text(&checked));
    }
}

#[test]
fn a_bootstrap_on_disk_is_checked_against_a_registry() {
    let registry = Registry::start(&["zstd-64k"]);
    let bootstrap = fixture("zstd-64k/image.boot");
    let bootstrap = bootstrap.to_str().expect("text");
    let url = format!("http://{}", registry.address);
    let arguments = ["check", bootstrap, "--registry", &url, "--repo", "team/zstd-64k"];
    let checked = sluice(&arguments, registry.root.path());
    assert_eq!(checked.status.code(), Some(0), "{}", text(&checked));
    let blobs = registry.root.path().join("blobs/sha256");
    std::fs::remove_file(blobs.join(ZSTD_BLOB)).expect("it was there");
    let absent = sluice(&arguments, registry.root.path());
    assert_eq!(absent.status.code(), Some(1), "{}", text(&absent));
    assert!(text(&absent).contains("nothing verified"), "{}", text(&absent));
}

#[test]
fn a_bit_flipped_on_the_way_is_found_and_named() {
    let registry = Registry::start(&["lz4-1m"]);
    registry.order(r#"[{"blob": "87e1", "effect": {"flip_bit": 4096}}]"#);
    let name = format!("{}/team/lz4-1m:small", registry.address);
    let checked = sluice(&["check", "--plain-http", &name], registry.root.path());
    assert_eq!(checked.status.code(), Some(1), "{}", text(&checked));
    assert!(text(&checked).contains("BAD"), "{}", text(&checked));
}

#[test]
fn what_is_not_there_or_not_lazy_is_said_plainly() {
    let registry = Registry::start(&["lz4-1m"]);
    let name = format!("{}/team/lz4-1m:absent", registry.address);
    let output = sluice(&["inspect", "--plain-http", &name], registry.root.path());
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains(&name), "{}", text(&output));
}
