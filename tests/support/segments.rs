//! A cache of segment files as the fanotify door has it, filled by the test, and images over it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use sluice::error::Result;
use sluice::image::{Bootstrap, KernelView, Segmentation};
use sluice::upcall::mounting::{self, DetachedMount, Reading};
use tempfile::TempDir;

/// A folder on a real file system, which goes away.
pub struct Cache {
    folder: TempDir,
}

/// An image whose segment files exist and are empty.
pub struct Planted {
    pub bootstrap: Bootstrap,
    pub segmentations: Vec<Segmentation>,
    pub view: KernelView,
    folder: PathBuf,
    metadata: PathBuf,
    /// What stands for every segment's file but the last's.
    stand_in: Option<&'static str>,
}

/// A place where something is mounted; it is not when this is dropped.
pub struct Mounted {
    pub path: PathBuf,
}

impl Cache {
    pub fn new() -> Cache {
        Cache { folder: TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder") }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Where all segments are.
    pub fn segments(&self) -> PathBuf {
        let path = self.path().join("segments");
        std::fs::create_dir_all(&path).expect("a folder");
        path
    }

    /// Writes what the kernel mounts and makes the segment files that are not there, empty.
    pub fn plant(&self, name: &str, bootstrap: Bootstrap) -> Planted {
        self.plant_as(name, bootstrap, None)
    }

    /// The same with one empty file for all segments but the last, where there are very many: file
    /// systems are slow to make files where as many have just been removed.
    pub fn plant_sharing(&self, name: &str, bootstrap: Bootstrap) -> Planted {
        self.plant_as(name, bootstrap, Some("empty"))
    }

    fn plant_as(
        &self,
        name: &str,
        bootstrap: Bootstrap,
        stand_in: Option<&'static str>,
    ) -> Planted {
        let segmentations = Segmentation::of_image(&bootstrap).expect("segments");
        let view = KernelView::derive(&bootstrap, &segmentations).expect("a view");
        let (folder, metadata) = (self.segments(), self.path().join(name));
        std::fs::write(&metadata, &view.metadata).expect("metadata is written");
        let planted = Planted { bootstrap, segmentations, view, folder, metadata, stand_in };
        let count = planted.view.devices.len();
        let first = stand_in.map_or(0, |_| count.saturating_sub(2));
        for device in first..count {
            let path = planted.file(device);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            OpenOptions::new().create(true).append(true).open(path).expect("a segment file");
        }
        planted
    }

    /// An empty folder to mount at.
    pub fn mountpoint(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        std::fs::create_dir_all(&path).expect("a folder");
        path
    }
}

impl Planted {
    /// The name of a device's file below the folder of segments.
    pub fn device(&self, position: usize) -> String {
        if let Some(name) = self.stand_in.filter(|_| position + 1 < self.view.devices.len()) {
            return name.to_owned();
        }
        let device = self.view.devices[position];
        let blob = &self.bootstrap.blobs()[device.blob_index as usize];
        let segment = self.segmentations[device.blob_index as usize].segment(device.place);
        format!("{}/{}", blob.id, segment.file_name())
    }

    /// Puts a segment's bytes into its file, which has its whole size then.
    pub fn fill(&self, position: usize, space: &[u8]) {
        let device = self.view.devices[position];
        let segment = self.segmentations[device.blob_index as usize].segment(device.place);
        let file = OpenOptions::new().write(true).open(self.file(position)).expect("a file");
        let bytes = &space[segment.base as usize..(segment.base + segment.size) as usize];
        file.write_all_at(bytes, 0).expect("it is written");
    }

    /// Fills all segments of an image with one blob.
    pub fn fill_all(&self, space: &[u8]) {
        (0..self.view.devices.len()).for_each(|position| self.fill(position, space));
    }

    /// Empties a segment's file.
    pub fn empty(&self, position: usize) {
        File::create(self.file(position)).expect("it is emptied");
    }

    pub fn file(&self, position: usize) -> PathBuf {
        self.folder.join(self.device(position))
    }

    /// Mounts it with its segments opened below `folder`.
    pub fn mount_through(&self, folder: &Path, mountpoint: PathBuf) -> Result<Mounted> {
        let image = self.assemble(folder)?;
        mounting::attach(image, &mountpoint, None)?;
        Ok(Mounted { path: mountpoint })
    }

    /// Mounts it where another process sees it.
    pub fn mount_for(&self, mountpoint: PathBuf, peer: Option<u32>) -> Result<Mounted> {
        let image = self.assemble(&self.folder)?;
        mounting::attach(image, &mountpoint, peer)?;
        Ok(Mounted { path: mountpoint })
    }

    pub fn mount(&self, mountpoint: PathBuf) -> Mounted {
        self.mount_through(&self.folder, mountpoint).expect("it mounts")
    }

    fn assemble(&self, folder: &Path) -> Result<DetachedMount> {
        let directory = mounting::open_directory(folder)?;
        let devices = 0..self.view.devices.len();
        let devices = devices.map(|position| mounting::below(&directory, &self.device(position)));
        let metadata = self.metadata.to_str().expect("UTF-8");
        mounting::image_of_files(metadata, devices, Reading::Cached)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

/// Forgets what the kernel has of a file in memory.
pub fn forget(path: &Path) {
    let file = File::open(path).expect("a file");
    nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED)
        .expect("advice");
}
