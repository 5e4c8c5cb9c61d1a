//! What `sluice doctor` reads from this machine: kernel texts, the device, the cache directory.
//!
//! Owns the reading and nothing else; what a reading means is decided in `checks`. Changes nothing:
//! the device is opened only while nobody holds it and closed at once, and the cache directories
//! are tried with files that have no names.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::statfs;

use super::client::Api;
use crate::config;
use crate::upcall::probe::{Report, probe};

/// Everything the checks look at; an absent text could not be read.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// /proc/sys/kernel/osrelease, like "6.12.43-amd64".
    pub release: String,
    /// The kernel's configuration.
    pub kernel_config: Option<String>,
    /// /proc/filesystems.
    pub filesystems: Option<String>,
    /// Modules that could be loaded (modules.dep and modules.builtin of this kernel).
    pub modules_available: Option<String>,
    /// /dev/cachefiles.
    pub device: Device,
    /// Who holds the device or an object of it.
    pub holders: Vec<Process>,
    /// Running programs named cachefilesd.
    pub cachefilesd: Vec<Process>,
    /// The cache directory, if one was named.
    pub cache: Option<CacheDirectory>,
    /// /proc/self/status.
    pub status: Option<String>,
    /// /proc/self/uid_map.
    pub uid_map: Option<String>,
    /// /proc/self/limits.
    pub limits: Option<String>,
    /// From the auxiliary vector.
    pub page_size_bytes: Option<u64>,
    /// /proc/sys/kernel/io_uring_disabled; absent before 6.6.
    pub io_uring_disabled: Option<String>,
    /// Whether a ring could be made and what it cannot do.
    pub ring: Ring,
    /// How the kernel behaves where the segments would be.
    pub fanotify: Report,
    /// The control socket's answer.
    pub daemon: DaemonState,
}

/// What opening /dev/cachefiles gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// There is no such node.
    #[default]
    Absent,
    /// Something else has that name.
    Other,
    /// It was opened and closed again.
    Free,
    /// It was not tried: `holders` says who has it.
    Held,
    /// The kernel refused.
    Refused(i32),
}

/// A running program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its name as the kernel knows it.
    pub name: String,
    /// Whether it runs the same program file as we do, under whatever name.
    pub is_ours: bool,
}

/// The directory the kernel would keep its cache in.
#[derive(Clone, Debug, Default)]
pub struct CacheDirectory {
    /// As it was given.
    pub path: PathBuf,
    /// The nearest directory that exists; equal to `path` if that does.
    pub nearest: PathBuf,
    /// statfs's magic number.
    pub kind: u64,
    /// statfs's block size.
    pub block_size_bytes: u64,
    /// All blocks, and those an unprivileged writer may still take.
    pub blocks: (u64, u64),
    /// All files, and those that may still be made; (0, 0) where the file system has no such limit.
    pub files: (u64, u64),
    /// The errno of opening a file there with O_DIRECT.
    pub direct_io: Option<i32>,
}

/// What io_uring can do here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Ring {
    /// It was not tried.
    #[default]
    Unknown,
    /// The kernel refused to make one.
    Refused(i32),
    /// A ring was made; these operations are missing.
    Works(Vec<&'static str>),
}

/// What the control socket answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DaemonState {
    /// There is no socket.
    #[default]
    Absent,
    /// A socket nobody listens at, or that refuses; the text says which.
    Silent(String),
    /// A daemon in this state.
    Answers(String),
}

