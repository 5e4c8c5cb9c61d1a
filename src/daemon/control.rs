//! What the control API's calls do.
//!
//! Owns nothing of its own but the memory of what was configured: it brings together the catalog,
//! the states, the statistics and the journal, which other threads use too. Calls run on the
//! server's threads and may run at the same time. What belongs to cores and device is reached
//! through [`Hooks`], which the daemon fills in.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value, json};

use super::api::Call;
use super::cull::Culler;
use super::evictor::Evictor;
use super::mount_wish::MountWish;
use super::mounts::{Departure, Door, Leaving, Mounts, Place};
use super::recording::Recordings;
use super::reply::{self, Identity, Response};
use super::sealer::monotonic_ns;
use super::starts::Starts;
use super::state::{Event, StateMachine};
use super::statistics::Statistics;
use super::succession::{self, Restored};
use crate::blob::catalog::Catalog;
use crate::blob::journal::{Journal, Level, level_name};
use crate::blob::registration::Image;
use crate::error::{Error, Result};
use crate::registry::secret::Secret;
use crate::store::ledger::Ledger;

/// Something the daemon does when a call asks for it.
pub type Act = Box<dyn Fn() -> Result<()> + Send + Sync>;
/// Applies new credentials.
pub type Configure = Box<dyn Fn(&Update) -> Result<()> + Send + Sync>;
/// Told about a new image, with the entry it came from; an error takes the registration back.
pub type Registered = Box<dyn Fn(&Arc<Image>, &[u8]) -> Result<()> + Send + Sync>;
/// Told about what was removed: a domain, or one id of it.
pub type Forgotten = Box<dyn Fn(&str, Option<&str>) + Send + Sync>;

/// What can be changed after the start.
#[derive(Clone, Debug, Default)]
pub struct Update {
    /// base64 of user:password, for the registry.
    pub registry_auth: Option<Secret>,
    /// The forward proxy.
    pub proxy_url: Option<String>,
}

/// The control API's way to cores, device and disk.
pub struct Hooks {
    /// Begin to serve; READY to RUNNING.
    pub start: Act,
    /// Begin to go down. Must return at once: the answer is sent after it.
    pub exit: Act,
    /// Hand state and device to the supervisor. `Unsupported` without the means.
    pub send_fd: Act,
    /// Take state and device from the supervisor; INIT to READY.
    pub takeover: Act,
    /// An image can be opened from now on: remember it, dial ahead.
    pub registered: Registered,
    /// Registrations are gone: forget them on disk too.
    pub forgotten: Forgotten,
    /// New credentials for all routes.
    pub configure: Configure,
    /// What else belongs into the statistics, under the key "daemon".
    pub more_statistics: Box<dyn Fn() -> Value + Send + Sync>,
}

/// Everything the control API speaks about. Shared by `Arc` with the server's threads.
pub struct ControlPlane {
    /// The registered images.
    pub catalog: Arc<Catalog>,
    /// The daemon's life.
    pub state: Arc<StateMachine>,
    /// Counters and histograms.
    pub statistics: Arc<Statistics>,
    /// The log.
    pub journal: Arc<Journal>,
    /// Who this daemon is.
    pub identity: Identity,
    /// Removes cache files; none without a cache directory.
    pub culler: Option<Culler>,
    /// What the cache may hold; none without a cache directory.
    pub ledger: Option<Ledger>,
    /// What is mounted.
    pub mounts: Mounts,
    /// Gives segments back; none without the fanotify door.
    pub evictor: Option<Arc<Evictor>>,
    /// The way to the rest.
    pub hooks: Hooks,
    /// Names of what was configured; the values are secrets.
    pub configured: Mutex<BTreeSet<String>>,
    /// What came back from disk at the start.
    pub restored: Restored,
    /// Mounts whose first touches are recorded.
    pub recordings: Recordings,
    /// What images needed at their starts; none if nothing is learned.
    pub starts: Option<Starts>,
}

