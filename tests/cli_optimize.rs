//! `sluice optimize` and `sluice diff`: the start in one blob, and nothing else changed.

mod support;

use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use support::layouts::{document, layout, noise, tar, three_layers, top};
use support::registry::Registry;
use tempfile::TempDir;

struct Bench {
    root: TempDir,
}

/// In the order of time: the end of the large file, the small one, the large one's beginning.
const TRACE: &str = concat!(
    r#"{"path":"/etc/passwd","offset":0,"length":10,"t_ms":2}"#,
    "\n",
    r#"{"path":"/data/large","offset":3145720,"length":8,"t_ms":1}"#,
    "\n",
    r#"{"path":"/data/large","offset":0,"length":1,"t_ms":3.5}"#,
    "\n",
    r#"{"path":"/nowhere","offset":0,"length":1,"t_ms":4}"#,
    "\n",
);

impl Bench {
    fn new() -> Bench {
        let bench = Bench { root: TempDir::new().unwrap() };
        layout(&bench.path("src"), "v1", &three_layers(), &["amd64", "arm64"]);
        fs::write(bench.path("trace"), TRACE).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn oci(&self, name: &str, tag: &str) -> String {
        format!("oci:{}:{tag}", self.path(name).display())
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command.args(arguments).env("HOME", self.root.path()).env("TMPDIR", self.root.path());
        command.env_remove("DOCKER_CONFIG").stdin(Stdio::null());
        command.output().expect("the program runs")
    }

    fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.succeed(&[arguments, &["--json"]].concat())).unwrap()
    }

    fn optimize(&self, image: &str, more: &[&str]) -> Value {
        let trace = self.path("trace");
        let trace = ["optimize", image, "--plain-http", "--trace", trace.to_str().unwrap()];
        self.json(&[&trace, more].concat())
    }
}

