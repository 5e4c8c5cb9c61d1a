//! The daemon from start to stop: device, workers, control API, signals.
//!
//! Order of start: log, limits, keeper, doors, workers, API; nobody is told that it runs before it
//! can serve. Order of stop: API, workers, keeper, doors. When images are mounted and something
//! holds a door for a successor, readers wait for it, for a while; otherwise, and after SIGINT,
//! what the kernel still waits for is failed when the last file of the cache is closed. No reader
//! hangs either way.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use super::control::{ControlPlane, Hooks, Registered};
use super::cull::Culler;
use super::doors::Doors;
use super::keeper::{Ending, Keeper};
use super::keeper_link::Place;
use super::keeper_systemd::{Environment, Systemd};
use super::lineage::Lineage;
use super::log;
use super::mounts::{Door, Mounts, Prefetch};
use super::options::read_blobs_file;
use super::recording::Recordings;
use super::reply::Identity;
use super::sealer::Sealer;
use super::server::Server;
use super::socket::ControlSocket;
use super::starts::{StartKeeper, Starts};
use super::state::{Event, Refused, StateMachine};
use super::statistics::Statistics;
use super::succession::Restored;
use super::succession_device::Heritage;
use super::witness::{self, Bequest};
use super::worker::{WorkerParts, Workers};
use crate::blob::catalog::Catalog;
use crate::blob::crew::Mail;
use crate::blob::journal::{Journal, Level};
use crate::blob::statistics::Counters;
use crate::config::{Config, DoorChoice};
use crate::error::{Error, Result};
use crate::registry::route::Shared;
use crate::store::ledger::Ledger;

/// Runs a daemon until SIGTERM, SIGINT or the API ends it.
///
/// # Errors
/// What kept it from starting. Once it serves, it does not fail.
pub fn run(config: &Config) -> Result<()> {
    // Blocked before any thread starts, so that only the wait below sees them.
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    signals.thread_block().map_err(|errno| Error::system(errno as i32, "cannot block signals"))?;
    // Before anything else is open, and before the second thread.
    let bequest = inherit(config)?;
    let (journal, lines) = Journal::new(config.log_level);
    let log = log::start(lines, config.log_file.as_deref())?;
    let outcome = serve(config, &journal, &signals, bequest);
    drop(journal);
    // All holders of the journal have ended with the service, so the writer ends too.
    let _ = log.join();
    outcome
}

/// A witness for us, and what those of dead daemons have for us.
fn inherit(config: &Config) -> Result<Bequest> {
    if config.door == DoorChoice::Cachefiles || config.keep_s == 0 {
        return Ok(Bequest::default());
    }
    witness::start(config)?;
    Ok(witness::collect(&config.state_dir))
}

fn serve(
    config: &Config,
    journal: &Arc<Journal>,
    signals: &SigSet,
    bequest: Bequest,
) -> Result<()> {
    raise_nofile(config.nofile_limit, journal)?;
    let environment = Environment::of_process();
    // The API's place is taken first: a second daemon must not get as far as the device.
    let socket = config.api_socket.as_deref().map(ControlSocket::bind).transpose()?;
    let after_crash = socket.as_ref().is_some_and(ControlSocket::has_replaced);
    let state_dir = &config.state_dir;
    std::fs::create_dir_all(state_dir)
        .map_err(|error| Error::io(&error, format!("state directory {}", state_dir.display())))?;
    let keeper = open_keeper(config, &environment, journal)?;
    let routes = Shared::new();
    let events: Vec<_> = bequest.events.iter().map(|(_, number)| *number).collect();
    let heritage = Heritage { keeper: &keeper, after_crash, events: &events };
    let doors = Doors::open(config, &heritage, &routes, journal)?;
    let lineage = Lineage::begin(config, keeper, &doors, events, journal)?;
    let lineage = Arc::new(lineage);
    let watch = doors
        .fanotify
        .as_ref()
        .map(|door| (Arc::clone(door.binder.group()), Arc::clone(door.binder.bindings())));
    let parts = WorkerParts {
        cpus: config.cores.clone(),
        device: None,
        intake: config.intake,
        watch,
        catalog: Arc::new(Catalog::default()),
        journal: Arc::clone(journal),
        counters: Counters::new(config.cores.len()),
        routes,
        fault_deadline_ms: config.fault_deadline_ms,
        make_room: doors.make_room(),
    };
    let workers = Workers::start(&parts)?;
    let watches = workers.watches();
    bequest.serve(&watches, journal);
    let control = control_plane(config, &parts, &workers, &doors, &lineage);
    let ended = control.and_then(|control| {
        let (control, listening) = (Arc::new(control), (socket, &environment));
        lineage.attach(workers.doors(), watches, &control);
        run_until_told(config, &control, &lineage, listening, doors, signals)
    });
    let ending = *ended.as_ref().unwrap_or(&lineage.ending(false));
    workers.stop(ending);
    lineage.end(ending);
    ended.map(drop)
}

