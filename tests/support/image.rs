//! Images a test has built: what is in them by every way of reading them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use sluice::build::unpack::unpack;
use sluice::build::{Blob, Image};
use sluice::image::context::HEADER_BYTES;
use sluice::image::{BlobId, BlobRecord, Bootstrap, ContextTable, Decoder, Layout};

/// An image in a folder, as the builder or another tool left it.
pub struct Folder {
    pub path: PathBuf,
    pub bootstrap: Bootstrap,
}

impl Folder {
    /// Writes the bootstrap of an image beside its blobs. Layers that stay as they are must be
    /// there already.
    pub fn of(path: &Path, image: &Image) -> Folder {
        std::fs::write(path.join("image.boot"), &image.bootstrap).expect("written");
        Folder::open(path)
    }

    pub fn open(path: &Path) -> Folder {
        let bytes = std::fs::read(path.join("image.boot")).expect("a bootstrap");
        let bootstrap = Bootstrap::parse(bytes).expect("a bootstrap we accept");
        Folder { path: path.to_owned(), bootstrap }
    }

    pub fn layouts(&self) -> Vec<Layout> {
        let layout = |record: &BlobRecord| {
            // Also where the bootstrap alone would do: the table must agree with it.
            let context = self.context(record);
            Layout::build(&self.bootstrap, record.index, Some(&context)).expect("a good layout")
        };
        self.bootstrap.blobs().iter().map(layout).collect()
    }

    fn context(&self, record: &BlobRecord) -> ContextTable {
        let holder = record.context_blob().expect("it is named");
        let bytes = self.read(&holder, record.context_range()).expect("a context table");
        let (table, header) = bytes.split_at(bytes.len() - HEADER_BYTES);
        ContextTable::parse(record, table, header).expect("a good table")
    }

    fn read(&self, blob: &BlobId, range: std::ops::Range<u64>) -> sluice::error::Result<Vec<u8>> {
        let file = File::open(self.path.join(blob.as_str())).expect("the blob");
        let mut bytes = vec![0; (range.end - range.start) as usize];
        file.read_exact_at(&mut bytes, range.start).expect("a blob as long as it should be");
        Ok(bytes)
    }

    /// Unpacks next to the image and lists the result.
    pub fn unpacked(&self) -> Vec<String> {
        let target = self.path.join("unpacked");
        let read = |blob: &BlobId, range| self.read(blob, range);
        unpack(&self.bootstrap, &self.layouts(), &read, &target, &|_| ()).expect("it unpacks");
        let lines = list(&target);
        std::fs::remove_dir_all(&target).expect("removed");
        lines
    }

    /// Writes the address space of every blob, verified, as a file.
    pub fn write_spaces(&self) -> Vec<PathBuf> {
        let mut decoder = Decoder::new();
        let mut paths = Vec::new();
        for layout in self.layouts() {
            let path = self.path.join(format!("space-{}", layout.blob_id()));
            let space = File::create(&path).expect("a file");
            space.set_len(layout.uncompressed_size()).expect("sparse");
            for number in 0..layout.unit_count() {
                let unit = layout.unit(number);
                let start = unit.compressed_offset;
                let range = start..start + u64::from(unit.compressed_size);
                let stored = self.read(layout.blob_id(), range).expect("stored bytes");
                let mut output = vec![0; unit.output_size as usize];
                decoder.decode_unit(&layout, number, &stored, &mut output).expect("it decodes");
                space.write_all_at(&output, unit.uncompressed_offset).expect("written");
            }
            paths.push(path);
        }
        paths
    }

    /// Mounts the image by this machine's own EROFS, each blob an address space in a file.
    pub fn mount(&self) -> Mounted {
        let devices = self.write_spaces();
        let options: Vec<String> =
            devices.iter().map(|path| format!("device={}", path.display())).collect();
        let place = self.path.join("mounted");
        std::fs::create_dir_all(&place).expect("a mountpoint");
        let source = self.path.join("image.boot");
        let options = options.join(",");
        mount(Some(&source), &place, Some("erofs"), MsFlags::MS_RDONLY, Some(&options[..]))
            .expect("the kernel mounts it");
        Mounted(place)
    }
}

/// Unmounts when dropped.
pub struct Mounted(pub PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// The tree's listing by tests/fixtures/list.py, sorted. Which of several names a hard link is
/// listed under depends on the walk, so that is left out.
pub fn list(root: &Path) -> Vec<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/list.py");
    let output = Command::new("python3").arg(script).arg(root).output().expect("python3 runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    lines(&String::from_utf8(output.stdout).expect("text"))
}

/// The lines of a listing in the same form.
pub fn lines(text: &str) -> Vec<String> {
    let blur = |line: &str| match line.find(" link=") {
        Some(at) if !line[at..].starts_with(" link=-") => {
            // A name between quotes may have spaces; attributes, behind it, have none.
            let tail = line.rsplit_once('\'').map_or("", |(_, tail)| tail);
            let tail = if tail.contains(" link=") { "" } else { tail };
            format!("{} link=several {}", &line[..at], tail.trim())
        }
        _ => line.to_owned(),
    };
    let mut lines: Vec<String> = text.lines().map(|line| blur(line).trim_end().into()).collect();
    lines.sort();
    lines
}

/// The files of an image's blobs, in its order.
pub fn blob_files(blobs: &[Blob]) -> Vec<Vec<u8>> {
    let paths = blobs.iter().filter_map(|blob| blob.path.as_ref());
    paths.map(|path| std::fs::read(path).expect("the blob's file")).collect()
}
