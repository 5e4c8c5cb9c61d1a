//! What images needed at their starts, on disk: the memory of `blob/touches.rs`.
//!
//! `<state_dir>/starts/` holds one file per image, named after its bootstrap's digest, so that an
//! image that is removed and pulled again is the same one: JSON, a line per touch. A file is
//! written when a start is over, beside the old one and put in its place. It is a hint: one that is
//! lost costs the next start a wait, one that makes no sense is reported and written anew. A daemon
//! that is killed in the middle of a start forgets that start.

use std::fs::{DirBuilder, File};
use std::io::{BufRead, BufReader, BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use crossbeam_channel::{RecvTimeoutError, Sender};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::control::ControlPlane;
use super::sealer::monotonic_ns;
use super::touched_files;
use crate::blob::journal::Level;
use crate::blob::recorder::Fault;
use crate::blob::registration::Image;
use crate::blob::schedule::PAGE_BYTES;
use crate::config::{
    MILLISECOND_NS, START_FILE_MAX_BYTES, START_LOOK_MS, START_TOUCHED_MAX_BYTES,
    START_TOUCHES_MAX, STARTS_KEPT_MAX,
};
use crate::error::{Error, Result};

/// The directory with what is kept.
#[derive(Debug)]
pub struct Starts {
    directory: PathBuf,
    /// One writes at a time: images may have one bootstrap, and so one file.
    turn: Mutex<()>,
}

/// The thread that writes down starts that are over.
pub struct StartKeeper {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

/// A touch as it is kept.
#[derive(Deserialize, Serialize)]
struct Line {
    blob: u32,
    offset: u64,
    length: u64,
    t_ms: u64,
}

impl Starts {
    /// Makes the directory, if it is not there.
    ///
    /// # Errors
    /// What the disk says.
    pub fn open(state_dir: &Path) -> Result<Starts> {
        let directory = state_dir.join("starts");
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&directory);
        made.map_err(|error| Error::io(&error, directory.display().to_string()))?;
        Ok(Starts { directory, turn: Mutex::default() })
    }

    /// What an image's starts needed; nothing if none is kept.
    fn read(&self, image: &Image) -> Result<Vec<Fault>> {
        let path = self.path(image);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io(&error, path.display().to_string())),
        };
        let lines = BufReader::new(file.take(START_FILE_MAX_BYTES)).lines();
        let touches = lines.map(|line| {
            let line = line.map_err(|error| Error::io(&error, path.display().to_string()))?;
            touch(&line, image).map_err(|error| error.context(path.display()))
        });
        let touches = touches.collect::<Result<Vec<_>>>()?;
        let bytes: u64 = touches.iter().map(|touch| touch.range.end - touch.range.start).sum();
        if touches.len() > START_TOUCHES_MAX || bytes > START_TOUCHED_MAX_BYTES {
            return Err(malformed!("{}: more than a start needs", path.display()));
        }
        Ok(touches)
    }

    /// Keeps what an image's starts needed; the longest unchanged files make room.
    fn write(&self, image: &Image, touches: &[Fault]) -> Result<()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.path(image);
        let part = self.directory.join(format!("unfinished.{}", std::process::id()));
        let written = File::create(&part).and_then(|file| {
            let mut file = BufWriter::new(file);
            for touch in touches {
                let Fault { blob_index: blob, range, elapsed_ns } = touch;
                let (offset, length) = (range.start, range.end - range.start);
                let t_ms = elapsed_ns / MILLISECOND_NS;
                let line = Line { blob: *blob, offset, length, t_ms };
                writeln!(file, "{}", json!(line))?;
            }
            file.flush()?;
            std::fs::rename(&part, &path)
        });
        written.map_err(|error| {
            let _ = std::fs::remove_file(&part);
            Error::io(&error, format!("cannot write {}", path.display()))
        })?;
        self.prune(STARTS_KEPT_MAX)
    }

    /// Removes the longest unchanged files above a number.
    fn prune(&self, kept: usize) -> Result<()> {
        let failed =
            |error: std::io::Error| Error::io(&error, self.directory.display().to_string());
        let mut files: Vec<(SystemTime, PathBuf)> = Vec::new();
        for entry in std::fs::read_dir(&self.directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            // One that is gone meanwhile is no concern.
            let changed = entry.metadata().and_then(|metadata| metadata.modified());
            files.extend(changed.ok().map(|changed| (changed, entry.path())));
        }
        files.sort();
        let excess = files.len().saturating_sub(kept);
        for (_, path) in files.into_iter().take(excess) {
            let _ = std::fs::remove_file(path);
        }
        Ok(())
    }

    fn path(&self, image: &Image) -> PathBuf {
        self.directory.join(image.bootstrap_digest.to_string())
    }
}

