//! Measures how long readers wait for bytes that are not there yet.
//!
//! `blob` starts a daemon behind an emulated /dev/cachefiles and plays the kernel; `mount` reads a
//! mounted tree; `floor` is the least that any daemon could take; `tree` makes files for an image,
//! `page` plots of runs. One run is one start: cold means that the cache is new. Prints text,
//! writes JSON on request.
//!
//! ```text
//! coldstart blob --image DIR --origin HOST:PORT --work DIR [LOAD] -- sluice daemon --fscache ...
//! coldstart floor --image DIR --origin HOST:PORT --work DIR [LOAD]
//! coldstart mount --path DIR [--origin HOST:PORT] [--pid N] [LOAD]
//! coldstart tree --out DIR --mib N
//! coldstart page --out FILE RUN.json...
//! ```

mod blob;
mod daemon;
mod floor;
mod http;
mod image;
mod kernel;
mod load;
mod mount;
mod options;
mod page;
mod plan;
mod report;
mod tree;

use std::io::{self, Error};
use std::net::TcpStream;
use std::process;
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::{Value, json};

use blob::{BESIDE_READERS, Beside, Objects};
use daemon::{Daemon, Registration, Usage};
use image::Image;
use load::{Run, Target};
use options::{BlobRun, Command, FloorRun, Load, MountRun};
use plan::{Extent, Plan};
use report::Surroundings;

fn main() {
    let command = options::Arguments::parse().command;
    let outcome = match &command {
        Command::Blob(options) => measure_blob(options),
        Command::Floor(options) => measure_floor(options),
        Command::Mount(options) => measure_mount(options),
        Command::Tree(options) => tree::make(&options.out, options.mib, options.seed),
        Command::Page(options) => page::make(&options.out, &options.runs),
    };
    if let Err(error) = outcome {
        eprintln!("coldstart: {error}");
        process::exit(1);
    }
}

fn measure_blob(options: &BlobRun) -> io::Result<()> {
    let image = Image::open(&options.image)?;
    let work = tempfile::Builder::new().prefix("coldstart.").tempdir_in(&options.work)?;
    let work_dir = work.path().canonicalize()?;
    let load = &options.load;
    let beside = if options.beside.is_some() { BESIDE_READERS } else { 0 };
    let daemon = Daemon::start(&options.daemon, &work_dir, load.readers + beside)?;
    let how = Registration {
        origin: options.origin.clone(),
        prefetch: options.prefetch,
        validate: options.validate,
        work: work_dir.join("work"),
    };
    let domains: Vec<_> = (0..options.images).map(|number| format!("measured{number}")).collect();
    for domain in &domains {
        daemon.register(domain, &image, &how)?;
    }
    let other =
        options.beside.map(|dead| Beside::open(&daemon, &image, dead, &work_dir, load.readers));
    let other = other.transpose()?;
    order(&options.origin, "forget")?;
    let objects = match options.metadata {
        true => Objects::open_bootstrap(&daemon.kernel, &domains[0])?,
        false => Objects::open(&daemon.kernel, &image, &domains[..options.open])?,
    };
    std::thread::sleep(Duration::from_millis(options.settle_ms));
    let size = if options.metadata { image.bootstrap_size } else { image.size() };
    let plan = load.plan(&[Extent { name: String::new(), size }])?;
    let (before, reads_before) = (daemon.usage()?, daemon.kernel.reads());
    let measure = || load::run(&objects, &plan, load.readers, load.rate);
    let run = match &other {
        Some(other) => other.while_read(measure)?,
        None => measure()?,
    };
    let after = daemon.usage()?;
    let upcalls = daemon.kernel.reads() - reads_before;
    let about = Surroundings {
        settings: json!({
            "load": load.settings(), "prefetch": options.prefetch, "validate": options.validate,
            "images": options.images, "open": options.open,
            "beside": options.beside.map(|dead| format!("{dead:?}")),
        }),
        size_bytes: size,
        origin: counters(&options.origin)?,
        upcalls: options.beside.is_none().then_some(upcalls),
        usage: Some(Usage { processor: after.processor - before.processor, ..after }),
        filled_bytes: Some(objects.filled_bytes()?),
        verified_bytes: match options.verify {
            true => Some(objects.verify(&image)?),
            false => None,
        },
        opening_us: Some(objects.opening.as_micros() as u64),
        daemon: daemon.statistics(),
        ..Surroundings::default()
    };
    finish(load, &run, about)
}

fn measure_floor(options: &FloorRun) -> io::Result<()> {
    let image = Image::open(&options.image)?;
    let work = tempfile::Builder::new().prefix("coldstart.").tempdir_in(&options.work)?;
    let load = &options.load;
    let floor =
        floor::Floor::new(&image, &options.origin, work.path(), load.readers, options.ahead)?;
    order(&options.origin, "forget")?;
    let files = [Extent { name: String::new(), size: image.size() }];
    let (run, usage) = measured(&floor, load, &files, process::id())?;
    let about = Surroundings {
        settings: json!({"load": load.settings(), "ahead": options.ahead}),
        size_bytes: image.size(),
        origin: counters(&options.origin)?,
        filled_bytes: Some(floor.filled_bytes()),
        usage: Some(usage),
        ..Surroundings::default()
    };
    finish(load, &run, about)
}

fn measure_mount(options: &MountRun) -> io::Result<()> {
    let load = &options.load;
    let mount = mount::Mount::open(&options.path, load.readers)?;
    if let Some(origin) = &options.origin {
        order(origin, "forget")?;
    }
    let pid = options.pid.unwrap_or_else(process::id);
    let (run, usage) = measured(&mount, load, &mount.files, pid)?;
    let about = Surroundings {
        settings: json!({"load": load.settings(), "path": options.path}),
        size_bytes: mount.files.iter().map(|file| file.size).sum(),
        origin: options.origin.as_deref().map_or(Ok(Value::Null), counters)?,
        usage: options.pid.map(|_| usage),
        ..Surroundings::default()
    };
    finish(load, &run, about)
}

/// Runs a load and says what a process used meanwhile.
fn measured(
    target: &dyn Target,
    load: &Load,
    files: &[Extent],
    pid: u32,
) -> io::Result<(Run, Usage)> {
    let plan: Plan = load.plan(files)?;
    let before = daemon::usage(pid)?;
    let run = load::run(target, &plan, load.readers, load.rate)?;
    let after = daemon::usage(pid)?;
    Ok((run, Usage { processor: after.processor - before.processor, ..after }))
}

fn finish(load: &Load, run: &Run, about: Surroundings) -> io::Result<()> {
    let document = report::document(run, Surroundings { name: load.name(), ..about });
    report::print(&document, &mut io::stdout())?;
    match &load.json {
        Some(path) => std::fs::write(path, document.to_string()),
        None => Ok(()),
    }
}

/// The origin's counters.
fn counters(origin: &str) -> io::Result<Value> {
    let body = order(origin, "counters")?;
    serde_json::from_slice(&body).map_err(Error::other)
}

fn order(origin: &str, what: &str) -> io::Result<Vec<u8>> {
    let began = Instant::now();
    let stream = TcpStream::connect(origin)?;
    let (status, body) =
        http::Client::new(stream, origin).call("GET", &format!("/-/{what}"), "")?;
    match status {
        200 => Ok(body),
        _ => Err(Error::other(format!(
            "the origin answered {status} to /-/{what} after {:?}; is it tools/origin?",
            began.elapsed()
        ))),
    }
}
