//! `sluice optimize` and `sluice diff`: the start in one blob, and nothing else changed.

mod support;

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use support::http::Client;
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

/// The layers of the image for Docker that a descriptor of a layout leads to.
fn docker_layers(folder: &Path, entry: &Value) -> Value {
    let manifest = document(folder, entry);
    let config = document(folder, &manifest["config"]);
    let diff_ids = config["rootfs"]["diff_ids"].as_array().unwrap();
    let history = config["history"].as_array().unwrap();
    let told = history.iter().filter(|line| line["empty_layer"] != true).count();
    assert_eq!((diff_ids.len(), told), (1, 1), "{config}");
    assert_eq!(config["config"]["Cmd"], serde_json::json!(["/bin/true"]));
    manifest["layers"].clone()
}

#[test]
fn the_image_for_docker_is_renewed_with_all_images_of_an_index() {
    let bench = Bench::new();
    let (folder, image) = (bench.path("dst"), bench.oci("dst", "n"));
    // Without one of its own, with one, and with one under another name.
    for (prepare, wanted, tag) in [
        (&[][..], "--also-docker", "n-docker"),
        (&["--also-docker"][..], "--also-docker", "n-docker"),
        (&["--also-docker", "--referrer", "--to", "zran"][..], "--also-docker=d", "d"),
    ] {
        bench.succeed(&[&["convert"], prepare, &[&bench.oci("src", "v1"), &image]].concat());
        let before = (!prepare.is_empty()).then(|| document(&folder, &top(&folder, "n-docker")));
        let report = bench.optimize(&image, &[wanted]);
        let (main, docker) = ["n", tag].map(|tag| document(&folder, &top(&folder, tag))).into();
        for number in [0, 1] {
            let entries = [&main, &docker].map(|index| &index["manifests"][number]);
            let machines = entries.map(|entry| &entry["platform"]["architecture"]);
            assert_eq!(machines[0], machines[1]);
            let image = document(&folder, entries[0]);
            let layers = docker_layers(&folder, entries[1]);
            assert_eq!(layers.as_array().unwrap().len(), 1);
            let last = image["layers"].as_array().unwrap().last().unwrap();
            assert_eq!(&layers[0], last, "the bootstrap of the image, {machines:?}");
            assert_eq!(document(&folder, entries[1])["subject"], image["subject"]);
            if machines[0] == "amd64" {
                assert_eq!(report["manifest"], entries[0]["digest"]);
                assert_eq!(report["docker_manifest"], entries[1]["digest"]);
            } else if let Some(before) = before.as_ref().filter(|_| !prepare.contains(&"zran")) {
                // What was not optimised is what convert made.
                assert_eq!(entries[1], &before["manifests"][number]);
            }
        }
        assert!(report["docker_left_behind"].is_null(), "{report}");
        // The same once more is the same.
        let names = fs::read(folder.join("index.json")).unwrap();
        bench.optimize(&image, &[wanted]);
        let (now, was) = (top(&folder, tag), serde_json::from_slice::<Value>(&names).unwrap());
        assert!(was["manifests"].as_array().unwrap().contains(&now), "{now}");
    }
}

#[test]
fn an_image_for_docker_that_is_left_behind_is_told_of() {
    let bench = Bench::new();
    let image = bench.oci("dst", "n");
    let source = bench.oci("src", "v1");
    bench.succeed(&["convert", "--platform", "linux/amd64", "--also-docker", &source, &image]);
    let folder = bench.path("dst");
    let before = top(&folder, "n-docker");
    let report = bench.optimize(&image, &["--tag", "fast"]);
    assert!(report["docker_left_behind"].is_null(), "that of another tag: {report}");
    let report = bench.optimize(&image, &[]);
    assert_eq!(report["docker_left_behind"], "n-docker", "{report}");
    assert_eq!(top(&folder, "n-docker"), before, "it is as it was");
    let trace = bench.path("trace");
    let said = bench.succeed(&["optimize", &image, "--trace", trace.to_str().unwrap()]);
    assert!(said.contains("n-docker stays as it is") && said.contains("--also-docker"), "{said}");
    let report = bench.optimize(&image, &["--also-docker"]);
    assert!(report["docker_left_behind"].is_null(), "{report}");
    let report = bench.optimize(&image, &[]);
    assert!(report["docker_left_behind"].is_null(), "it has this start already: {report}");
    // What is no image for Docker is nobody's business.
    let other = bench.oci("dst", "m");
    bench.succeed(&["convert", "--platform", "linux/amd64", &source, &other]);
    bench.succeed(&[
        "convert",
        "--platform",
        "linux/amd64",
        &source,
        &bench.oci("dst", "m-docker"),
    ]);
    let report = bench.optimize(&other, &[]);
    assert!(report["docker_left_behind"].is_null(), "{report}");
}

