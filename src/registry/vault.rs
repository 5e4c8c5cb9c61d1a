//! Reads Docker's configuration file and runs credential helpers; blocking, for helper threads.
//!
//! The file is looked at each time and parsed again when its time or size changed, so a `docker
//! login` counts from the next token on. A helper gets its key on standard input, has a bounded
//! time and a bounded output, and is ended when it keeps neither. Nothing a helper prints is shown.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::config as limits;
use crate::error::{Error, Result};
use crate::registry::credentials::{
    Answer, Credential, DockerConfig, helper_has_nothing, parse_helper_output,
};

/// The credentials of this machine.
#[derive(Debug)]
pub struct Vault {
    path: Option<PathBuf>,
    known: Mutex<Option<(Stamp, Arc<DockerConfig>)>>,
}

type Stamp = (Option<SystemTime>, u64);

impl Vault {
    /// The vault of `$DOCKER_CONFIG/config.json`, else of `~/.docker/config.json`.
    pub fn of_environment() -> Self {
        let directory = std::env::var_os("DOCKER_CONFIG").filter(|path| !path.is_empty());
        let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker"));
        let directory = directory.map(PathBuf::from).or_else(home);
        Vault::new(directory.map(|directory| directory.join("config.json")))
    }

    /// The vault of one file, or an empty one.
    pub fn new(path: Option<PathBuf>) -> Self {
        Vault { path, known: Mutex::default() }
    }

    /// The credential for `docker.io` or `HOST[:PORT]`, if there is one.
    pub fn find(&self, host: &str) -> Result<Option<Credential>> {
        let Some(path) = &self.path else { return Ok(None) };
        let Some(config) = self.read(path)? else { return Ok(None) };
        let answer = config.find(host);
        match answer.map_err(|error| error.context(path.display()))? {
            Answer::Nothing => Ok(None),
            Answer::Known(credential) => Ok(Some(credential)),
            Answer::Helper { name, key, fallback } => {
                let asked = ask_helper(&format!("docker-credential-{name}"), &key);
                Ok(asked?.or(fallback))
            }
        }
    }

    fn read(&self, path: &Path) -> Result<Option<Arc<DockerConfig>>> {
        let Ok(metadata) = std::fs::metadata(path) else { return Ok(None) };
        let stamp = (metadata.modified().ok(), metadata.len());
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((seen, config)) = &*known
            && *seen == stamp
        {
            return Ok(Some(Arc::clone(config)));
        }
        if stamp.1 > limits::DOCKER_CONFIG_SIZE_MAX {
            return Err(Error::Malformed(format!("{}: larger than 1 MiB", path.display())));
        }
        let unreadable = |error: std::io::Error| Error::io(&error, path.display().to_string());
        let file = std::fs::File::open(path).map_err(unreadable)?;
        let mut text = Vec::new();
        file.take(limits::DOCKER_CONFIG_SIZE_MAX).read_to_end(&mut text).map_err(unreadable)?;
        let config = DockerConfig::parse(&text).map_err(|error| error.context(path.display()))?;
        let config = Arc::new(config);
        *known = Some((stamp, Arc::clone(&config)));
        Ok(Some(config))
    }
}

/// Runs `PROGRAM get`; `None` when it has nothing for `key`.
pub fn ask_helper(program: &str, key: &str) -> Result<Option<Credential>> {
    let failed = |why: String| Error::Denied(format!("credential helper {program}: {why}"));
    let child = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = child.map_err(|error| failed(format!("cannot be run: {error}")))?;
    let until = Instant::now() + Duration::from_millis(limits::CREDENTIAL_HELPER_TIMEOUT_MS);
    let talked =
        talk(&mut child, key, until).and_then(|output| Ok((output, end(&mut child, until)?)));
    if talked.is_err() {
        // It may have ended by itself; either way it is no more after this.
        let _ = child.kill();
        let _ = child.wait();
    }
    let (output, status) = talked.map_err(failed)?;
    if helper_has_nothing(&output) {
        return Ok(None);
    }
    match status.success() {
        true => parse_helper_output(&output).map(Some).map_err(|error| failed(error.to_string())),
        false => Err(failed(format!("it failed ({status}); run it by hand to see why"))),
    }
}

/// Writes the key, then reads until the helper closes its output.
fn talk(child: &mut Child, key: &str, until: Instant) -> std::result::Result<Vec<u8>, String> {
    if let Some(mut input) = child.stdin.take() {
        // A helper that does not read its key says so by its exit status.
        let _ = input.write_all(key.as_bytes());
    }
    let mut from = child.stdout.take().ok_or("it has no output")?;
    let mut output = Vec::new();
    let mut buffer = [0_u8; limits::KIB];
    loop {
        let left_ms = until.saturating_duration_since(Instant::now()).as_millis();
        let timeout = PollTimeout::try_from(left_ms).unwrap_or(PollTimeout::ZERO);
        let mut watched = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        match nix::poll::poll(&mut watched, timeout) {
            Ok(0) => return Err("no answer in 5 s; it was ended".to_string()),
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(error.to_string()),
        }
        let size = from.read(&mut buffer).map_err(|error| error.to_string())?;
        if size == 0 {
            return Ok(output);
        }
        output.extend_from_slice(&buffer[..size]);
        if output.len() as u64 > limits::CREDENTIAL_HELPER_OUTPUT_SIZE_MAX {
            return Err("it prints more than 64 KiB".to_string());
        }
    }
}

/// Waits until the helper, which has said all, has ended. Mostly it has.
fn end(child: &mut Child, until: Instant) -> std::result::Result<ExitStatus, String> {
    loop {
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
            return Ok(status);
        }
        if Instant::now() >= until {
            return Err("it does not end in 5 s; it was ended".to_string());
        }
        std::thread::sleep(Duration::from_millis(limits::CREDENTIAL_HELPER_END_LOOK_MS));
    }
}