impl Hooks {
    /// Hooks of a daemon without cores. What cannot be done is `Unsupported`, not a false success.
    pub fn idle() -> Hooks {
        let nothing = || -> Act { Box::new(|| Ok(())) };
        let without = |what: &str| Error::Unsupported(format!("this daemon cannot {what}"));
        Hooks {
            start: nothing(),
            exit: nothing(),
            send_fd: Box::new(move || Err(without("hand its state over"))),
            takeover: Box::new(move || Err(without("take a state over"))),
            registered: Box::new(|_, _| Ok(())),
            forgotten: Box::new(|_, _| ()),
            configure: Box::new(move |_| Err(without("change credentials while it runs"))),
            more_statistics: Box::new(|| Value::Null),
        }
    }
}

impl ControlPlane {
    /// Does what `call` says. May wait if `call.may_wait()`.
    pub fn perform(&self, call: Call) -> Response {
        match call {
            Call::Daemon => reply::document(&reply::daemon(&self.identity, self.state.state())),
            Call::SetLevel(level) => {
                self.journal.set_level(level);
                reply::done()
            }
            Call::Events => reply::document(&reply::events(&self.journal.errors())),
            Call::Start => self.transition("Configure", Event::Start, &self.hooks.start),
            Call::Exit => self.transition("Configure", Event::Exit, &self.hooks.exit),
            Call::SendFd => self.send_fd(),
            Call::Takeover => self.transition("Upgrade", Event::Takeover, &self.hooks.takeover),
            Call::BackendMetrics { id } => {
                let metrics = self.statistics.backend(&self.catalog.images(), id.as_deref());
                counted("BackendMetrics", metrics)
            }
            Call::BlobcacheMetrics { id } => {
                let metrics = self.statistics.blobcache(&self.catalog.images(), id.as_deref());
                counted("BlobcacheMetrics", metrics)
            }
            Call::Config { .. } => reply::document(&self.configuration()),
            Call::Configure { id, changes } => match self.configure(id.as_deref(), &changes) {
                Err(Error::Unsupported(_)) => reply::unsupported("Configure"),
                outcome => answer("Configure", outcome),
            },
            Call::Register { entry, body } => {
                answer("CreateBlobObject", self.register(*entry, &body).map(|_| ()))
            }
            Call::List { domain_id, id } => {
                reply::document(&reply::listing(&self.catalog.list(&domain_id, id.as_deref())))
            }
            Call::UnregisterDomain { domain_id } => {
                succession::wait_for(self, &domain_id);
                if let Err(error) = self.check_unused(&domain_id, None) {
                    return reply::failed("DeleteBlobObject", &error);
                }
                let images = self.catalog.images();
                let of_domain = images.iter().filter(|image| image.domain_id == domain_id);
                of_domain.for_each(|image| self.keep_start(image, true));
                self.catalog.unregister_domain(&domain_id);
                (self.hooks.forgotten)(&domain_id, None);
                reply::done()
            }
            Call::Unregister { domain_id, id } => {
                succession::wait_for(self, &domain_id);
                let unused = self.check_unused(&domain_id, Some(&id));
                answer("DeleteBlobObject", unused.and_then(|()| self.unregister(&domain_id, &id)))
            }
            Call::Cull { blob_id } => self.cull(&blob_id),
            Call::Mount { wish, peer } => told(self.mount(*wish, peer)),
            Call::Unmount { mountpoint, lazy, keep, peer } => {
                match self.unmount(&mountpoint, peer, lazy, keep) {
                    Ok(()) => reply::done(),
                    Err(error) => reply::told(&error),
                }
            }
            Call::Mounts => reply::document(&reply::mounts(&self.mounts.list())),
            Call::Stat => reply::document(&self.stat()),
            Call::Starts(starts) => {
                self.statistics.count_starts(starts);
                reply::done()
            }
            Call::Images => told(self.images()),
            Call::Cache => told(self.cache()),
            Call::Touches { domain_id, id } => told(self.start_of(&domain_id, &id)),
            Call::CollectGarbage => told(self.collect_garbage()),
        }
    }

