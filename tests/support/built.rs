//! Images of any size, made by the built program out of files nobody can compress.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use super::daemon::Daemon;
use super::layouts::noise;
use super::registry::{self, Registry};

/// An image in a folder of its own: `image.boot` and its one blob, uncompressed.
pub struct Built {
    home: TempDir,
    /// Names and contents of its files.
    pub files: Vec<(PathBuf, Vec<u8>)>,
}

impl Built {
    /// `count` files of `size` bytes; the same bytes for the same seed.
    pub fn new(count: usize, size: usize, seed: u64) -> Built {
        let name = |number: usize| PathBuf::from(format!("file-{number:04}"));
        let bytes = |number: usize| noise(size, seed << 32 | number as u64);
        Built::of((0..count).map(|number| (name(number), bytes(number))).collect())
    }

    /// These files, executable.
    pub fn of(files: Vec<(PathBuf, Vec<u8>)>) -> Built {
        Built::with(files, &[])
    }

    /// The same with further options of the command.
    pub fn with(files: Vec<(PathBuf, Vec<u8>)>, options: &[&str]) -> Built {
        let home = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder under target");
        let tree = home.path().join("tree");
        std::fs::create_dir(&tree).expect("a folder");
        for (path, bytes) in &files {
            let path = tree.join(path);
            std::fs::write(&path, bytes).expect("room");
            std::fs::set_permissions(&path, Permissions::from_mode(0o755)).expect("ours");
        }
        let mut build = Command::new(env!("CARGO_BIN_EXE_sluice"));
        build.arg("build").arg(&tree).arg("-o").arg(home.path().join("image"));
        build.args(["--compressor", "none", "--chunk-size", "64K"]).args(options);
        build.stdout(Stdio::null());
        assert!(build.status().expect("the program is built").success());
        std::fs::remove_dir_all(tree).expect("ours");
        Built { home, files }
    }

    /// Where bootstrap and blob are.
    pub fn folder(&self) -> PathBuf {
        self.home.path().join("image")
    }

    /// Mounts it at a place of a daemon's; its blobs are a folder of this machine.
    pub fn mount(&self, daemon: &Daemon, place: &str) -> PathBuf {
        let folder = self.folder();
        self.mount_from(daemon, place, &["--blobs", folder.to_str().expect("text")])
    }

    /// The same with blobs from elsewhere.
    pub fn mount_from(&self, daemon: &Daemon, place: &str, blobs: &[&str]) -> PathBuf {
        let mountpoint = daemon.path(place);
        std::fs::create_dir_all(&mountpoint).expect("a mountpoint");
        let paths = [&self.folder().join("image.boot"), &daemon.path("state"), &mountpoint];
        let [bootstrap, state, at] = paths.map(|path| path.to_str().expect("text"));
        let before = ["mount", "--bootstrap", bootstrap, "--state-dir", state];
        let arguments = [&before[..], blobs, &[at]].concat();
        assert!(daemon.run(&arguments).status.success(), "{}", daemon.log());
        mountpoint
    }

    /// A registry that has it, under the name `built`.
    pub fn registry(&self) -> Registry {
        let root = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder under target");
        let mut load = Command::new(registry::executable());
        load.args(["load", "--repo", "built", "--tag", "small", "--root"]).arg(root.path());
        load.arg(self.folder()).stdout(Stdio::null());
        assert!(load.status().expect("registryd can be started").success());
        Registry::over(root, &[])
    }

    /// Compares every file below a mountpoint with what it was made of.
    pub fn assert_same(&self, mountpoint: &Path) {
        for (path, bytes) in &self.files {
            let found = std::fs::read(mountpoint.join(path));
            let found = found.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert!(&found == bytes, "{} is wrong", path.display());
        }
    }
}