fn text(output: &Output) -> String {
    [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat()
}

fn differences(value: &Value) -> [usize; 3] {
    ["added", "removed", "changed"].map(|key| value[key].as_array().unwrap().len())
}

#[test]
fn what_the_start_touched_comes_first_and_the_tree_is_the_same() {
    let bench = Bench::new();
    for kind in ["rafs", "zran"] {
        let directory = bench.path(kind);
        let target = format!("dir:{}", directory.display());
        let arguments = ["convert", "--to", kind, "--platform", "linux/amd64"];
        bench.succeed(&[&arguments[..], &[&bench.oci("src", "v1"), &target]].concat());
        let image = directory.to_str().unwrap();
        let before = bench.path(&format!("{kind}-before"));
        fs::copy(directory.join("image.boot"), &before).unwrap();
        let report = bench.optimize(image, &[]);
        // Of the large file the last and the first chunk; the small file's one between them.
        assert_eq!((&report["chunks"], &report["missed"]), (&3.into(), &1.into()), "{report}");
        let shown = bench.json(&["inspect", image]);
        assert_eq!(shown["blobs"][0]["id"], report["blob"], "it comes first");
        assert_eq!(shown["blobs"][0]["chunks"], 3);
        assert_eq!(shown["prefetch"], serde_json::json!(["/data/large", "/etc/passwd"]));
        bench.succeed(&["check", image]);
        let found = bench.json(&["diff", before.to_str().unwrap(), image]);
        assert_eq!(differences(&found), [0, 0, 0], "{found}");
        assert_eq!(found["undecided"], 0);
        assert_eq!(
            (&found["only_in_a"]["chunks"], &found["only_in_b"]["chunks"]),
            (&0.into(), &0.into())
        );
        let tree = bench.path(&format!("{kind}-tree"));
        bench.succeed(&["unpack", image, tree.to_str().unwrap()]);
        assert!(fs::read(tree.join("data/large")).unwrap() == noise(3 << 20, 1), "{kind}");
        assert_eq!(fs::read(tree.join("etc/passwd")).unwrap(), b"replaced\n");
    }
}

#[test]
fn an_image_in_a_registry_keeps_its_name_or_gets_a_new_one() {
    let bench = Bench::new();
    let registry = Registry::start(&[]);
    let image = |tag: &str| format!("{}/team/app:{tag}", registry.address());
    for kind in ["rafs", "zran"] {
        let arguments = ["convert", "--plain-http", "--to", kind, &bench.oci("src", "v1")];
        bench.succeed(&[&arguments[..], &[&image(kind)]].concat());
        bench.optimize(&image(kind), &["--tag", "fast"]);
        let before = bench.json(&["inspect", "--plain-http", &image(kind)]);
        assert_eq!(before["prefetch"].as_array().unwrap().len(), 0, "{kind}");
        registry.forget();
        bench.optimize(&image(kind), &[]);
        // A second time the blob is there, and so is the manifest; only the name is new.
        let log = registry.log();
        let uploads = log.iter().filter(|entry| entry["method"] == "PATCH").count();
        assert_eq!(uploads, 0, "{log:?}");
        for tag in [kind, "fast"] {
            bench.succeed(&["check", "--plain-http", &image(tag)]);
            let shown = bench.json(&["inspect", "--plain-http", &image(tag)]);
            assert_eq!(shown["prefetch"].as_array().unwrap().len(), 2, "{tag}");
        }
        // Optimising what is optimised leaves the old blob for the start out.
        let once = bench.json(&["inspect", "--plain-http", &image(kind)])["blobs"].clone();
        bench.optimize(&image(kind), &[]);
        let twice = bench.json(&["inspect", "--plain-http", &image(kind)])["blobs"].clone();
        assert_eq!(once, twice, "{kind}");
    }
}

#[test]
fn the_same_trace_again_gives_the_same_image() {
    let bench = Bench::new();
    for kind in ["rafs", "zran"] {
        let (folder, image) = (bench.path(kind), bench.oci(kind, "n"));
        let arguments = ["convert", "--referrer", "--platform", "linux/amd64", "--to", kind];
        bench.succeed(&[&arguments[..], &[&bench.oci("src", "v1"), &image]].concat());
        let before = document(&folder, &top(&folder, "n"));
        let manifests = [1, 2, 3].map(|_| {
            bench.optimize(&image, &[]);
            document(&folder, &top(&folder, "n"))
        });
        let config = |manifest: &Value| document(&folder, &manifest["config"]);
        assert_eq!(manifests[0], manifests[1], "{kind}: {}", config(&manifests[1]));
        assert_eq!(manifests[1], manifests[2], "{kind}");
        assert!(before["subject"].is_object(), "{before}");
        for key in ["subject", "artifactType"] {
            assert_eq!(manifests[0][key], before[key], "{kind}");
        }
    }
}

#[test]
fn a_layout_is_an_image_for_every_command() {
    let bench = Bench::new();
    let mut more = three_layers();
    more.push(tar(&[("etc/passwd", b"again\n"), ("new", b"new"), ("data/.wh.copy", b"")]));
    layout(&bench.path("next"), "v1", &more, &["amd64"]);
    let (one, two) = (bench.oci("dst", "one"), bench.oci("dst", "two"));
    bench.succeed(&["convert", &bench.oci("src", "v1"), &one]);
    bench.succeed(&["convert", &bench.oci("next", "v1"), &two]);
    for image in [&one, &two] {
        bench.succeed(&["check", image]);
    }
    let found = bench.json(&["diff", &one, &two]);
    assert_eq!(found["added"][0]["path"], "/new");
    assert_eq!(found["removed"][0]["path"], "/data/copy");
    let changed = found["changed"].as_array().unwrap();
    let passwd = changed.iter().find(|name| name["path"] == "/etc/passwd").expect("it changed");
    assert!(passwd["differs"].as_array().unwrap().contains(&"content".into()), "{passwd}");
    assert!(found["in_both"]["bytes"].as_u64() > Some(3 << 20), "{found}");
    let shown = bench.succeed(&["diff", &one, &two]);
    assert!(shown.contains("+ /new") && shown.contains("- /data/copy"), "{shown}");
    bench.optimize(&two, &["--tag", "three"]);
    bench.succeed(&["check", &bench.oci("dst", "three")]);
}

#[test]
fn an_image_for_docker_stays_one() {
    let bench = Bench::new();
    bench.succeed(&["convert", "--also-docker", &bench.oci("src", "v1"), &bench.oci("dst", "n")]);
    let (index, trace) = (fs::read(bench.path("dst/index.json")).unwrap(), bench.path("trace"));
    let image = bench.oci("dst", "n-docker");
    let output = bench.run(&["optimize", &image, "--trace", trace.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("the tag that lists its blobs"), "{}", text(&output));
    assert_eq!(fs::read(bench.path("dst/index.json")).unwrap(), index);
}

#[test]
fn a_trace_that_does_not_fit_changes_nothing() {
    let bench = Bench::new();
    let image = bench.oci("dst", "n");
    bench.succeed(&["convert", &bench.oci("src", "v1"), &image]);
    let index = fs::read(bench.path("dst/index.json")).unwrap();
    for (trace, why) in [
        ("", "touches no data"),
        ("{}", "line 1"),
        (r#"{"path":"/nowhere","offset":0,"length":1,"t_ms":0}"#, "touches no data"),
        (r#"{"path":"/etc","offset":0,"length":1,"t_ms":0}"#, "touches no data"),
    ] {
        fs::write(bench.path("trace"), trace).unwrap();
        let path = bench.path("trace");
        let output = bench.run(&["optimize", &image, "--trace", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1), "{trace}");
        assert!(text(&output).contains(why), "{trace}: {}", text(&output));
    }
    assert_eq!(fs::read(bench.path("dst/index.json")).unwrap(), index);
}
