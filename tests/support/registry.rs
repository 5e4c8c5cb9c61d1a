//! A registry of one's own: `tools/registryd` as a child process that ends with its owner.
//!
//! ```ignore
//! let registry = Registry::with_images(&["--auth", "bearer"]);   // `IMAGES`, tag `small`
//! registry.fault(json!([{"blob": "", "effect": {"latency_ms": 20}}]));
//! registry.forget();                                             // empties the journal
//! assert!(registry.log().is_empty());                            // nobody asked for anything
//! ```
//! The child is killed and reaped on drop, and ends by itself when this process is killed: it
//! watches its standard input. The tree lies in a temporary folder that goes the same way.

use super::http::Client;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use tempfile::TempDir;

/// The images of `with_images`: repository names, each with the tag `small`.
pub const IMAGES: [&str; 3] = ["lz4-1m", "zstd-64k", "zran"];

pub struct Registry {
    child: Child,
    /// Its standard input; closing it ends the child.
    input: Option<ChildStdin>,
    started: Value,
    root: TempDir,
}

impl Registry {
    /// Over an empty tree. `options` as on the command line of registryd.
    pub fn start(options: &[&str]) -> Self {
        Self::over(TempDir::new().expect("a temporary folder can be made"), options)
    }

    /// Over a tree that holds the three small test images.
    pub fn with_images(options: &[&str]) -> Self {
        Self::over(image_tree(), options)
    }

    /// Over a tree that the caller has made; it goes away with the registry.
    pub fn over(root: TempDir, options: &[&str]) -> Self {
        let mut child = Command::new(executable())
            .args(["--until-stdin-closes", "--root"])
            .arg(root.path())
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("registryd can be started");
        let mut line = String::new();
        let output = child.stdout.take().expect("its output was asked for");
        BufReader::new(output).read_line(&mut line).expect("its output can be read");
        // Owned before it is judged, so that it is reaped whatever the line says.
        let input = child.stdin.take();
        let mut registry = Registry { child, input, started: Value::Null, root };
        registry.started = serde_json::from_str(&line).expect("registryd says where it listens");
        registry
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> &str {
        self.word("address")
    }

    /// Where redirects lead.
    pub fn storage(&self) -> &str {
        self.word("storage")
    }

    /// The certificate to trust, when it speaks TLS.
    pub fn ca(&self) -> PathBuf {
        self.word("ca").into()
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Its tree; what is changed here is served from then on.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// Puts these rules (`tools/registryd/faults.rs`) in place of the ones before.
    pub fn fault(&self, rules: Value) {
        self.order("PUT", "/_registryd/faults", rules.to_string().as_bytes());
    }

    /// No more faults.
    pub fn heal(&self) {
        self.order("DELETE", "/_registryd/faults", &[]);
    }

    /// Every request since the start or since `forget`, in order (`tools/registryd/journal.rs`).
    pub fn log(&self) -> Vec<Value> {
        let mut log = self.order("GET", "/_registryd/log", &[]);
        match log["requests"].take() {
            Value::Array(requests) => requests,
            other => panic!("the journal is a list, not {other}"),
        }
    }

    /// Those of the log that asked for the bytes of a blob.
    pub fn blob_reads(&self) -> Vec<Value> {
        let mut log = self.log();
        let reads = |entry: &Value| {
            entry["method"] == "GET"
                && entry["path"].as_str().is_some_and(|p| p.contains("/blobs/"))
        };
        log.retain(reads);
        log
    }

    /// Empties the journal.
    pub fn forget(&self) {
        self.order("DELETE", "/_registryd/log", &[]);
    }

    /// Ends the process now: connections break, the port refuses.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// What the child sees when this process is killed.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Waits until the process has ended by itself; says whether it was content.
    pub fn wait(&mut self) -> bool {
        self.child.wait().expect("a child can be waited for").success()
    }

    fn order(&self, method: &str, path: &str, body: &[u8]) -> Value {
        let mut client = Client::connect(self.word("control"));
        let answer = client.request(method, path, &[], body).expect("orders are answered");
        assert!(answer.status < 300, "{method} {path}: {}", String::from_utf8_lossy(&answer.body));
        if answer.body.is_empty() { Value::Null } else { answer.json() }
    }

    fn word(&self, name: &str) -> &str {
        self.started[name].as_str().unwrap_or_else(|| panic!("registryd did not say its {name}"))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A tree with the three small test images.
pub fn image_tree() -> TempDir {
    let root = TempDir::new().expect("a temporary folder can be made");
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    for image in IMAGES {
        let mut load = Command::new(executable());
        load.args(["load", "--repo", image, "--tag", "small", "--root"]).arg(root.path());
        load.arg(fixtures.join(image)).stdout(Stdio::null());
        if image == "zran" {
            load.arg("--also").arg(fixtures.join("source.tar.gz"));
        }
        assert!(load.status().expect("registryd can be started").success(), "load {image}");
    }
    root
}

/// Beside the folder of the test's own executable, where cargo puts examples.
pub fn executable() -> PathBuf {
    let own = std::env::current_exe().expect("a process knows its executable");
    let target = own.ancestors().nth(2).expect("it lies in target/PROFILE/deps");
    let path = target.join("examples/registryd");
    let what = "the registry is not built: cargo build --example registryd";
    assert!(path.is_file(), "{}: {what}", path.display());
    path
}