impl Machine {
    /// Reads this machine; nothing that cannot be read is an error here.
    ///
    /// `fscache` and `cache` are the directories of the two doors.
    pub fn read(fscache: Option<&Path>, cache: Option<&Path>, api: &Api) -> Self {
        let release = text("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
        let (holders, cachefilesd) = processes();
        Machine {
            kernel_config: kernel_config(&release),
            filesystems: text("/proc/filesystems"),
            modules_available: modules_available(&release),
            device: device(Path::new("/dev/cachefiles"), &holders),
            holders,
            cachefilesd,
            cache: fscache.and_then(cache_directory),
            fanotify: cache.and_then(nearest).map(probe).unwrap_or_default(),
            status: text("/proc/self/status"),
            uid_map: text("/proc/self/uid_map"),
            limits: text("/proc/self/limits"),
            page_size_bytes: fs::read("/proc/self/auxv").ok().and_then(|auxv| page_size(&auxv)),
            io_uring_disabled: text("/proc/sys/kernel/io_uring_disabled"),
            ring: ring(),
            daemon: daemon(api),
            release,
        }
    }
}

/// Finds AT_PAGESZ (6) in an auxiliary vector of this machine's word size.
fn page_size(auxv: &[u8]) -> Option<u64> {
    const AT_PAGESZ: u64 = 6;
    let word = |bytes: &[u8]| bytes.try_into().ok().map(u64::from_ne_bytes);
    auxv.chunks_exact(16)
        .find(|pair| word(&pair[..8]) == Some(AT_PAGESZ))
        .and_then(|pair| word(&pair[8..]))
}

fn text(path: impl AsRef<Path>) -> Option<String> {
    limited(File::open(path).ok()?)
}

fn limited(source: impl Read) -> Option<String> {
    let mut bytes = Vec::new();
    source.take(config::SYSTEM_TEXT_MAX_BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The running kernel's configuration, from itself or from the distribution's copy.
fn kernel_config(release: &str) -> Option<String> {
    if let Ok(file) = File::open("/proc/config.gz")
        && let Some(text) = limited(flate2::read::GzDecoder::new(file))
    {
        return Some(text);
    }
    [format!("/boot/config-{release}"), format!("/lib/modules/{release}/config")]
        .into_iter()
        .find_map(text)
}

fn modules_available(release: &str) -> Option<String> {
    let parts: Vec<String> = ["modules.dep", "modules.builtin"]
        .iter()
        .filter_map(|name| text(format!("/lib/modules/{release}/{name}")))
        .collect();
    if parts.is_empty() { None } else { Some(parts.concat()) }
}

/// Opening is the only way to learn whether the kernel would let a daemon in; the device has one
/// opener, so nobody is disturbed who is there already.
fn device(path: &Path, holders: &[Process]) -> Device {
    match fs::metadata(path) {
        Err(_) => return Device::Absent,
        Ok(metadata) if !metadata.file_type().is_char_device() => return Device::Other,
        Ok(_) if !holders.is_empty() => return Device::Held,
        Ok(_) => {}
    }
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Device::Free,
        Err(error) => Device::Refused(error.raw_os_error().unwrap_or(libc::EIO)),
    }
}

/// Who has the device (or an open object, which keeps the cache bound), and every cachefilesd.
fn processes() -> (Vec<Process>, Vec<Process>) {
    let mut holders = Vec::new();
    let mut cachefilesd = Vec::new();
    let mut scanned = 0;
    let program = program_of(Path::new("/proc/self/exe"));
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let name = text(entry.path().join("comm")).unwrap_or_default().trim().to_owned();
        let is_ours = program.is_some() && program_of(&entry.path().join("exe")) == program;
        if name == "cachefilesd" {
            cachefilesd.push(Process { pid, name: name.clone(), is_ours });
        }
        for descriptor in fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten() {
            scanned += 1;
            if scanned > config::DESCRIPTORS_SCANNED_MAX {
                return (holders, cachefilesd);
            }
            if fs::read_link(descriptor.path()).is_ok_and(|target| is_cachefiles(&target)) {
                holders.push(Process { pid, name, is_ours });
                break;
            }
        }
    }
    (holders, cachefilesd)
}

/// The program file behind an exe link, also when an upgrade has replaced it meanwhile.
fn program_of(link: &Path) -> Option<String> {
    let path = fs::read_link(link).ok()?.to_str()?.to_owned();
    Some(path.strip_suffix(" (deleted)").unwrap_or(&path).to_owned())
}

/// Objects are named "[cachefiles]" by cachefiles_ondemand_get_fd (fs/cachefiles/ondemand.c).
fn is_cachefiles(target: &Path) -> bool {
    target == Path::new("/dev/cachefiles") || target == Path::new("anon_inode:[cachefiles]")
}

/// The nearest directory that exists.
fn nearest(path: &Path) -> Option<&Path> {
    let here = |path| if path == Path::new("") { Path::new(".") } else { path };
    path.ancestors().map(here).find(|path| path.is_dir())
}

fn cache_directory(path: &Path) -> Option<CacheDirectory> {
    let nearest = nearest(path)?;
    let figures = statfs(nearest).ok()?;
    let unnamed = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE | libc::O_DIRECT)
        .open(nearest);
    Some(CacheDirectory {
        path: path.to_owned(),
        nearest: nearest.to_owned(),
        kind: figures.filesystem_type().0 as u64,
        block_size_bytes: fs::metadata(nearest).map_or(0, |_| figures.block_size() as u64),
        blocks: (figures.blocks(), figures.blocks_available()),
        files: (figures.files(), figures.files_free()),
        direct_io: unnamed.err().and_then(|error| error.raw_os_error()),
    })
}

