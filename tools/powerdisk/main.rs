//! A disk for emulated machines that loses what was not flushed when its power is cut.
//!
//! Owns the command line, the socket, and the end of the process: a line `cut` on standard input
//! is a power cut, the end of standard input an orderly shutdown that loses nothing. Either way
//! one line of JSON says what became of the cache. The disk is described in `disk.rs`; qemu
//! reaches it as `-drive file=nbd+unix:///?socket=PATH,format=raw,cache=writeback`.
//!
//! ```text
//! powerdisk --file DISK --size-mib N --socket PATH [--seed N] [--mib-per-s N]
//! ```

mod disk;
mod nbd;

use clap::Parser;
use disk::{Cut, Disk};
use std::fs::OpenOptions;
use std::io::{self, BufRead};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::{fs, process, thread};

/// A disk that loses what was not flushed when its power is cut.
#[derive(Parser)]
struct Arguments {
    /// The file that holds what survives; made when it is missing.
    #[arg(long)]
    file: PathBuf,
    /// The size of the disk.
    #[arg(long)]
    size_mib: u64,
    /// The socket to serve at; made when it is ready, removed at the end.
    #[arg(long)]
    socket: PathBuf,
    /// How fast it writes: a slow disk has more under way when its power goes. 0 is no limit.
    #[arg(long, default_value_t = 0)]
    mib_per_s: u32,
    /// What decides the fate of each write.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn main() {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(cut) => println!("{}", serde_json::to_string(&cut).expect("numbers become JSON")),
        Err(error) => {
            eprintln!("powerdisk: {}: {error}", arguments.file.display());
            process::exit(1);
        }
    }
}

fn run(arguments: &Arguments) -> io::Result<Cut> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false);
    let file = file.open(&arguments.file)?;
    let disk = Disk::new(file, arguments.size_mib << 20, arguments.seed)?;
    let disk = Arc::new(Mutex::new(Some(disk)));
    let listener = UnixListener::bind(&arguments.socket)?;
    let served = Arc::clone(&disk);
    let bytes_per_s = (arguments.mib_per_s > 0).then_some(f64::from(arguments.mib_per_s << 20));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let disk = Arc::clone(&served);
            thread::spawn(move || {
                let served = nbd::serve(stream, &disk, bytes_per_s);
                // One that is cut off has nobody left to tell.
                if let Err(error) = served.or_else(cut_off) {
                    eprintln!("powerdisk: {error}");
                }
            });
        }
    });
    let order = io::stdin().lock().lines().next().transpose()?;
    // Taken out under the lock: whatever comes now finds a disk without power.
    let disk = disk.lock().unwrap_or_else(PoisonError::into_inner).take();
    let mut disk = disk.expect("only this thread takes it");
    fs::remove_file(&arguments.socket)?;
    match order.as_deref() {
        Some("cut") => disk.cut(),
        None => disk.flush().map(|()| Cut::default()),
        Some(other) => Err(io::Error::other(format!("the order is `cut`, not `{other}`"))),
    }
}

fn cut_off(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotConnected { Ok(()) } else { Err(error) }
}
