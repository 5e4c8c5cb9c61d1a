//! The daemon from start to stop: device, workers, control API, signals.
//!
//! Order of start: log, limits, device, workers, API; nobody is told that it runs before it can
//! serve. Order of stop: API, workers, device: what the kernel still waits for is failed when the
//! last file of the cache is closed, so no reader hangs.

use std::sync::{Arc, Mutex};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use super::control::{ControlPlane, Hooks};
use super::cull::Culler;
use super::doors::Doors;
use super::log;
use super::mounts::{Door, Mounts};
use super::options::read_blobs_file;
use super::reply::Identity;
use super::sealer::Sealer;
use super::server::Server;
use super::socket::ControlSocket;
use super::state::{Event, Refused, StateMachine};
use super::statistics::Statistics;
use super::worker::{WorkerParts, Workers};
use crate::blob::catalog::Catalog;
use crate::blob::crew::Mail;
use crate::blob::journal::{Journal, Level};
use crate::blob::statistics::Counters;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::registry::route::Shared;
use crate::store::ledger::Ledger;

/// Runs a daemon until SIGTERM, SIGINT or the API ends it.
///
/// # Errors
/// What kept it from starting. Once it serves, it does not fail.
pub fn run(config: &Config) -> Result<()> {
    if config.upgrade || config.supervisor.is_some() {
        return Err(Error::Unsupported(
            "--supervisor and --upgrade: taking over from a running daemon is not supported yet"
                .into(),
        ));
    }
    // Blocked before any thread starts, so that only the wait below sees them.
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    signals.thread_block().map_err(|errno| Error::system(errno as i32, "cannot block signals"))?;
    let (journal, lines) = Journal::new(config.log_level);
    let log = log::start(lines, config.log_file.as_deref())?;
    let outcome = serve(config, &journal, &signals);
    drop(journal);
    // All holders of the journal have ended with the service, so the writer ends too.
    let _ = log.join();
    outcome
}

fn serve(config: &Config, journal: &Arc<Journal>, signals: &SigSet) -> Result<()> {
    raise_nofile(config.nofile_limit, journal)?;
    // The API's place is taken first: a second daemon must not get as far as the device.
    let socket = config.api_socket.as_deref().map(ControlSocket::bind).transpose()?;
    let routes = Shared::new();
    let doors = Doors::open(config, &routes, journal)?;
    let watch = doors
        .fanotify
        .as_ref()
        .map(|door| (Arc::clone(door.binder.group()), Arc::clone(door.binder.bindings())));
    let parts = WorkerParts {
        cpus: config.cores.clone(),
        device: doors.cachefiles.as_ref().map(|(device, _)| Arc::clone(device)),
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
    let control = control_plane(config, &parts, &workers, &doors);
    let served =
        control.and_then(|control| run_until_told(config, control, socket, doors, signals));
    workers.stop();
    served
}

/// Serves until a signal comes; the workers are stopped by the caller.
fn run_until_told(
    config: &Config,
    control: ControlPlane,
    socket: Option<ControlSocket>,
    doors: Doors,
    signals: &SigSet,
) -> Result<()> {
    let control = Arc::new(control);
    let journal = Arc::clone(&control.journal);
    let sealer = doors.fanotify.map(|door| {
        let looker = Arc::downgrade(&control);
        let tick = move || {
            if let Some(control) = looker.upgrade() {
                control.look_after_mounts();
            }
        };
        Sealer::start(door, &journal, Box::new(tick))
    });
    let sealer = sealer.transpose()?;
    let server = begin(config, &control, socket)?;
    journal.write(Level::Info, || {
        let open: Vec<_> = control.mounts.doors().map(Door::name).collect();
        format!("serving on CPUs {:?}, doors {open:?}", config.cores)
    });
    let signal = signals.wait();
    journal.write(Level::Info, || format!("stopping: {signal:?}"));
    if let Some(server) = server {
        server.stop();
    }
    if let Some(sealer) = sealer {
        sealer.stop();
    }
    control.close_doors();
    Ok(())
}

/// Shows the daemon as running, registers what a file lists, opens the API.
fn begin(
    config: &Config,
    control: &Arc<ControlPlane>,
    socket: Option<ControlSocket>,
) -> Result<Option<Server>> {
    for event in [Event::Mount, Event::Start] {
        control.state.apply(event, || Ok(())).map_err(|refused| match refused {
            Refused::Failed(error) => error,
            other => Error::Malformed(format!("the daemon cannot start: {other:?}")),
        })?;
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
) -> Result<ControlPlane> {
    let culler = doors.culler();
    let open_ledger = |culler| open_ledger(config, culler, &parts.journal);
    let ledger = culler.as_ref().map(open_ledger).transpose()?;
    let (mailboxes, routes) = (workers.mailboxes(), Arc::clone(&parts.routes));
    let (journal, credentials) = (Arc::clone(&parts.journal), Arc::clone(&parts.routes));
    let hooks = Hooks {
        exit: Box::new(|| {
            kill(Pid::this(), Signal::SIGTERM)
                .map_err(|errno| Error::system(errno as i32, "cannot signal this process"))
        }),
        registered: Box::new(move |image, _| match routes.route(&image.backend) {
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
        }),
        configure: Box::new(move |_, update| {
            if update.proxy_url.is_some() {
                let text = "proxy_url cannot be changed while the daemon runs: register the image \
                            again with another proxy";
                return Err(Error::Unsupported(text.into()));
            }
            credentials.set_basic(update.registry_auth.clone());
            Ok(())
        }),
        ..Hooks::idle()
    };
    let supervisor = config.supervisor.as_ref().map(|path| path.display().to_string());
    let binder = doors.fanotify.as_ref().map(|door| Arc::clone(&door.binder));
    let has_cachefiles = doors.cachefiles.is_some();
    Ok(ControlPlane {
        catalog: Arc::clone(&parts.catalog),
        state: Arc::new(StateMachine::new()),
        statistics: Arc::new(Statistics::new(Arc::clone(&parts.counters), workers.ask_cores())),
        journal: Arc::clone(&parts.journal),
        identity: Identity { id: config.id.clone(), supervisor },
        culler,
        ledger,
        mounts: Mounts::new(binder, has_cachefiles, Box::new(|_, _, _| ())),
        evictor: doors.fanotify.as_ref().map(|door| Arc::clone(&door.evictor)),
        hooks,
        configured: Mutex::default(),
    })
}

/// The ledger of the cache that `culler` culls.
fn open_ledger(config: &Config, culler: &Culler, journal: &Arc<Journal>) -> Result<Ledger> {
    let state_dir = &config.state_dir;
    std::fs::create_dir_all(state_dir)
        .map_err(|error| Error::io(&error, format!("state directory {}", state_dir.display())))?;
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