/// Tries the engine's operations, by the names an operator finds in io_uring's manual.
fn ring() -> Ring {
    use io_uring::{IoUring, Probe, opcode};
    const NEEDED: [(u8, &str); 7] = [
        (opcode::Connect::CODE, "connect"),
        (opcode::Recv::CODE, "recv"),
        (opcode::Send::CODE, "send"),
        (opcode::Read::CODE, "read"),
        (opcode::Write::CODE, "write"),
        (opcode::PollAdd::CODE, "poll"),
        (opcode::AsyncCancel::CODE, "cancel"),
    ];
    let errno = |error: std::io::Error| error.raw_os_error().unwrap_or(libc::EIO);
    let ring = match IoUring::new(8) {
        Ok(ring) => ring,
        Err(error) => return Ring::Refused(errno(error)),
    };
    let mut probe = Probe::new();
    if let Err(error) = ring.submitter().register_probe(&mut probe) {
        return Ring::Refused(errno(error));
    }
    let missing = NEEDED.iter().filter(|(code, _)| !probe.is_supported(*code));
    let missing: Vec<&str> = missing.map(|(_, name)| *name).collect();
    // The engine asks for more than a ring: memory for its buffers, threads, an eventfd.
    match crate::engine::block_on(|_| async {}) {
        Err(error) if missing.is_empty() => Ring::Refused(error.errno()),
        _ => Ring::Works(missing),
    }
}

fn daemon(api: &Api) -> DaemonState {
    if fs::metadata(api.socket())
        .map_or(true, |metadata| metadata.mode() & libc::S_IFMT != libc::S_IFSOCK)
    {
        return DaemonState::Absent;
    }
    match api.fetch("/api/v1/daemon") {
        Ok(answer) => {
            DaemonState::Answers(answer["state"].as_str().unwrap_or("unknown").to_owned())
        }
        Err(error) => DaemonState::Silent(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_size_is_found_by_its_key() {
        let pair = |key: u64, value: u64| [key.to_ne_bytes(), value.to_ne_bytes()].concat();
        let auxv = [pair(33, 6), pair(6, 4096), pair(0, 0)].concat();
        assert_eq!(page_size(&auxv), Some(4096));
        assert_eq!(page_size(&auxv[..16]), None);
        assert_eq!(page_size(&auxv[..20]), None);
        assert_eq!(page_size(&[]), None);
    }

    #[test]
    fn a_missing_cache_directory_is_judged_by_its_parent() {
        let dir = tempfile::tempdir().expect("a directory");
        let wanted = dir.path().join("not/yet");
        let found = cache_directory(&wanted).expect("an ancestor");
        assert_eq!((found.path.as_path(), found.nearest.as_path()), (wanted.as_path(), dir.path()));
        assert!(fs::read_dir(dir.path()).expect("a directory").next().is_none());
        assert!(cache_directory(Path::new("not-here")).is_some());
    }

    #[test]
    fn only_the_device_and_its_objects_count_as_holding() {
        assert!(is_cachefiles(Path::new("/dev/cachefiles")));
        assert!(is_cachefiles(Path::new("anon_inode:[cachefiles]")));
        assert!(!is_cachefiles(Path::new("anon_inode:[eventpoll]")));
        assert!(!is_cachefiles(Path::new("/dev/null")));
    }

    #[test]
    fn a_plain_file_is_no_device() {
        assert_eq!(device(Path::new("/proc/version"), &[]), Device::Other);
        assert_eq!(device(Path::new("/nonexistent"), &[]), Device::Absent);
        let holder = Process { pid: 1, name: "other".to_owned(), is_ours: false };
        assert_eq!(device(Path::new("/dev/null"), &[holder]), Device::Held);
    }

    #[test]
    fn this_machine_can_be_read() {
        let machine = Machine::read(None, None, &Api::new(PathBuf::from("/nonexistent/api.sock")));
        assert!(!machine.release.is_empty());
        assert!(machine.limits.is_some() && machine.status.is_some());
        assert_eq!(machine.daemon, DaemonState::Absent);
    }
}
