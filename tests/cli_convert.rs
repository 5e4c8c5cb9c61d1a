//! `sluice convert` between places: what comes out, and that nothing half done comes out.
//!
//! The registries are tools/registryd with its faults and journal, and Debian's docker-registry;
//! skopeo and umoci judge what we write. `tools/test` installs them; without them these tests fail.

mod support;

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use support::distribution::Distribution;
use support::layouts::{document, keep, layout, noise, tar, three_layers, top};
use support::registry::Registry;
use tempfile::TempDir;

/// A directory of its own for everything a run touches.
struct Bench {
    root: TempDir,
}

impl Bench {
    /// With the image `src:v1` of three layers in a layout.
    fn new() -> Bench {
        let bench = Bench { root: TempDir::new().unwrap() };
        layout(&bench.path("src"), "v1", &three_layers(), &["amd64"]);
        fs::create_dir(bench.path("tmp")).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn oci(&self, name: &str, tag: &str) -> String {
        format!("oci:{}:{tag}", self.path(name).display())
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command.args(arguments).env("HOME", self.root.path()).env_remove("DOCKER_CONFIG");
        command.env("TMPDIR", self.path("tmp")).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the program runs")
    }

    fn convert(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[&["convert", "--plain-http", "--json"], arguments].concat());
        assert!(output.status.success(), "{}", text(&output));
        serde_json::from_slice(&output.stdout).expect("a report")
    }

    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.run(&[&["convert", "--plain-http"], arguments].concat());
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        text(&output)
    }

    fn check(&self, image: &str) {
        let output = self.run(&["check", "--plain-http", image]);
        assert!(output.status.success(), "{}", text(&output));
    }

    /// Puts the source image into a registry, by a client that is not ours.
    fn push_source(&self, address: &str) -> String {
        let image = format!("{address}/team/app:v1");
        let from = self.oci("src", "v1");
        skopeo(&["copy", "--all", "--dest-tls-verify=false", &from, &format!("docker://{image}")]);
        image
    }

    /// Nothing unfinished is left anywhere.
    fn is_clean(&self) -> bool {
        let find = Command::new("find").arg(self.root.path()).args(["-name", ".sluice-*"]).output();
        find.expect("find runs").stdout.is_empty()
    }
}

