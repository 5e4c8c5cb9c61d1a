//! Coming back: what the last daemon had registered is registered again, from disk.
//!
//! The door serves meanwhile; what the kernel asks for is read back first. An image that can no
//! longer be registered is said, skipped and, when it will not heal by itself, put aside; it never
//! keeps the daemon or another image from coming back. One that is mounted and may heal is tried
//! again, since its readers get errors once it is skipped. A client that does not know of the
//! restart may register everything again as it did at first: what is the same is there already,
//! what is not replaces what was remembered.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::admission;
use super::comeback::{Comeback, Queue};
use super::control::ControlPlane;
use super::entry::{Entry, Refusal};
use super::mounts::{Door, Place};
use super::remember::{Key, Record, Remembered, RememberedMount};
use crate::blob::journal::Level;
use crate::blob::registration::{Image, ImageSpec};
use crate::config::{CONTROL_QUEUE_WAIT_MS, RESTORE_THREADS};
use crate::error::{Error, Result};

/// What came back from disk and no client has spoken of since.
#[derive(Debug, Default)]
pub struct Restored {
    entries: Mutex<BTreeMap<Key, Value>>,
    count: AtomicUsize,
    skipped: AtomicUsize,
}

/// What a client means who registers an image that is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It has been registered since the daemon started.
    Taken,
    /// The very same came back from disk.
    Same,
    /// Something else came back from disk under this name.
    Other,
}

impl Restored {
    /// A client registers `key` with `body`; from now on it is registered by a client.
    pub fn claim(&self, key: &Key, body: &[u8]) -> Claim {
        match self.lock().remove(key) {
            None => Claim::Taken,
            Some(known) if serde_json::from_slice(body).is_ok_and(|body: Value| body == known) => {
                Claim::Same
            }
            Some(_) => Claim::Other,
        }
    }

