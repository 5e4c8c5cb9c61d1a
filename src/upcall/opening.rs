//! Opens: from a cookie to what it stands for, in every core's table, and then the answer.

use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::cachefiles::{MessageId, ObjectId};
use super::intake::Door;
use super::objects::{DoorMail, OpenBootstrap, Opened, RefusedObject};
use crate::blob::catalog::{Holder, Registered};
use crate::blob::journal::Level;
use crate::blob::statistics::{Counter, Stage};
use crate::config::{LAYOUT_LOOK_NS, REFUSED_OBJECT_NS};
use crate::engine::{Call, Fd};
use crate::error::{Error, Result};
use crate::store::object::CacheObject;

/// An OPEN that has been taken from the device.
pub(super) struct OpenJob {
    id: MessageId,
    object: ObjectId,
    file: (Fd, Option<OwnedFd>),
    domain: String,
    cookie: String,
    taken_ns: u64,
}

impl OpenJob {
    /// What the message says; keys that are not text name nothing that is registered.
    pub(super) fn new(
        id: MessageId,
        object: ObjectId,
        file: (Fd, Option<OwnedFd>),
        (volume, cookie): (&[u8], &[u8]),
        taken_ns: u64,
    ) -> Self {
        let domain = String::from_utf8_lossy(volume).into_owned();
        let cookie = String::from_utf8_lossy(cookie).into_owned();
        OpenJob { id, object, file, domain, cookie, taken_ns }
    }
}

impl Door {
    pub(super) async fn serve_opens(self: Rc<Self>) {
        loop {
            let job = self.opens.pop(&self.crew.core, |_| true).await;
            self.slot_freed.wake_all(&self.crew.core);
            let _inside = self.crew.gate.enter(&self.crew.core);
            self.serve_open(job).await;
        }
    }

    async fn serve_open(&self, job: OpenJob) {
        let OpenJob { id, object, file, domain, cookie, taken_ns } = job;
        let journal = &self.crew.parts.journal;
        let spare = self.reopened(&file);
        let opened = self.open(file, &domain, &cookie).await;
        if let (Ok((Opened::Data(blob), _)), Some(_)) = (&opened, &spare) {
            blob.image.touches.resume();
        }
        if opened.is_err() && self.is_handing_over.get() {
            // The successor is asked the same.
            self.device.unanswered_opens().fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let opened = opened.or_else(|error| {
            self.crew.parts.counters.count(Counter::OpensRefused);
            journal.error(format!("open of {domain}/{cookie}: {error}"));
            spare.map(|spare| self.refused(spare)).ok_or(error)
        });
        let answer = match &opened {
            Ok((opened, size)) => {
                self.install_everywhere(object, opened).await;
                Ok(*size)
            }
            Err(error) => Err(error.errno()),
        };
        let answered = self.device.answer_open(&self.crew.core, id, answer);
        self.device.unanswered_opens().fetch_sub(1, Ordering::Relaxed);
        self.crew.record(Stage::Open, taken_ns);
        if let Err(error) = answered {
            journal.write(Level::Warn, || format!("open of {domain}/{cookie}: {error}"));
            self.tell_all(|| DoorMail::Remove(object)).await;
            return;
        }
        if let Ok((Opened::Data(blob), _)) = opened
            && blob.image.is_fetched_ahead(blob.blob_index)
        {
            self.crew.prefetch_later(blob);
        }
    }

    /// The file once more and its size, when it is that of an object the predecessor had open: only
    /// then has the kernel attached the file of the cache, which tells its end.
    fn reopened(&self, (fd, guard): &(Fd, Option<OwnedFd>)) -> Option<(OwnedFd, u64)> {
        if !self.device.is_inherited() {
            return None;
        }
        let size = self.crew.core.call(Call::Seek(*fd, 0, libc::SEEK_END)).ok()?;
        Some((guard.as_ref()?.try_clone().ok()?, size))
    }

    /// An object whose reads get EIO for a while.
    fn refused(&self, (file, size): (OwnedFd, u64)) -> (Opened, u64) {
        let object = CacheObject::new(Fd(file.as_raw_fd()), Some(file), size);
        let until_ns = self.crew.core.now() + REFUSED_OBJECT_NS;
        (Opened::Refused(Arc::new(RefusedObject { object, until_ns })), size)
    }

    /// What a cookie stands for. While a restart goes on, waits for what has yet to come back: the
    /// image of a bootstrap, or of a blob all images of its domain, since each may list other
    /// chunks.
    async fn registered(&self, domain: &str, cookie: &str) -> Result<Registered> {
        let (core, catalog) = (&self.crew.core, &self.crew.parts.catalog);
        let deadline_ns = core.now() + self.crew.parts.fault_deadline_ns;
        loop {
            let is_due = catalog.awaited.is_due(domain);
            let found = catalog.object(domain, cookie);
            match found {
                Some(Registered::Bootstrap { .. }) => {}
                Some(Registered::Data { .. }) | None if !is_due => {}
                _ if core.now() >= deadline_ns || self.crew.gate.is_closed() => {}
                _ => {
                    core.sleep(LAYOUT_LOOK_NS).await?;
                    continue;
                }
            }
            return found.ok_or_else(|| {
                let text = "not registered: PUT it to /api/v2/blobs before it is mounted";
                Error::NotFound(text.into())
            });
        }
    }

    async fn open(
        &self,
        (fd, guard): (Fd, Option<OwnedFd>),
        domain: &str,
        cookie: &str,
    ) -> Result<(Opened, u64)> {
        if self.crew.gate.is_closed() {
            return Err(Error::Shutdown);
        }
        match self.registered(domain, cookie).await? {
            Registered::Bootstrap { image } => {
                let size = image.bootstrap_size_bytes;
                let object = CacheObject::new(fd, guard, size);
                let (is_filled, is_filling) = (AtomicBool::new(false), AtomicBool::new(false));
                let bootstrap = OpenBootstrap { image, object, is_filled, is_filling };
                Ok((Opened::Bootstrap(Arc::new(bootstrap)), size))
            }
            Registered::Data { image, blob_index, others } => {
                let size = image.blobs[blob_index as usize].uncompressed_size_bytes;
                let route = self.parts.routes.route(&image.backend)?;
                let mut holders = vec![Holder { image, blob_index }];
                holders.extend(others);
                let object = CacheObject::new(fd, guard, size);
                let blob = self.crew.open_blob(holders, route, object).await?;
                Ok((Opened::Data(blob), size))
            }
        }
    }

    /// Puts an object into all cores' tables and waits until it is in each.
    async fn install_everywhere(&self, object: ObjectId, opened: &Opened) {
        let missing = Arc::new(AtomicUsize::new(self.parts.cores.len()));
        self.tell_all(|| DoorMail::Install {
            object,
            opened: opened.clone(),
            missing: Arc::clone(&missing),
            opener: self.crew.id(),
        })
        .await;
        loop {
            let told = self.installed.wait(&self.crew.core);
            if missing.load(Ordering::Acquire) == 0 || self.crew.gate.is_closed() {
                return;
            }
            told.by(self.crew.core.now() + LAYOUT_LOOK_NS).await;
        }
    }
}