/// Serves until a signal comes; says how the daemon ends. The workers are stopped by the caller.
fn run_until_told(
    config: &Config,
    control: &Arc<ControlPlane>,
    lineage: &Lineage,
    (socket, environment): (Option<ControlSocket>, &Environment),
    doors: Doors,
    signals: &SigSet,
) -> Result<Ending> {
    let journal = Arc::clone(&control.journal);
    let sealer = doors.fanotify.map(|door| {
        let looker = Arc::downgrade(control);
        let tick = move || {
            if let Some(control) = looker.upgrade() {
                control.look_after_mounts();
            }
        };
        Sealer::start(door, &control.catalog, &journal, Box::new(tick))
    });
    let sealer = sealer.transpose()?;
    let learner = config.learns_starts.then(|| StartKeeper::start(control)).transpose()?;
    let server = begin(config, control, lineage, socket)?;
    let systemd = environment.notify_socket.as_deref().map(Systemd::at).transpose();
    let systemd = systemd.inspect_err(|error| journal.error(error.to_string())).ok().flatten();
    let _ = systemd.as_ref().map(Systemd::ready);
    journal.write(Level::Info, || {
        let open: Vec<_> = control.mounts.doors().map(Door::name).collect();
        format!("serving on CPUs {:?}, doors {open:?}", config.cores)
    });
    let signal = signals.wait();
    let ending = lineage.ending(signal == Ok(Signal::SIGINT));
    journal.write(Level::Info, || format!("stopping: {signal:?}, {ending:?}"));
    let _ = systemd.as_ref().map(Systemd::stopping);
    if let Some(server) = server {
        server.stop();
    }
    if let Some(sealer) = sealer {
        sealer.stop();
    }
    if let Some(learner) = learner {
        learner.stop();
    }
    control.close_doors();
    Ok(ending)
}

/// What holds files for a successor. That there is none costs readers only after a crash.
fn open_keeper(
    config: &Config,
    environment: &Environment,
    journal: &Arc<Journal>,
) -> Result<Keeper> {
    // A supervisor is a keeper already.
    let is_wanted = config.keep_s > 0 && config.supervisor.is_none();
    let place = is_wanted.then(|| Place {
        state_dir: config.state_dir.clone(),
        // This very program, also after its file has been replaced.
        program: "/proc/self/exe".into(),
        log_file: config.log_file.clone(),
        patience: Duration::from_secs(config.keep_s),
    });
    match Keeper::open(place, environment, journal) {
        Err(error @ Error::Busy(_)) => Err(error),
        Err(error) => {
            journal.error(format!("without a keeper a crash costs readers: {error}"));
            Ok(Keeper::nobody())
        }
        keeper => keeper,
    }
}

/// Shows the daemon as running, registers what a file lists, opens the API. A daemon that waits for
/// a supervisor only opens the API.
fn begin(
    config: &Config,
    control: &Arc<ControlPlane>,
    lineage: &Lineage,
    socket: Option<ControlSocket>,
) -> Result<Option<Server>> {
    if !lineage.is_awaited() {
        let begun = control.state.apply(Event::Mount, || Ok(()));
        begun.and_then(|()| control.state.apply(Event::Start, || lineage.start())).map_err(
            |refused| match refused {
                Refused::Failed(error) => error,
                other => Error::Malformed(format!("the daemon cannot start: {other:?}")),
            },
        )?;
    }
    if let Some(file) = &config.blobs_file {
        for (entry, body) in read_blobs_file(file)? {
            control.register(entry, &body).map_err(|error| error.context(file.display()))?;
        }
    }
    socket.map(|socket| Server::start(socket, Arc::clone(control))).transpose()
}

fn control_plane(
    config: &Config,
    parts: &WorkerParts,
    workers: &Workers,
    doors: &Doors,
    lineage: &Arc<Lineage>,
) -> Result<ControlPlane> {
    let culler = doors.culler();
    let open_ledger = |culler| open_ledger(config, culler, &parts.journal);
    let ledger = culler.as_ref().map(open_ledger).transpose()?;
    let supervisor = config.supervisor.as_ref().map(|path| path.display().to_string());
    let binder = doors.fanotify.as_ref().map(|door| Arc::clone(&door.binder));
    let has_cachefiles = doors.cachefiles.is_some();
    let changed = lineage.mounts_changed();
    Ok(ControlPlane {
        catalog: Arc::clone(&parts.catalog),
        state: Arc::new(StateMachine::new()),
        statistics: Arc::new(Statistics::new(Arc::clone(&parts.counters), workers.ask_cores())),
        journal: Arc::clone(&parts.journal),
        identity: Identity { id: config.id.clone(), supervisor },
        culler,
        ledger,
        mounts: Mounts::new(binder, has_cachefiles, changed, prefetch(workers)),
        evictor: doors.fanotify.as_ref().map(|door| Arc::clone(&door.evictor)),
        hooks: hooks(parts, workers, lineage),
        configured: Mutex::default(),
        restored: Restored::default(),
        recordings: Recordings::default(),
        starts: config.learns_starts.then(|| Starts::open(&config.state_dir)).transpose()?,
    })
}