    /// For statistics.
    pub fn document(&self) -> Value {
        json!({
            "images": self.count.load(Ordering::Relaxed),
            "skipped": self.skipped.load(Ordering::Relaxed),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Key, Value>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A restart under way.
#[must_use]
pub struct Restoration {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

impl Restoration {
    /// Begins to register what is remembered and not registered. The door may serve as soon as this
    /// returns: it knows what is to come.
    pub fn begin(control: &Arc<ControlPlane>, remembered: &Arc<Remembered>) -> Restoration {
        let is_missing =
            |record: &Record| control.catalog.object(&record.domain_id, &record.id).is_none();
        let records: Vec<Record> = remembered.records().into_iter().filter(is_missing).collect();
        for record in &records {
            control.catalog.awaited.expect(&record.domain_id);
        }
        if records.is_empty() {
            control.mounts.set_restored();
        }
        let (count, since) = (records.len(), Instant::now());
        let (queue, left) = (Queue::of(records), Arc::new(AtomicUsize::new(count)));
        let work = || {
            let (control, remembered) = (Arc::clone(control), Arc::clone(remembered));
            let (queue, left) = (Arc::clone(&queue), Arc::clone(&left));
            move || {
                while let Some(comeback) = queue.next(|| control.catalog.awaited.urgent()) {
                    let domain_id = comeback.record.domain_id.clone();
                    if bring_back(&control, &remembered, &queue, comeback) == Outcome::Later {
                        continue;
                    }
                    control.catalog.awaited.settle(&domain_id);
                    if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                        control.mounts.set_restored();
                        let skipped = control.restored.skipped.load(Ordering::Relaxed);
                        let took_ms = since.elapsed().as_millis();
                        control.journal.write(Level::Info, || {
                            format!("{count} images read back in {took_ms} ms, {skipped} skipped")
                        });
                    }
                }
            }
        };
        let spawn = |_| std::thread::Builder::new().name("restore".into()).spawn(work()).ok();
        let threads: Vec<_> = (0..RESTORE_THREADS.min(count)).filter_map(spawn).collect();
        if threads.is_empty() {
            // There is nothing to do, or no thread to be had: slower, and as good.
            work()();
        }
        Restoration { queue, threads }
    }

    /// Ends as soon as what is under way has come back.
    pub fn abandon(self) {
        self.queue.close();
        self.finish();
    }

    /// Waits until everything has come back or has been skipped.
    pub fn finish(self) {
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

/// How a try ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The image has come back, or will not before the next start.
    Settled,
    /// It is tried again.
    Later,
}

/// Tries to register an image, and to take up its mounts.
pub fn bring_back(
    control: &ControlPlane,
    remembered: &Remembered,
    queue: &Queue,
    mut comeback: Comeback,
) -> Outcome {
    let (domain, id) = comeback.record.key();
    // A client that lost patience may have had the whole domain forgotten meanwhile.
    let is_wanted = || remembered.find(&domain, &id).is_some();
    if !is_wanted() {
        return Outcome::Settled;
    }
    let known = control.catalog.image(&domain, &id).filter(|_| comeback.is_registered);
    let registered = known.map_or_else(|| register(control, &comeback.record), Ok);
    let error = match registered {
        Ok(image) if is_wanted() => {
            match adopt_mounts(control, remembered, &comeback.record, &image) {
                Err(error) if is_passing(&error) => {
                    comeback.is_registered = true;
                    error
                }
                _ => {
                    control.restored.count.fetch_add(1, Ordering::Relaxed);
                    return Outcome::Settled;
                }
            }
        }
        Ok(_) => {
            // It is gone already if that is refused.
            let _ = control.catalog.unregister(&domain, &id);
            return Outcome::Settled;
        }
        // A client was faster.
        Err(Error::Exists(_)) => return Outcome::Settled,
        Err(error) => error,
    };
    let is_mounted = !comeback.record.mounts.is_empty();
    let is_registered = comeback.is_registered;
    if is_mounted && is_passing(&error) && queue.again(comeback) {
        let text = || format!("image {domain}/{id} is tried again: {error}");
        control.journal.write(Level::Warn, text);
        return Outcome::Later;
    }
    if is_registered {
        // What is wrong with its mounts has been said.
        control.restored.count.fetch_add(1, Ordering::Relaxed);
        return Outcome::Settled;
    }
    control.restored.skipped.fetch_add(1, Ordering::Relaxed);
    let fate = match is_hopeless(&error) {
        true => remembered.set_aside(&(domain.clone(), id.clone())).err().map_or_else(
            || "it is put aside".to_owned(),
            |error| format!("it cannot be put aside: {error}"),
        ),
        false => "the next start tries again".to_owned(),
    };
    control.journal.error(format!("image {domain}/{id} does not come back, {fate}: {error}"));
    Outcome::Settled
}

/// Takes up the mounts the last daemon made of an image. What was unmounted since is forgotten; an
/// image that is mounted nowhere any more goes as with its last unmount. One error of those there
/// were, all of which are said.
fn adopt_mounts(
    control: &ControlPlane,
    remembered: &Remembered,
    record: &Record,
    image: &Arc<Image>,
) -> Result<()> {
    if record.mounts.is_empty() {
        return Ok(());
    }
    let _turn = control.mounts.turn();
    // At a second try a client may have mounted and unmounted since the first.
    let (domain, id) = (&image.domain_id, &image.id);
    let mounts = remembered.find(domain, id).map(|record| record.mounts).unwrap_or_default();
    let mut failure = None;
    let is_left = |mount: &&RememberedMount| {
        let RememberedMount { namespace, mountpoint, door } = mount;
        let at = Place { namespace: *namespace, mountpoint: mountpoint.clone() };
        let adopted = Door::named(door).map(|door| control.mounts.adopt(image, &at, door));
        adopted.unwrap_or(Ok(false)).unwrap_or_else(|error| {
            let place = mountpoint.display();
            control.journal.error(format!("image {domain}/{id}, mounted at {place}: {error}"));
            failure = Some(error);
            true
        })
    };
    let left: Vec<_> = mounts.iter().filter(is_left).cloned().collect();
    let told = match left.is_empty() {
        true => control.unregister(domain, id),
        false => remembered.set_mounts(&(domain.clone(), id.clone()), left),
    };
    if let Err(error) = told {
        control.journal.error(error.to_string());
    }
    failure.map_or(Ok(()), Err)
}

/// Whether another try in a moment may succeed.
fn is_passing(error: &Error) -> bool {
    let may_pass =
        matches!(error, Error::System { .. } | Error::Busy(_) | Error::Unavailable { .. });
    may_pass && !is_hopeless(error)
}

/// Whether another try after the next start would fail the same way.
fn is_hopeless(error: &Error) -> bool {
    match error {
        Error::Malformed(_) | Error::Digest(_) | Error::NotFound(_) => true,
        Error::System { errno, .. } => matches!(*errno, libc::ENOENT | libc::ENOTDIR | libc::ELOOP),
        _ => false,
    }
}

fn register(control: &ControlPlane, record: &Record) -> Result<Arc<Image>> {
    let spec = spec_of(record)?;
    control.restored.lock().insert(record.key(), record.entry.clone());
    let registered = control.catalog.register_if(spec, |image, bootstrap| {
        if image.bootstrap_digest.to_string() != record.bootstrap {
            return Err(Error::Digest(format!(
                "{} is not the bootstrap that was registered; register the image again",
                image.bootstrap_path.display()
            )));
        }
        let ledger = control.ledger.as_ref();
        ledger.map_or(Ok(()), |it| admission::admit(it, &control.catalog, image, bootstrap))
    });
    match &registered {
        Ok(image) => control.recall_start(image),
        Err(_) => drop(control.restored.lock().remove(&record.key())),
    }
    registered
}

fn spec_of(record: &Record) -> Result<ImageSpec> {
    let entry = Entry::parse(&record.body()).map_err(|refusal| match refusal {
        Refusal::Parse(error) => Error::Malformed(error.to_string()),
        Refusal::Refused(reason) => Error::Malformed(reason),
    })?;
    let mut spec = entry.into_spec()?;
    let domain_id = if spec.domain_id.is_empty() { &spec.id } else { &spec.domain_id };
    if (domain_id, &spec.id) != (&record.domain_id, &record.id) {
        return Err(Error::Malformed("its entry is that of another image".into()));
    }
    // The daemon may have been started from somewhere else.
    spec.metadata_path = record.directory.join(spec.metadata_path);
    spec.work_dir = record.directory.join(spec.work_dir);
    Ok(spec)
}

/// Lets a call about a domain wait until its images have come back, as long as calls may wait.
pub fn wait_for(control: &ControlPlane, domain_id: &str) {
    control.catalog.awaited.wait(domain_id, Duration::from_millis(CONTROL_QUEUE_WAIT_MS));
}
