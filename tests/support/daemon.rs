//! The real daemon on the running kernel: the built program, its cache on a real file system, its
//! mounts. Whatever happens to the test, nothing is mounted and no process is left.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice::upcall::mountinfo;
use tempfile::TempDir;

use super::truth::folder;

/// How long anything may take that is expected to happen. Without optimisation, on two busy cores,
/// a thousand images took 31 to 73 s to come back.
const PATIENCE: Duration = Duration::from_secs(180);

pub struct Daemon {
    /// Everything of the daemon's: its cache, state, socket, log and mountpoints.
    pub home: TempDir,
    child: Option<Child>,
    options: Vec<String>,
    /// How often it was upgraded beside its predecessor.
    generation: u32,
}

impl Daemon {
    /// A daemon with the fanotify door and further options.
    pub fn start(options: &[&str]) -> Daemon {
        let home = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder under target");
        Daemon::over(home, options)
    }

    /// A daemon over a folder that may hold what another one left.
    pub fn over(home: TempDir, options: &[&str]) -> Daemon {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        let mut daemon = Daemon { home, child: None, options, generation: 0 };
        daemon.start_again();
        daemon
    }

    /// Starts the program with the same arguments.
    pub fn start_again(&mut self) {
        assert!(self.child.is_none(), "one at a time");
        self.child = Some(self.spawn(&[]));
        self.wait_until("it answers", |daemon| daemon.answers().is_ok_and(|count| count > 0));
    }

    /// Starts a successor beside it, as a supervisor does; gives the predecessor and its socket.
    pub fn start_successor(&mut self) -> (Child, PathBuf) {
        let (former, socket) = (self.child.take().expect("it runs"), self.socket());
        self.generation += 1;
        self.child = Some(self.spawn(&["--upgrade"]));
        self.wait_until("it answers", |daemon| daemon.answers().is_ok_and(|count| count > 0));
        (former, socket)
    }

    fn spawn(&self, more: &[&str]) -> Child {
        let log = File::options().append(true).create(true).open(self.path("log")).expect("a log");
        Command::new(env!("CARGO_BIN_EXE_sluice"))
            .args(["daemon", "--door", "fanotify", "--rlimit-nofile", "0", "--cache"])
            .arg(self.path("cache"))
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--apisock")
            .arg(self.socket())
            .args(&self.options)
            .args(more)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the program is built")
    }

    /// Bytes of an answer it gave. Who connects may still meet the socket of one that was killed.
    fn answers(&self) -> std::io::Result<usize> {
        let mut stream = UnixStream::connect(self.socket())?;
        stream.write_all(b"GET /api/v1/daemon HTTP/1.1\r\nConnection: close\r\n\r\n")?;
        stream.read_to_end(&mut Vec::new())
    }