fn hooks(parts: &WorkerParts, workers: &Workers, lineage: &Arc<Lineage>) -> Hooks {
    let credentials = Arc::clone(&parts.routes);
    let (starting, saving, taking) =
        (Arc::clone(lineage), Arc::clone(lineage), Arc::clone(lineage));
    let (forgetting, shown) = (Arc::clone(lineage), Arc::clone(lineage));
    let (catalog, journal) = (Arc::clone(&parts.catalog), Arc::clone(&parts.journal));
    Hooks {
        start: Box::new(move || starting.start()),
        exit: Box::new(|| {
            kill(Pid::this(), Signal::SIGTERM)
                .map_err(|errno| Error::system(errno as i32, "cannot signal this process"))
        }),
        send_fd: Box::new(move || saving.save()),
        takeover: Box::new(move || taking.take_over()),
        registered: registered(parts, workers, lineage),
        forgotten: Box::new(move |domain, id| {
            let is_gone = |domain: &str, id: &str| catalog.object(domain, id).is_none();
            if let Err(error) = forgetting.remembered.forget(domain, id, is_gone) {
                journal.error(format!("an image will come back with the next start: {error}"));
            }
        }),
        configure: Box::new(move |update| {
            if update.proxy_url.is_some() {
                let text = "proxy_url cannot be changed while the daemon runs: register the image \
                            again with another proxy";
                return Err(Error::Unsupported(text.into()));
            }
            credentials.set_basic(update.registry_auth.clone());
            Ok(())
        }),
        more_statistics: Box::new(move || shown.document()),
    }
}

/// Blobs to prefetch go to one core after the other.
fn prefetch(workers: &Workers) -> Prefetch {
    let (mailboxes, turn) = (workers.mailboxes(), AtomicUsize::new(0));
    Box::new(move |blob| {
        let core = turn.fetch_add(1, Ordering::Relaxed) % mailboxes.len();
        // A favour; a core whose mailbox is full has better things to do.
        let _ = mailboxes[core].send(Mail::Prefetch(blob));
    })
}

/// A new image is remembered before its client is told, and its registry is dialled.
fn registered(parts: &WorkerParts, workers: &Workers, lineage: &Arc<Lineage>) -> Registered {
    let (mailboxes, routes) = (workers.mailboxes(), Arc::clone(&parts.routes));
    let (catalog, journal) = (Arc::clone(&parts.catalog), Arc::clone(&parts.journal));
    let remembered = Arc::clone(&lineage.remembered);
    Box::new(move |image, body| {
        remembered
            .remember(image, body, || catalog.object(&image.domain_id, &image.id).is_some())?;
        match routes.route(&image.backend) {
            Ok(route) => {
                let blob = image.blobs.first().map(|blob| blob.id.clone());
                for mailbox in &mailboxes {
                    // Dialling ahead is a favour; a busy core is not asked twice.
                    let _ =
                        mailbox.send(Mail::Dial { route: Arc::clone(&route), blob: blob.clone() });
                }
            }
            Err(error) => {
                let name = format!("{}/{}", image.domain_id, image.id);
                journal.error(format!("image {name}: no way to its backend: {error}"));
            }
        }
        Ok(())
    })
}

/// The ledger of the cache that `culler` culls.
fn open_ledger(config: &Config, culler: &Culler, journal: &Arc<Journal>) -> Result<Ledger> {
    let state_dir = &config.state_dir;
    let (clearer, journal) = (culler.clone(), Arc::clone(journal));
    let clear = move |domain: &str, cookie: &str| {
        if clearer.clear(domain, cookie)? > 0 {
            journal.write(Level::Info, || {
                format!(
                    "cache of {domain}/{cookie} removed: it may hold bytes of another image, or \
                     bytes that nobody verified"
                )
            });
        }
        Ok(())
    };
    Ledger::open(state_dir, culler.fscache_dir(), Box::new(clear))
}

/// Asks for more open files: each open blob is one.
fn raise_nofile(wanted: u64, journal: &Journal) -> Result<()> {
    if wanted == 0 {
        return Ok(());
    }
    let failed = |errno| Error::system(errno as i32, "RLIMIT_NOFILE");
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed)?;
    if setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted.max(hard)).is_ok() {
        return Ok(());
    }
    // Raising the hard limit takes CAP_SYS_RESOURCE; what is allowed without is mostly enough.
    setrlimit(Resource::RLIMIT_NOFILE, wanted.min(hard), hard).map_err(failed)?;
    journal.write(Level::Warn, || {
        format!("open files are limited to {hard}, not {wanted}: no CAP_SYS_RESOURCE")
    });
    Ok(())
}