fn text(output: &Output) -> String {
    [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat()
}

fn tool(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(name).args(arguments).output();
    let output = output.unwrap_or_else(|_| panic!("apt-get install {name}"));
    assert!(output.status.success(), "{name} {arguments:?}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn skopeo(arguments: &[&str]) -> String {
    tool("skopeo", &[&["--insecure-policy"], arguments].concat())
}

/// What list.py says of a tree, without its root, whose attributes no layer gives.
fn listed(tree: &Path) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/list.py");
    let list = tool("python3", &[script.to_str().unwrap(), tree.to_str().unwrap()]);
    list.lines().filter(|line| !line.starts_with("'.' ")).collect::<Vec<_>>().join("\n")
}

fn journal(registry: &Registry, methods: &[&str]) -> usize {
    let log = registry.log();
    log.iter().filter(|entry| methods.contains(&entry["method"].as_str().unwrap())).count()
}

fn has_tag(registry: &Registry, tag: &str) -> bool {
    let mut client = support::http::Client::connect(registry.address());
    client.get(&format!("/v2/team/app/manifests/{tag}")).unwrap().status == 200
}

#[test]
fn an_image_goes_from_registry_to_registry_and_equals_what_umoci_unpacks() {
    let bench = Bench::new();
    let (registryd, distribution) = (Registry::start(&[]), Distribution::start());
    for address in [registryd.address(), distribution.address()] {
        let source = bench.push_source(address);
        let target = format!("{address}/team/app:v1-sluice");
        for kind in ["rafs", "zran"] {
            bench.convert(&["--to", kind, &source, &target]);
            bench.check(&target);
            let ours = bench.path(&format!("{kind}-{}", address.replace(':', "-")));
            let unpacked = bench.run(&["unpack", "--plain-http", &target, ours.to_str().unwrap()]);
            assert!(unpacked.status.success(), "{}", text(&unpacked));
            let raw = format!("docker://{target}");
            let raw = skopeo(&["inspect", "--tls-verify=false", "--raw", &raw]);
            let raw: Value = serde_json::from_str(&raw).unwrap();
            let last = raw["layers"].as_array().unwrap().last().unwrap();
            assert_eq!(last["annotations"]["containerd.io/snapshot/nydus-bootstrap"], "true");
            let theirs = bench.path("umoci");
            if !theirs.exists() {
                let image = format!("{}:v1", bench.path("src").display());
                tool("umoci", &["unpack", "--image", &image, theirs.to_str().unwrap()]);
            }
            assert_eq!(listed(&ours), listed(&theirs.join("rootfs")), "{kind}");
        }
    }
    assert!(bench.is_clean());
}

#[test]
fn a_second_run_uploads_nothing() {
    let bench = Bench::new();
    let registry = Registry::start(&[]);
    let source = bench.push_source(registry.address());
    let target = format!("{}/team/app:new", registry.address());
    for kind in ["rafs", "zran"] {
        bench.convert(&["--to", kind, "--also-docker", &source, &target]);
        registry.forget();
        let again = bench.convert(&["--to", kind, "--also-docker", &source, &target]);
        assert_eq!(journal(&registry, &["POST", "PATCH", "PUT"]), 0, "{kind}");
        assert_eq!(again["sent"]["blobs"], 0);
        assert!(again["existing"]["blobs"].as_u64() > Some(3), "{again}");
    }
}

#[test]
fn the_configuration_tells_of_the_new_layers_and_keeps_the_rest() {
    let bench = Bench::new();
    let target = bench.path("dst");
    bench.convert(&["--also-docker", &bench.oci("src", "v1"), &bench.oci("dst", "n")]);
    let manifest = document(&target, &top(&target, "n"));
    let config = document(&target, &manifest["config"]);
    assert_eq!(config["config"], json!({ "Env": ["A=b"], "Cmd": ["/bin/true"] }));
    let layers = manifest["layers"].as_array().unwrap();
    assert_eq!(config["rootfs"]["diff_ids"].as_array().unwrap().len(), layers.len());
    let history = config["history"].as_array().unwrap();
    let told = history.iter().filter(|line| line["empty_layer"] != true).count();
    assert_eq!(told, layers.len());
    assert!(history.iter().any(|line| line["created_by"] == "RUN step 1"));
    let docker = document(&target, &top(&target, "n-docker"));
    assert_eq!(docker["layers"].as_array().unwrap().len(), 1);
    assert_eq!(docker["layers"][0]["digest"], layers.last().unwrap()["digest"]);
    // Whoever knows nothing of us unpacks the image for Docker and finds the bootstrap.
    let image = format!("{}:n-docker", target.display());
    let bundle = bench.path("bundle");
    tool("umoci", &["unpack", "--image", &image, bundle.to_str().unwrap()]);
    assert!(bundle.join("rootfs/image/image.boot").is_file());
    skopeo(&["copy", &bench.oci("dst", "n"), &bench.oci("copy", "n")]);
}

#[test]
fn every_place_gives_the_same_image() {
    let bench = Bench::new();
    let (source, archive) = (bench.oci("src", "v1"), bench.path("a.tar"));
    let saved = format!("docker-archive:{}", archive.display());
    skopeo(&["copy", &source, &format!("{saved}:app:v1")]);
    let boot = |name: &str, source: &str| {
        let target = bench.path(name);
        bench.convert(&[source, &format!("dir:{}", target.display())]);
        bench.check(target.to_str().unwrap());
        fs::read(target.join("image.boot")).unwrap()
    };
    let first = boot("one", &source);
    assert!(first == boot("two", &saved));
    let named = format!("{saved}:app:v1");
    assert!(first == boot("three", &named));
    // What we write as an archive is one for Docker, with everything in it.
    let ours = bench.path("ours.tar");
    let ours = ours.to_str().unwrap();
    bench.convert(&[&source, &format!("docker-archive:{ours}:app:n")]);
    let image = skopeo(&["inspect", &format!("docker-archive:{ours}:app:n")]);
    let image: Value = serde_json::from_str(&image).unwrap();
    assert_eq!(image["Layers"].as_array().unwrap().len(), 1);
    let opened = bench.path("opened");
    fs::create_dir(&opened).unwrap();
    tool("tar", &["xf", ours, "-C", opened.to_str().unwrap()]);
    skopeo(&["copy", &bench.oci("opened", "n"), &bench.oci("again", "n")]);
    // A directory is one layer.
    let tree = bench.path("tree");
    let unpacked =
        bench.run(&["unpack", bench.path("one").to_str().unwrap(), tree.to_str().unwrap()]);
    assert!(unpacked.status.success(), "{}", text(&unpacked));
    boot("four", &format!("dir:{}", tree.display()));
    assert!(bench.is_clean());
}

#[test]
fn all_platforms_are_converted_or_the_one_that_is_named() {
    let bench = Bench::new();
    layout(&bench.path("multi"), "v1", &three_layers(), &["amd64", "arm64"]);
    let source = bench.oci("multi", "v1");
    let report = bench.convert(&[&source, &bench.oci("all", "n"), "--also-docker"]);
    assert_eq!(report["images"].as_array().unwrap().len(), 2);
    let all = bench.path("all");
    for tag in ["n", "n-docker"] {
        let index = document(&all, &top(&all, tag));
        let machines: Vec<&Value> = index["manifests"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| &entry["platform"]["architecture"])
            .collect();
        assert_eq!(machines, ["amd64", "arm64"]);
    }
    bench.convert(&["--platform", "linux/arm64", &source, &bench.oci("one", "n")]);
    let one = bench.path("one");
    let manifest = document(&one, &top(&one, "n"));
    assert_eq!(document(&one, &manifest["config"])["architecture"], "arm64");
    let said = bench.refused(&[&source, &format!("dir:{}", bench.path("flat").display())]);
    assert!(said.contains("linux/amd64, linux/arm64"), "{said}");
    let said = bench.refused(&["--platform", "linux/s390x", &source, &bench.oci("x", "n")]);
    assert!(said.contains("linux/s390x"), "{said}");
}

#[test]
fn platforms_are_shown_with_the_variant_only_an_index_knows() {
    let bench = Bench::new();
    let multi = bench.path("multi");
    layout(&multi, "v1", &three_layers(), &["arm", "arm"]);
    let mut list = document(&multi, &top(&multi, "v1"));
    for (entry, variant) in list["manifests"].as_array_mut().unwrap().iter_mut().zip(["v6", "v7"]) {
        entry["platform"]["variant"] = variant.into();
    }
    let media_type = "application/vnd.oci.image.index.v1+json";
    let mut entry = keep(&multi, media_type, list.to_string().as_bytes());
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": "v1" });
    let index = json!({ "schemaVersion": 2, "manifests": [entry] }).to_string();
    fs::write(multi.join("index.json"), index).unwrap();
    let source = bench.oci("multi", "v1");
    let said = bench.refused(&[&source, &format!("dir:{}", bench.path("flat").display())]);
    assert!(said.contains("linux/arm/v6, linux/arm/v7"), "{said}");
    let report = bench.convert(&["--platform", "linux/arm/v7", &source, &bench.oci("one", "n")]);
    assert_eq!(report["images"][0]["platform"], "linux/arm/v7");
}

#[test]
fn a_broken_connection_costs_nothing_and_a_failing_registry_leaves_no_tag() {
    let bench = Bench::new();
    let registry = Registry::start(&[]);
    let (source, target) = (bench.oci("src", "v1"), format!("{}/team/app:n", registry.address()));
    let blob = |effect: Value| json!([{"method": "PATCH", "nth": 2, "effect": effect}]);
    for effect in [json!({"status": 500}), json!({"status": 507}), json!({"cut_body": 0})] {
        registry.fault(blob(effect));
        let said = bench.refused(&[&source, &target]);
        assert!(said.contains("blob sha256:"), "{said}");
        registry.fault(json!([
            {"method": "PUT", "path": "/manifests/", "effect": {"status": 502}}
        ]));
        let said = bench.refused(&[&source, &target]);
        assert!(said.contains("manifest"), "{said}");
        assert!(bench.is_clean() && !has_tag(&registry, "n"));
        let blobs = registry.root().join("blobs/sha256");
        fs::remove_dir_all(&blobs).unwrap();
        fs::create_dir(&blobs).unwrap();
    }
    let main = json!([{"method": "PUT", "path": "/manifests/n", "effect": {"forbidden": true}}]);
    registry.fault(main);
    bench.refused(&["--also-docker=docker", &source, &target]);
    assert!(!has_tag(&registry, "docker"), "the image for Docker comes second");
    registry.fault(json!([{"method": "PATCH", "count": 1, "effect": {"cut_body": 1_000_000}}]));
    bench.convert(&[&source, &target]);
    registry.heal();
    bench.check(&target);
}

#[test]
fn a_layer_that_is_not_what_it_should_be_is_named() {
    let bench = Bench::new();
    let registry = Registry::start(&[]);
    let source = bench.push_source(registry.address());
    let target = format!("{}/team/app:n", registry.address());
    let manifest = document(&bench.path("src"), &top(&bench.path("src"), "v1"));
    let digest = manifest["layers"][0]["digest"].as_str().unwrap().to_owned();
    let hit = |effect: Value| json!([{"blob": digest, "method": "GET", "effect": effect}]);
    for effect in
        [json!({"flip_bit": 1_000_000}), json!({"truncate": 1000}), json!({"status": 404})]
    {
        registry.fault(hit(effect.clone()));
        for kind in ["rafs", "zran"] {
            let said = bench.refused(&["--to", kind, &source, &target]);
            assert!(said.contains(&digest), "{effect}: {said}");
            assert!(bench.is_clean() && !has_tag(&registry, "n"));
        }
    }
    // The same of a layout.
    let path = bench.path("src/blobs/sha256").join(digest.trim_start_matches("sha256:"));
    let mut bytes = fs::read(&path).unwrap();
    bytes.truncate(bytes.len() - 1);
    fs::write(&path, &bytes).unwrap();
    let said = bench.refused(&[&bench.oci("src", "v1"), &target]);
    assert!(said.contains(&digest), "{said}");
}

/// Starts a conversion and waits until it is in the middle of an upload.
fn begin(bench: &Bench, registry: &Registry, source: &str, target: &str) -> Child {
    registry.fault(json!([{"method": "PATCH", "effect": {"latency_ms": 60_000}}]));
    let mut command = bench.command(&["convert", "--plain-http", source, target]);
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while journal(registry, &["PATCH"]) == 0 {
        assert!(std::time::Instant::now() < deadline, "no upload began");
        std::thread::sleep(std::time::Duration::from_millis(20)); // tidy: polling
    }
    child
}

#[test]
fn whatever_ends_a_run_the_next_one_completes_it() {
    let bench = Bench::new();
    let registry = Registry::start(&[]);
    let (source, target) = (bench.oci("src", "v1"), format!("{}/team/app:n", registry.address()));
    for signal in ["INT", "TERM", "KILL"] {
        let mut child = begin(&bench, &registry, &source, &target);
        tool("kill", &[&format!("-{signal}"), &child.id().to_string()]);
        let status = child.wait().unwrap();
        assert!(!status.success() && !has_tag(&registry, "n"), "{signal}");
        assert_eq!(bench.is_clean(), signal != "KILL", "{signal}");
        registry.heal();
        registry.forget();
    }
    bench.convert(&[&source, &target]);
    assert!(bench.is_clean(), "what a killed run left, the next one takes away");
    bench.check(&target);
}

#[test]
fn chunks_of_another_image_are_used_where_its_blobs_can_be_had() {
    let bench = Bench::new();
    let registry = Registry::start(&[]);
    let base = format!("{}/team/base:n", registry.address());
    bench.convert(&[&bench.oci("src", "v1"), &base]);
    let mut layers = three_layers();
    layers.push(tar(&[("more", &noise(100_000, 9))]));
    layout(&bench.path("next"), "v1", &layers, &["amd64"]);
    let target = format!("{}/team/app:n", registry.address());
    let source = bench.oci("next", "v1");
    let report = bench.convert(&["--chunk-dict", &base, &source, &target]);
    assert!(report["sent"]["bytes"].as_u64() < Some(300_000), "{report}");
    bench.check(&target);
    let flat = format!("dir:{}", bench.path("flat").display());
    let said = bench.refused(&["--chunk-dict", &base, &source, &flat]);
    assert!(said.contains("--chunk-dict"), "{said}");
}

#[test]
fn a_new_image_refers_to_the_old_one() {
    let bench = Bench::new();
    let registry = Registry::start(&[]);
    let source = bench.push_source(registry.address());
    let target = format!("{}/team/app:n", registry.address());
    bench.convert(&["--referrer", &source, &target]);
    bench.convert(&["--referrer", "--compressor", "lz4_block", &source, &target]);
    let subject = top(&bench.path("src"), "v1")["digest"].as_str().unwrap().replace(':', "-");
    let mut client = support::http::Client::connect(registry.address());
    let list = client.get(&format!("/v2/team/app/manifests/{subject}")).unwrap().json();
    assert_eq!(list["manifests"].as_array().unwrap().len(), 2, "{list}");
}

#[test]
fn a_list_of_referrers_that_failed_is_written_by_the_next_run() {
    let bench = Bench::new();
    let registry = Registry::start(&[]);
    let source = bench.push_source(registry.address());
    let target = format!("{}/team/app:n", registry.address());
    let subject = top(&bench.path("src"), "v1")["digest"].as_str().unwrap().replace(':', "-");
    registry.fault(json!([{"method": "PUT", "path": &subject, "effect": {"forbidden": true}}]));
    bench.refused(&["--referrer", &source, &target]);
    registry.heal();
    assert!(has_tag(&registry, "n") && !has_tag(&registry, &subject));
    bench.convert(&["--referrer", &source, &target]);
    assert!(has_tag(&registry, &subject));
}

#[test]
fn what_is_not_an_image_or_is_one_already_is_refused() {
    let bench = Bench::new();
    bench.convert(&[&bench.oci("src", "v1"), &bench.oci("dst", "n")]);
    let said = bench.refused(&[&bench.oci("dst", "n"), &bench.oci("x", "n")]);
    assert!(said.contains("lazily loadable already"), "{said}");
    for made in ["dir:folder", "docker-archive:archive.tar", "docker-archive:named.tar:app:n"] {
        let (kind, name) = made.split_once(':').unwrap();
        let made = format!("{kind}:{}", bench.path(name).display());
        bench.convert(&[&bench.oci("src", "v1"), &made]);
        let said = bench.refused(&[&made, &bench.oci("x", "n")]);
        assert!(said.contains("lazily loadable already"), "{said}");
    }
    let said = bench.refused(&[&bench.oci("absent", "n"), &bench.oci("x", "n")]);
    assert!(said.contains("absent"), "{said}");
    let folder = bench.path("odd");
    fs::create_dir_all(folder.join("blobs/sha256")).unwrap();
    let odd = keep(&folder, "application/octet-stream", b"{}");
    let index = json!({ "schemaVersion": 2, "manifests": [odd] }).to_string();
    fs::write(folder.join("index.json"), index).unwrap();
    let said = bench.refused(&[&format!("oci:{}", folder.display()), &bench.oci("x", "n")]);
    assert!(said.contains("manifest"), "{said}");
    assert!(!bench.path("x").join("index.json").exists());
}
