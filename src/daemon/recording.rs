//! `sluice mount --trace FILE`: what a start touches first, written down when the mount goes.
//!
//! The file is made at once, so that a bad name is said at once, and in the mount namespace of
//! whoever asks; it is filled when the image is unmounted, by whomever, or the daemon goes down. A
//! daemon that dies takes its recordings along.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::control::ControlPlane;
use super::mounts::Place;
use super::touched_files;
use crate::blob::journal::Level;
use crate::blob::recorder::{Faults, Recording};
use crate::blob::registration::Image;
use crate::config::RECORDINGS_MAX;
use crate::error::{Error, Result};
use crate::upcall::mounting;

/// The mounts whose first touches are recorded, and where they are written.
#[derive(Debug, Default)]
pub struct Recordings(Mutex<Vec<(Place, File, Arc<Recording>)>>);

impl ControlPlane {
    /// Makes the file of a recording as `peer` sees it.
    pub(super) fn open_trace(&self, path: &Path, peer: Option<u32>) -> Result<File> {
        let others = self.recordings.0.lock().unwrap_or_else(PoisonError::into_inner).len();
        if others >= RECORDINGS_MAX {
            return Err(Error::Busy(format!(
                "{others} images are being traced; umount some first"
            )));
        }
        mounting::create_file(path, peer)
    }

    /// Goes on recording an image that has been mounted, until it is unmounted.
    pub(super) fn keep_recording(&self, at: &Place, file: File, recording: Arc<Recording>) {
        let mut recordings = self.recordings.0.lock().unwrap_or_else(PoisonError::into_inner);
        recordings.push((at.clone(), file, recording));
        drop(recordings);
        // What is on the node already is heard of as well.
        if let Some(binder) = self.mounts.binder() {
            let group = binder.group();
            for segment in binder.bindings().complete_segments() {
                if let Err(error) = group.unignore(segment.directory.fd(), segment.name()) {
                    self.journal.error(error.to_string());
                }
            }
        }
    }

    /// Writes down the recordings of mounts that are there no more; of all at the end.
    pub(super) fn end_recordings(&self, is_end: bool) {
        let mounted: BTreeSet<Place> =
            self.mounts.list().into_iter().map(|(place, _)| place).collect();
        let is_over = |entry: &mut (Place, File, _)| is_end || !mounted.contains(&entry.0);
        let mut recordings = self.recordings.0.lock().unwrap_or_else(PoisonError::into_inner);
        let over: Vec<_> = recordings.extract_if(.., is_over).collect();
        drop(recordings);
        if over.is_empty() {
            return;
        }
        for (place, file, recording) in over {
            let faults = self.catalog.recorder.end(&recording);
            let shown = place.mountpoint.display();
            match write(recording.image(), &faults, file) {
                Ok(count) => self.journal.write(Level::Info, || {
                    let lost = faults.lost_count;
                    format!("{shown}: {count} first touches recorded, {lost} found no room")
                }),
                Err(error) => self.journal.error(format!("{shown}: no trace: {error}")),
            }
        }
        if let Some(binder) = self.mounts.binder().filter(|_| !self.catalog.recorder.is_active()) {
            for segment in binder.bindings().complete_segments() {
                if let Err(error) = binder.let_pass(&segment) {
                    self.journal.error(error.to_string());
                }
            }
        }
    }
}

/// Writes the trace; gives its lines.
fn write(image: &Image, faults: &Faults, file: File) -> Result<usize> {
    let lines = touched_files::lines(image, &faults.list)?;
    let mut file = BufWriter::new(file);
    let written = lines.iter().try_for_each(|line| writeln!(file, "{line}"));
    let written = written.and_then(|()| file.flush());
    written.map_err(|error| Error::io(&error, "cannot write the trace"))?;
    Ok(lines.len())
}
