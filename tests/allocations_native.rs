//! Nothing allocates on the fault path of the fanotify door after start: the daemon in this
//! process, a real mount, and a reader of cold files.
//!
//! Needs root, and Linux 6.14 or later. The test runs itself again in a mount namespace, so that
//! nothing stays mounted however it ends.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use sluice::cli::cores_allowed;
use sluice::config::{Config, DoorChoice, FAULT_DEADLINE_DEFAULT_MS, Intake, LogLevel};
use support::built::Built;
use support::counting::{Counting, counted, threads};
use support::daemon;
use tempfile::TempDir;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Where the process that has its own mounts finds its folder.
const HOME: &str = "SLUICE_TEST_HOME";
const FILES_PER_ROUND: usize = 10;
/// Between one file and the next; no divisor of how many there are.
const STRIDE: usize = 37;

fn config(home: &Path) -> Config {
    Config {
        door: DoorChoice::Fanotify,
        cache_dir: home.join("cache"),
        cache_quota_bytes: 0,
        fscache_dir: None,
        fscache_tag: None,
        api_socket: Some(home.join("api.sock")),
        cores: cores_allowed().expect("a list of CPUs"),
        intake: Intake::One,
        state_dir: home.join("state"),
        log_level: LogLevel::Warn,
        log_file: None,
        nofile_limit: 0,
        fault_deadline_ms: FAULT_DEADLINE_DEFAULT_MS,
        id: None,
        supervisor: None,
        upgrade: false,
        blobs_file: None,
        // No second process: it would be a copy of this one.
        learns_starts: true,
        keep_s: 0,
    }
}

/// Reads some of the image's files, which must be right.
fn read(image: &Built, mountpoint: &Path, turns: std::ops::Range<usize>) {
    for turn in turns {
        // Far apart, so that no read-ahead brings the next one.
        let (path, bytes) = &image.files[turn * STRIDE % image.files.len()];
        assert!(&std::fs::read(mountpoint.join(path)).expect("a healthy registry") == bytes);
    }
}

#[test]
fn cold_files_are_served_without_an_allocation() {
    let Some(home) = std::env::var_os(HOME).map(PathBuf::from) else {
        let home = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder under target");
        let program = std::env::current_exe().expect("a process knows its program");
        let mut again = Command::new("unshare");
        again.args(["--mount", "--propagation", "private"]).arg(program).env(HOME, home.path());
        assert!(again.arg("--nocapture").status().expect("unshare").success());
        return;
    };
    let config = config(&home);
    let mountpoint = home.join("mountpoint");
    for folder in [&config.cache_dir, &config.state_dir, &mountpoint] {
        std::fs::create_dir(folder).expect("a folder");
    }
    let socket = config.api_socket.clone().expect("set above");
    let image = Built::new(80, 1_500_000, 7);
    let registry = image.registry();
    let service = std::thread::spawn(move || sluice::daemon::run(&config));
    let starts = || socket.exists() || service.is_finished();
    assert!(daemon::comes_true(starts) && socket.exists(), "the daemon does not start");
    let mut mount = Command::new(env!("CARGO_BIN_EXE_sluice"));
    mount.arg("mount").arg("--apisock").arg(&socket).arg("--state-dir").arg(&home);
    mount.arg("--bootstrap").arg(image.folder().join("image.boot")).arg("--repo").arg("built");
    mount.arg("--registry").arg(format!("http://{}", registry.address())).arg(&mountpoint);
    assert!(mount.status().expect("the program is built").success());

    // What a core keeps grows until it has had as much to do at once as it ever has.
    let mut seen = Vec::new();
    for first in (0..image.files.len()).step_by(FILES_PER_ROUND) {
        let (before, files) = (registry.blob_reads().len(), first..first + FILES_PER_ROUND);
        let allocations = counted(&threads("core-"), || read(&image, &mountpoint, files));
        seen.push((allocations, registry.blob_reads().len() - before));
        if allocations == 0 {
            break;
        }
    }
    let is_quiet =
        seen.last().is_some_and(|&(allocations, fetches)| allocations == 0 && fetches > 5);
    assert!(is_quiet, "allocations and fetches of each round: {seen:?}");
    // The daemon ends with this process: telling it to end would send a signal to all of it.
    nix::mount::umount(&mountpoint).expect("nobody uses it");
    assert!(!service.is_finished(), "the daemon serves to the end");
}
