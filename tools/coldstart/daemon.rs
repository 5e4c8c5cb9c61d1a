//! A daemon that serves the emulated device: ours or nydusd, unmodified, as a process of its own.
//!
//! Owns the process: it is ended when this value is dropped. Both daemons are started with their
//! own options, get the same entries over the same API, and are measured from outside: processor
//! time and memory from /proc.

use std::fs::File;
use std::io::{self, Error};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::http::Client;
use crate::image::Image;
use crate::kernel::{Kernel, Listener};

/// A daemon is ready, and gone when told to, within this time.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(2);

/// A running daemon and its device.
pub struct Daemon {
    child: Child,
    /// Its control API.
    pub socket: PathBuf,
    /// What it asks the kernel for, and gets asked.
    pub kernel: Kernel,
}

/// How an image is registered.
#[derive(Clone, Debug)]
pub struct Registration {
    /// HOST:PORT of the origin.
    pub origin: String,
    /// Whether to prefetch.
    pub prefetch: bool,
    /// Whether to ask for digests to be checked (nydusd checks none otherwise).
    pub validate: bool,
    /// Where the daemon may keep its own files.
    pub work: PathBuf,
}

/// Processor time and memory of a process, as the kernel counts them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Of all its threads, also ended ones.
    pub processor: Duration,
    /// The most memory it ever had resident.
    pub resident_peak_kib: u64,
    /// What it has now.
    pub resident_kib: u64,
}

impl Daemon {
    /// Starts `command` (`{cache}`, `{state}` and `{socket}` in it are replaced) and waits until
    /// it answers.
    pub fn start(command: &[String], work: &Path, readers: usize) -> io::Result<Daemon> {
        let (device, socket) = (work.join("device.sock"), work.join("api.sock"));
        for folder in ["cache", "state", "work"] {
            std::fs::create_dir_all(work.join(folder))?;
        }
        let listener = Listener::new(&device, &work.join("objects"), readers)?;
        let fill = |word: &String| {
            word.replace("{cache}", &work.join("cache").display().to_string())
                .replace("{state}", &work.join("state").display().to_string())
                .replace("{socket}", &socket.display().to_string())
        };
        let words: Vec<String> = command.iter().map(fill).collect();
        let (program, arguments) = words.split_first().ok_or_else(|| Error::other("no daemon"))?;
        let log = File::create(work.join("daemon.log"))?;
        let child = Command::new(program)
            .args(arguments)
            .env("LD_PRELOAD", shim(work)?)
            .env("EMULATED_KERNEL", &device)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .map_err(|error| Error::other(format!("{program}: {error}")))?;
        let mut process = Process(Some(child));
        let kernel = listener.accept().map_err(|error| {
            let said = std::fs::read_to_string(work.join("daemon.log")).unwrap_or_default();
            Error::other(format!("{error}; it said: {said}"))
        })?;
        let deadline = Instant::now() + PATIENCE;
        while state(&socket).as_deref() != Some("RUNNING") {
            if Instant::now() > deadline {
                return Err(Error::other("the daemon does not say that it is running"));
            }
            std::thread::sleep(LOOK);
        }
        let child = process.0.take().expect("put there above");
        Ok(Daemon { child, socket, kernel })
    }

    /// Registers an image under a domain of its own.
    pub fn register(&self, domain: &str, image: &Image, how: &Registration) -> io::Result<()> {
        let body = entry(domain, image, how).to_string();
        let (status, answer) = self.call("PUT", "/api/v2/blobs", &body)?;
        if (200..300).contains(&status) {
            return Ok(());
        }
        let answer = String::from_utf8_lossy(&answer);
        Err(Error::other(format!("the daemon refused the image: {status} {answer}")))
    }

    /// What ours counts and measures; Null of a daemon that does not know the path.
    pub fn statistics(&self) -> Value {
        match self.call("GET", "/api/sluice/v1/stat", "") {
            Ok((200, body)) => serde_json::from_slice(&body).unwrap_or_default(),
            _ => Value::Null,
        }
    }

    /// What it has used so far.
    pub fn usage(&self) -> io::Result<Usage> {
        usage(self.child.id())
    }

    fn call(&self, method: &str, path: &str, body: &str) -> io::Result<(u16, Vec<u8>)> {
        let stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Client::new(stream, "localhost").call(method, path, body)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Ends a child that was started and then could not be used.
struct Process(Option<Child>);

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            end(child);
        }
    }
}

fn end(child: &mut Child) {
    let pid = Pid::from_raw(child.id() as i32);
    let _ = kill(pid, Signal::SIGTERM);
    let deadline = Instant::now() + PATIENCE;
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
        std::thread::sleep(LOOK);
    }
    // Of one that is gone already this is an error, and of no interest.
    let _ = child.kill();
    let _ = child.wait();
}

/// Processor time and memory of any process.
pub fn usage(pid: u32) -> io::Result<Usage> {
    let clock = nix::time::clock_getcpuclockid(Pid::from_raw(pid as i32))?;
    let processor = nix::time::clock_gettime(clock)?.into();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Ok(Usage {
        processor,
        resident_peak_kib: field("VmHWM:").unwrap_or(0),
        resident_kib: field("VmRSS:").unwrap_or(0),
    })
}

fn state(socket: &Path) -> Option<String> {
    let stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let (_, body) = Client::new(stream, "localhost").call("GET", "/api/v1/daemon", "").ok()?;
    let daemon: Value = serde_json::from_slice(&body).ok()?;
    Some(daemon["state"].as_str()?.to_owned())
}

fn entry(domain: &str, image: &Image, how: &Registration) -> Value {
    let registry = json!({
        "scheme": "http", "host": how.origin, "repo": "measured/image",
        "timeout": 30, "connect_timeout": 5, "retry_limit": 2,
    });
    let prefetch = json!({
        "enable": how.prefetch, "threads": 4, "threads_count": 4, "merging_size": 1 << 20,
        "batch_size": 1 << 20, "bandwidth_rate": 0, "bandwidth_limit": 0, "prefetch_all": true,
    });
    let common = json!({"type": "bootstrap", "id": domain, "domain_id": domain});
    let mut entry = common;
    // Only the second form can ask for validation, and only nydusd needs to be asked.
    if how.validate {
        entry["config_v2"] = json!({
            "version": 2, "id": domain,
            "backend": {"type": "registry", "registry": registry},
            "cache": {"type": "fscache", "validate": true, "prefetch": prefetch,
                      "fscache": {"work_dir": how.work}},
            "metadata_path": image.bootstrap,
        });
    } else {
        entry["config"] = json!({
            "id": domain, "backend_type": "registry", "backend_config": registry,
            "cache_type": "fscache", "cache_config": {"work_dir": how.work},
            "metadata_path": image.bootstrap, "prefetch_config": prefetch,
        });
    }
    entry
}

/// Compiles the daemon's end of the device.
fn shim(work: &Path) -> io::Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/coldstart/device.c");
    let made = work.join("device.so");
    let status = Command::new("gcc")
        .args(["-O2", "-Wall", "-shared", "-fPIC", "-o"])
        .args([&made, &source])
        .arg("-ldl")
        .status()
        .map_err(|error| Error::other(format!("gcc: {error}; `tools/install build` helps")))?;
    if status.success() { Ok(made) } else { Err(Error::other("gcc refused device.c")) }
}