    /// Registers an image, unless it is, and mounts it.
    fn mount(&self, wish: MountWish, peer: Option<u32>) -> Result<Value> {
        let at = Place::seen_by(&wish.mountpoint, peer)?;
        let door = self.mounts.door(wish.door)?;
        let trace = wish.trace.map(|path| self.open_trace(&path, peer)).transpose()?;
        let spec = wish.entry.clone().into_spec()?;
        let domain_id = if spec.domain_id.is_empty() { &spec.id } else { &spec.domain_id };
        succession::wait_for(self, domain_id);
        let _turn = self.mounts.turn();
        let known = self.catalog.image(domain_id, &spec.id);
        let is_mounted = !self.mounts.places(domain_id, &spec.id).is_empty();
        let image = match known {
            // Somebody reads it: it must be the same image.
            Some(image) if is_mounted => {
                if !image.has_bootstrap(&spec.metadata_path) {
                    return Err(Error::Exists(format!(
                        "image {domain_id}/{} is mounted with another bootstrap; choose another id",
                        spec.id
                    )));
                }
                image
            }
            // Left there by a mount that went away. Its bytes may be the same, its registry need
            // not be: what is said now counts.
            Some(_) => {
                self.unregister(domain_id, &spec.id)?;
                self.register(wish.entry, &wish.body)?
            }
            None => self.register(wish.entry, &wish.body)?,
        };
        // Before anything is fetched for it.
        let trace = trace.map(|file| (file, self.catalog.recorder.begin(&image, monotonic_ns())));
        if let Err(error) = self.mounts.mount(&image, &at, peer, door) {
            if let Some((_, recording)) = trace {
                self.catalog.recorder.end(&recording);
            }
            if !is_mounted {
                self.unregister(&image.domain_id, &image.id)?;
            }
            return Err(error);
        }
        if let Some((file, recording)) = trace {
            self.keep_recording(&at, file, recording);
        }
        let (id, domain_id) = (&image.id, &image.domain_id);
        self.journal.write(Level::Info, || {
            format!("image {domain_id}/{id} mounted at {}", at.mountpoint.display())
        });
        Ok(json!({ "id": id, "domain_id": domain_id, "door": door.name() }))
    }

    /// Takes a mount away and, with an image's last, its registration.
    fn unmount(&self, mountpoint: &Path, peer: Option<u32>, lazy: bool, keep: bool) -> Result<()> {
        let at = Place::seen_by(mountpoint, peer)?;
        let _turn = self.mounts.turn();
        let departure = if lazy { Departure::Lazy } else { Departure::Plain };
        let (mounted, over) = self.mounts.unmount(&at, peer, departure, keep)?;
        self.end_recordings(false);
        self.journal.write(Level::Info, || {
            let (domain_id, id) = (&mounted.domain_id, &mounted.id);
            let lingers = over.is_none() && self.mounts.places(domain_id, id).is_empty();
            let fate = if lingers { "; it is still in use, and served" } else { "" };
            format!("image {domain_id}/{id} unmounted from {}{fate}", mountpoint.display())
        });
        // Behind the cachefiles door nobody can tell when the last user of a mount that is lazily
        // gone has gone, too: the image stays.
        let may_go = !lazy || mounted.door == Door::Fanotify;
        if let Some(leaving) = over.filter(|_| may_go) {
            self.let_go(&leaving);
        }
        Ok(())
    }

    /// Notices what was unmounted by hand, and who has read what lingered to the end.
    pub(super) fn reconcile(&self) {
        for leaving in self.mounts.reconcile() {
            self.let_go(&leaving);
        }
        self.end_recordings(false);
    }

    /// Nobody can read an image any more.
    fn let_go(&self, leaving: &Leaving) {
        let Leaving { image, is_kept } = leaving;
        let (domain_id, id) = (&image.domain_id, &image.id);
        self.mounts.forget(image);
        // Somebody may have unregistered it before, and another under its name since.
        let registered = self.catalog.image(domain_id, id);
        let is_registered = registered.is_some_and(|known| Arc::ptr_eq(&known, image));
        if is_registered && !is_kept {
            let _ = self.unregister(domain_id, id);
        }
    }

    /// The daemon goes down: what no mounted image needs any more is taken away.
    pub fn close_doors(&self) {
        let _turn = self.mounts.turn();
        self.reconcile();
        self.end_recordings(true);
        self.keep_starts(true);
        if let Err(error) = self.mounts.close() {
            self.journal.error(format!("the door's own mount stays: {error}"));
        }
    }