/// One line, which must be of this image.
fn touch(line: &str, image: &Image) -> Result<Fault> {
    let Line { blob, offset, length, t_ms } = serde_json::from_str(line)
        .map_err(|error| malformed!("{error}; it is written anew at the image's next start"))?;
    let size = image.blobs.get(blob as usize).map(|blob| blob.uncompressed_size_bytes);
    let size = size.map_or(0, |size| size.next_multiple_of(PAGE_BYTES));
    let end = offset.checked_add(length).filter(|&end| offset < end && end <= size);
    match end.filter(|_| offset % PAGE_BYTES == 0 && length % PAGE_BYTES == 0) {
        Some(end) => Ok(Fault {
            blob_index: blob,
            range: offset..end,
            elapsed_ns: t_ms.saturating_mul(MILLISECOND_NS),
        }),
        None => Err(malformed!("blob {blob} has no pages at {offset} + {length}")),
    }
}

impl ControlPlane {
    /// Tells a new image what its starts need, or that nobody wants to know.
    pub(super) fn recall_start(&self, image: &Image) {
        let Some(starts) = &self.starts else { return image.touches.rest() };
        match starts.read(image) {
            Ok(touches) => image.touches.recall(&touches),
            Err(error) => self.journal.error(format!("a kept start is passed over: {error}")),
        }
    }

    /// Writes down what an image's start needed, if that is over, or in any case.
    pub(super) fn keep_start(&self, image: &Image, is_end: bool) {
        let Some(starts) = &self.starts else { return };
        let Some(touches) = image.touches.end(monotonic_ns(), is_end) else { return };
        let (domain_id, id) = (&image.domain_id, &image.id);
        match starts.write(image, &touches) {
            Ok(()) => self.journal.write(Level::Debug, || {
                format!("image {domain_id}/{id}: a start's {} touches are kept", touches.len())
            }),
            Err(error) => self.journal.error(format!("image {domain_id}/{id}: {error}")),
        }
    }

    /// The same for all images.
    pub(super) fn keep_starts(&self, is_end: bool) {
        self.catalog.images().iter().for_each(|image| self.keep_start(image, is_end));
    }

    /// What the starts of a registered image needed, this one's so far included: lines of a trace.
    pub(super) fn start_of(&self, domain_id: &str, id: &str) -> Result<Value> {
        let image = self.catalog.image(domain_id, id).ok_or_else(|| {
            Error::NotFound(format!("no image {domain_id}/{id} is registered; mount it first"))
        })?;
        if self.starts.is_none() {
            return Err(Error::Unsupported(
                "this daemon learns nothing of starts; start it with --learn-starts true".into(),
            ));
        }
        Ok(json!({ "touches": touched_files::lines(&image, &image.touches.all())? }))
    }
}

impl StartKeeper {
    /// Starts the thread.
    ///
    /// # Errors
    /// What the system says.
    pub fn start(control: &Arc<ControlPlane>) -> Result<StartKeeper> {
        let (stop, stopped) = crossbeam_channel::bounded(1);
        let control = Arc::downgrade(control);
        let work = move || {
            let pause = Duration::from_millis(START_LOOK_MS);
            while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                let Some(control) = control.upgrade() else { break };
                control.keep_starts(false);
            }
        };
        let thread = std::thread::Builder::new().name("starts".into()).spawn(work);
        let thread = thread.map_err(|error| Error::io(&error, "a thread for kept starts"))?;
        Ok(StartKeeper { stop, thread })
    }

    /// Ends the thread.
    pub fn stop(self) {
        let _ = self.stop.send(());
        let _ = self.thread.join();
    }
}

