//! A fast static origin for measurements: ranges of blobs over keep-alive HTTP/1.1 on loopback.
//!
//! Owns the command line, the listener, and a thread per connection. Serves every file of a folder
//! as `/v2/ANY/NAME/blobs/sha256:FILE` (the prefix `sha256:` may be absent) with sendfile, as fast
//! as loopback goes or as slow as its profile says (`profile.rs`). It is no registry: no tokens,
//! no manifests, no checks; `tools/registryd` is. At start it prints one line of JSON; the control
//! paths `/-/counters`, `/-/forget` and `/-/profile?first_byte_ms=20&...` are on the same port.
//!
//! ```text
//! origin --root DIR [--first-byte-ms N] [--mbit-per-s N] [--slow-percent N --slow-ms N]
//!        [--fail-percent N]
//! ```

mod answer;
mod profile;

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use std::{process, thread};

use answer::{Blobs, Next};
use clap::Parser;
use profile::{Link, Profile};

/// A request head longer than this ends its connection.
const HEAD_MAX_BYTES: usize = 16 << 10;

/// A fast static origin for measurements.
#[derive(Parser)]
struct Arguments {
    /// The folder whose files are the blobs.
    #[arg(long)]
    root: PathBuf,
    /// The port; 0 lets the kernel choose.
    #[arg(long, default_value_t = 0)]
    port: u16,
    #[command(flatten)]
    profile: Profile,
    /// Stop as soon as standard input ends: the origin dies with whoever started it.
    #[arg(long)]
    until_stdin_closes: bool,
}

fn main() {
    if let Err(error) = run(Arguments::parse()) {
        eprintln!("origin: {error}");
        process::exit(1);
    }
}

fn run(arguments: Arguments) -> io::Result<()> {
    let blobs = Arc::new(Blobs::open(&arguments.root)?);
    let link = Arc::new(Link::new(arguments.profile));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, arguments.port))?;
    let line = serde_json::json!({
        "address": listener.local_addr()?.to_string(),
        "pid": process::id(),
    });
    println!("{line}");
    io::stdout().flush()?;
    if arguments.until_stdin_closes {
        thread::spawn(|| {
            let mut ignored = [0; 64];
            while io::stdin().read(&mut ignored).is_ok_and(|count| count > 0) {}
            process::exit(0);
        });
    }
    for stream in listener.incoming() {
        let (blobs, link) = (Arc::clone(&blobs), Arc::clone(&link));
        match stream {
            // A connection that breaks is the peer's business.
            Ok(stream) => drop(thread::spawn(move || serve(&stream, &blobs, &link))),
            Err(error) => eprintln!("origin: accept: {error}"),
        }
    }
    Ok(())
}

/// Answers the requests of one connection, one after the other, until it ends.
fn serve(stream: &TcpStream, blobs: &Blobs, link: &Link) -> io::Result<()> {
    stream.set_nodelay(true)?;
    link.counters.connected();
    let mut buffer = vec![0; HEAD_MAX_BYTES];
    let mut filled = 0;
    loop {
        let head_end = loop {
            if let Some(end) = head_end(&buffer[..filled]) {
                break end;
            }
            let got = (&*stream).read(&mut buffer[filled..])?;
            if got == 0 {
                return Ok(());
            }
            filled += got;
        };
        let asked_at = Instant::now();
        let next = blobs.answer(stream, link, &buffer[..head_end], asked_at)?;
        if next == Next::Close {
            return Ok(());
        }
        buffer.copy_within(head_end..filled, 0);
        filled -= head_end;
    }
}

fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}