    /// Ends it as a power button would.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().expect("it is ours");
        child.wait().expect("it is ours");
    }

    /// Ends it and everything that was to outlive it.
    pub fn kill_all(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        // A daemon replaces a keeper that dies, so some may have come meanwhile.
        self.wait_until("everything has ended", |daemon| {
            let left = daemon.processes();
            for process in &left {
                let _ = nix::sys::signal::kill(*process, nix::sys::signal::SIGKILL);
            }
            left.is_empty()
        });
    }

    /// The daemon, its keeper and its witness, as far as they run.
    pub fn processes(&self) -> Vec<nix::unistd::Pid> {
        let home = self.home.path().to_string_lossy();
        let is_ours = |pid: i32| {
            let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            program.starts_with(env!("CARGO_BIN_EXE_sluice"))
                && String::from_utf8_lossy(&arguments).contains(&*home)
        };
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|&pid| is_ours(pid)).map(nix::unistd::Pid::from_raw).collect()
    }

    /// Ends it as an operator would.
    pub fn stop(&mut self) {
        let mut child = self.child.take().expect("it runs");
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM).expect("it is ours");
        assert!(child.wait().expect("it is ours").success(), "{}", self.log());
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// A path below the daemon's home.
    pub fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path(&format!("api-{}.sock", self.generation))
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Runs a command of the program against this daemon.
    pub fn run(&self, arguments: &[&str]) -> Output {
        let output = Command::new(env!("CARGO_BIN_EXE_sluice"))
            .args(arguments)
            .arg("--apisock")
            .arg(self.socket())
            .output()
            .expect("the program is built");
        if !output.status.success() {
            eprintln!("{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        output
    }

    /// Mounts a test image from a registry at a place of its own, which is made.
    pub fn mount(&self, image: &str, registry: &str, place: &str) -> PathBuf {
        self.mount_as(image, registry, place, &[])
    }

    /// The same with further options.
    pub fn mount_as(&self, image: &str, registry: &str, place: &str, more: &[&str]) -> PathBuf {
        let mountpoint = self.path(place);
        std::fs::create_dir_all(&mountpoint).expect("a mountpoint");
        let (bootstrap, url) = (folder(image).join("image.boot"), format!("http://{registry}"));
        let (state, at) = (self.path("state"), mountpoint.to_string_lossy().into_owned());
        let mut arguments = vec!["mount", "--bootstrap", bootstrap.to_str().expect("text")];
        arguments.extend(["--registry", &url, "--repo", image]);
        arguments.extend(["--state-dir", state.to_str().expect("text")]);
        arguments.extend(more);
        arguments.push(&at);
        assert!(self.run(&arguments).status.success(), "{}", self.log());
        mountpoint
    }

    /// Mounts a test image many times, under an id of its own each.
    pub fn mount_copies(&self, image: &str, registry: &str, count: usize) -> Vec<PathBuf> {
        let bootstrap = folder(image).join("image.boot");
        let backend = json!({"scheme": "http", "host": registry, "repo": image});
        let mount = |number: usize| {
            let (id, place) = (format!("i{number}"), self.path(&format!("m/{number}")));
            std::fs::create_dir_all(&place).expect("a mountpoint");
            let config = json!({"id": id, "backend_type": "registry", "backend_config": backend,
                "cache_type": "fscache", "cache_config": {"work_dir": "/tmp"},
                "metadata_path": bootstrap});
            let entry = json!({"type": "bootstrap", "id": id, "domain_id": id, "config": config});
            let wish = json!({"entry": entry, "mountpoint": place});
            assert_eq!(self.put("/api/sluice/v1/mounts", &wish), 200, "{}", self.log());
            place
        };
        (0..count).map(mount).collect()
    }

    pub fn unmount(&self, mountpoint: &Path) {
        let output = self.run(&["umount", mountpoint.to_str().expect("text")]);
        assert!(output.status.success(), "{}", self.log());
    }

    /// All statistics.
    pub fn stat(&self) -> Value {
        let output = self.run(&["stat", "--json"]);
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// One counter.
    pub fn count(&self, name: &str) -> u64 {
        self.stat()["counters"][name].as_u64().unwrap_or_else(|| panic!("no counter {name}"))
    }

    /// One call of the control API with a JSON body; gives the status.
    pub fn put(&self, path: &str, body: &Value) -> u16 {
        put(&self.socket(), path, &body.to_string())
    }

    /// One call of the control API without a body.
    pub fn act(&self, path: &str) -> u16 {
        put(&self.socket(), path, "")
    }

    /// Polls until something is so.
    pub fn wait_until(&self, what: &str, is_so: impl Fn(&Daemon) -> bool) {
        assert!(comes_true(|| is_so(self)), "not within {PATIENCE:?}: {what}\n{}", self.log());
    }

    /// Bytes of all segments.
    pub fn cached_bytes(&self) -> u64 {
        let blobs = std::fs::read_dir(self.path("cache/segments")).into_iter().flatten().flatten();
        blobs.map(|blob| self.blob_bytes(&blob.file_name().to_string_lossy())).sum()
    }

    /// Bytes of a blob's segments.
    pub fn blob_bytes(&self, blob_id: &str) -> u64 {
        let blob = self.path("cache/segments").join(blob_id);
        let files = std::fs::read_dir(blob).into_iter().flatten().flatten();
        let is_segment = |name: &str| name.contains('-');
        let files = files.filter(|file| is_segment(&file.file_name().to_string_lossy()));
        files.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len()).sum()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill_all();
        let home = self.home.path();
        let mounts = mountinfo::read(None).unwrap_or_default();
        for mount in mounts.iter().rev().filter(|mount| mount.mountpoint.starts_with(home)) {
            let _ = nix::mount::umount2(&mount.mountpoint, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// Polls until something is so; false if it takes too long.
pub fn comes_true(is_so: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10)); // tidy: polling
    }
    true
}

/// One call of the control API at a socket; gives the status.
pub fn put(socket: &Path, path: &str, body: &str) -> u16 {
    let mut stream = UnixStream::connect(socket).expect("it listens");
    let head = format!("PUT {path} HTTP/1.1\r\nContent-Length: {}\r\n", body.len());
    let request = format!("{head}Connection: close\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).expect("it takes requests");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    status.unwrap_or_else(|| panic!("{answer:?} is no answer"))
}

/// An ext4 of so many MiB, until dropped.
pub struct Disk {
    pub mountpoint: PathBuf,
    _home: TempDir,
}

impl Disk {
    pub fn new(size_mib: u32) -> Disk {
        let home = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder under target");
        let (image, mountpoint) = (home.path().join("disk"), home.path().join("mnt"));
        std::fs::create_dir(&mountpoint).expect("a folder");
        let mut make = Command::new("mke2fs");
        make.args(["-q", "-F", "-b", "4096", "-t", "ext4"]).arg(&image).arg(format!("{size_mib}M"));
        assert!(make.status().expect("e2fsprogs").success());
        let disk = Disk { mountpoint, _home: home };
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop"]).arg(&image).arg(&disk.mountpoint);
        assert!(mount.status().expect("mount").success());
        disk
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The loop device goes with its mount; lazily, should a test have left a file open.
        let _ = nix::mount::umount2(&self.mountpoint, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// The kernel forgets what it has read, of everything.
pub fn forget_pages() {
    std::fs::write("/proc/sys/vm/drop_caches", "3").expect("root");
}