#[cfg(test)]
mod tests {
    use super::super::control_tests::fixture;
    use super::*;
    use crate::blob::catalog::Catalog;
    use crate::blob::registration::{ImageSpec, PrefetchConfig};
    use crate::registry::config::Backend;

    fn image(work_dir: &Path) -> Arc<Image> {
        let config = json!({ "dir": work_dir });
        let spec = ImageSpec {
            domain_id: String::new(),
            id: "i".into(),
            config_id: String::new(),
            metadata_path: fixture("zstd-64k"),
            backend: Backend::parse("localfs", &config).expect("a good backend"),
            work_dir: work_dir.to_owned(),
            prefetch: PrefetchConfig::default(),
        };
        Catalog::default().register_if(spec, |_, _| Ok(())).expect("a good image")
    }

    fn touches() -> Vec<Fault> {
        let touch = |range, elapsed_ns| Fault { blob_index: 0, range, elapsed_ns };
        vec![touch(8192..12288, 0), touch(0..4096, 7 * MILLISECOND_NS)]
    }

    #[test]
    fn a_start_is_read_back_as_it_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let (starts, image) = (Starts::open(directory.path()).unwrap(), image(directory.path()));
        assert!(starts.read(&image).unwrap().is_empty());
        starts.write(&image, &touches()).unwrap();
        assert_eq!(starts.read(&image).unwrap(), touches());
        starts.write(&image, &touches()[..1]).unwrap();
        assert_eq!(starts.read(&image).unwrap(), touches()[..1]);
        let names = std::fs::read_dir(&starts.directory).unwrap().count();
        assert_eq!(names, 1, "nothing unfinished is left");
    }

    #[test]
    fn images_of_one_bootstrap_write_one_after_the_other() {
        let directory = tempfile::tempdir().unwrap();
        let (starts, image) = (Starts::open(directory.path()).unwrap(), image(directory.path()));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..50).for_each(|_| starts.write(&image, &touches()).unwrap()));
            }
        });
        assert_eq!(starts.read(&image).unwrap(), touches());
    }

    #[test]
    fn what_is_not_of_the_image_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let (starts, image) = (Starts::open(directory.path()).unwrap(), image(directory.path()));
        let size = image.blobs[0].uncompressed_size_bytes.next_multiple_of(PAGE_BYTES);
        let line = |blob: u32, offset: u64, length: u64| {
            json!({"blob": blob, "offset": offset, "length": length, "t_ms": 0}).to_string()
        };
        std::fs::write(starts.path(&image), line(0, 0, size)).unwrap();
        assert_eq!(starts.read(&image).unwrap().len(), 1);
        let many = line(0, 0, 4096) + "\n";
        for bad in [
            line(1, 0, 4096),
            line(0, 0, size + 4096),
            line(0, 1, 4096),
            line(0, 0, 1),
            line(0, 4096, 0),
            line(0, u64::MAX - 4095, 4096),
            "{}".to_owned(),
            "\u{0}".to_owned(),
            line(0, 0, 4096)[..20].to_owned(),
            many.repeat(START_TOUCHES_MAX + 1),
        ] {
            std::fs::write(starts.path(&image), &bad).unwrap();
            let error = starts.read(&image).expect_err(&bad).to_string();
            assert!(error.contains(starts.path(&image).to_str().unwrap()), "{error}");
        }
        std::fs::write(starts.path(&image), b"\xff\xfe").unwrap();
        assert!(starts.read(&image).is_err());
    }

    #[test]
    fn the_longest_unchanged_make_room() {
        let directory = tempfile::tempdir().unwrap();
        let starts = Starts::open(directory.path()).unwrap();
        for (name, age_s) in [("a", 3), ("b", 1), ("c", 2)] {
            let file = File::create(starts.directory.join(name)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age_s)).unwrap();
        }
        starts.prune(2).unwrap();
        assert!(!starts.directory.join("a").exists());
        assert!(starts.directory.join("b").exists() && starts.directory.join("c").exists());
    }
}