#[test]
fn an_image_for_docker_gets_its_tag_after_the_image_in_a_registry_as_well() {
    let bench = Bench::new();
    let registry = Registry::start(&[]);
    let image = format!("{}/team/app:n", registry.address());
    let there = |tag: &str| {
        let mut client = Client::connect(registry.address());
        let path = format!("/v2/team/app/manifests/{tag}");
        let answer = client.get(&path).unwrap();
        (answer.status, serde_json::from_slice::<Value>(&answer.body).unwrap_or_default())
    };
    bench.succeed(&["convert", "--plain-http", "--also-docker", &bench.oci("src", "v1"), &image]);
    let before = ["n", "n-docker"].map(there);
    let report = bench.optimize(&image, &["--tag", "x"]);
    assert!(report["docker_left_behind"].is_null(), "{report}");
    let trace = bench.path("trace");
    let trace = ["optimize", &image, "--plain-http", "--trace", trace.to_str().unwrap()];
    let refused = |more: &[&str]| {
        let output = bench.run(&[&trace, more].concat());
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    };
    let forbid = |tag: &str| {
        let path = format!("/manifests/{tag}");
        let effect = serde_json::json!({ "forbidden": true });
        registry.fault(serde_json::json!([{ "method": "PUT", "path": path, "effect": effect }]));
    };
    forbid("n");
    refused(&["--also-docker"]);
    refused(&["--also-docker=d"]);
    assert_eq!((["n", "n-docker"].map(there), there("d").0), (before.clone(), 404));
    forbid("d");
    refused(&["--also-docker=d"]);
    assert_ne!(there("n"), before[0], "the image itself is there");
    registry.heal();
    let report = bench.optimize(&image, &[]);
    assert_eq!(report["docker_left_behind"], "n-docker");
    let report = bench.optimize(&image, &["--also-docker"]);
    let (_, index) = there("n-docker");
    let digests: Vec<&Value> =
        index["manifests"].as_array().unwrap().iter().map(|entry| &entry["digest"]).collect();
    assert!(digests.contains(&&report["docker_manifest"]), "{index}");
    let shown = bench.json(&["inspect", "--plain-http", &format!("{image}-docker")]);
    assert_eq!(shown["blobs"][0]["id"], report["blob"], "what Docker gets has the start in front");
    // No run of them leaves anything behind.
    let left = fs::read_dir(bench.root.path()).unwrap();
    let left = left.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(!left.into_iter().any(|name| name.starts_with(".sluice-")));
}

#[test]
fn a_tag_for_docker_that_makes_no_sense_ends_with_2() {
    let bench = Bench::new();
    let (image, directory) = (bench.oci("dst", "n"), bench.path("flat"));
    bench.succeed(&["convert", &bench.oci("src", "v1"), &image]);
    let flat = format!("dir:{}", directory.display());
    bench.succeed(&["convert", "--platform", "linux/amd64", &bench.oci("src", "v1"), &flat]);
    let (index, trace) = (fs::read(bench.path("dst/index.json")).unwrap(), bench.path("trace"));
    for (image, wanted) in [
        (&image[..], "--also-docker=n"),
        (&image[..], "--also-docker=a b"),
        (directory.to_str().unwrap(), "--also-docker"),
    ] {
        let output = bench.run(&["optimize", image, "--trace", trace.to_str().unwrap(), wanted]);
        assert_eq!(output.status.code(), Some(2), "{wanted}: {}", text(&output));
    }
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