    /// Looks after what was unmounted by hand, from time to time.
    pub fn look_after_mounts(&self) {
        let _turn = self.mounts.turn();
        self.reconcile();
    }

    fn transition(&self, kind: &str, event: Event, work: &Act) -> Response {
        match self.state.apply(event, work) {
            Ok(()) => reply::done(),
            Err(why) => reply::refused(kind, &why),
        }
    }

    /// Without a supervisor there is nobody to hand anything to, and that is no error.
    fn send_fd(&self) -> Response {
        if self.identity.supervisor.is_none() {
            return reply::done();
        }
        match (self.hooks.send_fd)() {
            Err(Error::Unsupported(_)) => reply::unsupported("Upgrade"),
            outcome => answer("Upgrade", outcome),
        }
    }

    fn cull(&self, blob_id: &str) -> Response {
        let Some(culler) = &self.culler else { return reply::unsupported("DeleteBlobFile") };
        answer("DeleteBlobFile", culler.cull(blob_id))
    }

    fn configure(
        &self,
        id: Option<&str>,
        changes: &std::collections::BTreeMap<String, String>,
    ) -> Result<()> {
        let mut update = Update::default();
        for (key, value) in changes {
            match key.as_str() {
                "registry_auth" => update.registry_auth = Some(Secret::new(checked_auth(value)?)),
                "proxy_url" => update.proxy_url = Some(value.clone()),
                _ => {
                    return Err(Error::Malformed(format!(
                        "{key:?} cannot be changed; registry_auth and proxy_url can"
                    )));
                }
            }
        }
        if changes.is_empty() {
            return Ok(());
        }
        // All images share what nydusd keeps under "/"; what it keeps under another id is for none
        // of them. One image's password is not for the registries of the others.
        if let Some(id) = id.filter(|id| *id != "/") {
            return Err(Error::NotFound(format!(
                "configuration {id:?} cannot be changed by itself: register its images again with \
                 another backend_config.auth, or change that of all images with id=/"
            )));
        }
        (self.hooks.configure)(&update)?;
        let mut configured = self.configured.lock().unwrap_or_else(PoisonError::into_inner);
        configured.extend(changes.keys().cloned());
        Ok(())
    }

    /// What was set, without saying to what: one value is a password.
    fn configuration(&self) -> Value {
        let configured = self.configured.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = configured.iter().map(|key| (key.clone(), Value::from("(set)")));
        Value::Object(shown.collect::<Map<_, _>>())
    }

    fn stat(&self) -> Value {
        let mut document = self.statistics.document(&self.statistics.gather());
        if let Value::Object(fields) = &mut document {
            fields.insert("version".into(), reply::version());
            fields.insert("state".into(), self.state.state().name().into());
            fields.insert("images".into(), self.catalog.images().len().into());
            fields.insert(
                "log".into(),
                json!({
                    "level": level_name(self.journal.level()),
                    "lines_dropped": self.journal.dropped(),
                }),
            );
            fields.insert("daemon".into(), (self.hooks.more_statistics)());
        }
        document
    }
}

fn answer(kind: &str, outcome: Result<()>) -> Response {
    match outcome {
        Ok(()) => reply::done(),
        Err(error) => reply::failed(kind, &error),
    }
}

fn told(outcome: Result<Value>) -> Response {
    match outcome {
        Ok(document) => reply::document(&document),
        Err(error) => reply::told(&error),
    }
}

fn counted(kind: &str, metrics: Option<Value>) -> Response {
    metrics.map_or_else(|| reply::no_counter(kind), |metrics| reply::document(&metrics))
}

/// base64 of user:password, as the registry's own configuration takes it.
fn checked_auth(text: &str) -> Result<String> {
    use base64::Engine as _;
    let decoded = base64::engine::general_purpose::STANDARD.decode(text.trim());
    if !decoded.is_ok_and(|bytes| bytes.contains(&b':')) {
        return Err(Error::Malformed("registry_auth: not base64 of user:password".into()));
    }
    Ok(text.trim().to_owned())
}
