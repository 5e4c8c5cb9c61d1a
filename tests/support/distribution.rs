//! Debian's docker-registry, the reference implementation, as a child that ends with its owner.
//!
//! Its tree lies in a temporary folder. `setpriv` has the kernel end it when this process dies.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use tempfile::TempDir;

pub struct Distribution {
    child: Child,
    address: String,
    root: TempDir,
}

impl Distribution {
    pub fn start() -> Self {
        let root = TempDir::new().expect("a temporary folder can be made");
        let config = root.path().join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: info}}\nhttp: {{addr: '127.0.0.1:0'}}\n\
             storage: {{filesystem: {{rootdirectory: '{}'}}, delete: {{enabled: true}}}}\n",
            root.path().join("data").display()
        );
        std::fs::write(&config, text).expect("a file can be written");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "docker-registry", "serve"]).arg(&config);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("setpriv can be started");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let told = lines.find_map(|line| {
            let line = line.expect("its log can be read");
            let (_, rest) = line.split_once("listening on ")?;
            Some(rest.split('"').next().unwrap_or(rest).to_owned())
        });
        // It logs every request: somebody has to take that away.
        thread::spawn(move || lines.for_each(drop));
        let what = "docker-registry did not start: apt-get install docker-registry";
        let mut started = Distribution { child, address: String::new(), root };
        started.address = told.expect(what);
        started
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn root(&self) -> &Path {
        self.root.path()
    }
}

impl Drop for Distribution {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
