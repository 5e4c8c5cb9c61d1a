//! A loopback OCI registry from a directory, with faults and delays on command.
//!
//! Owns the command line, the listeners and the end of the process. At start it prints one line of
//! JSON: `address` serves the registry, `storage` is where redirects lead, `control` takes orders
//! in plain HTTP also when the others speak TLS, `ca` is the certificate to trust. A thread per
//! connection; nothing but loopback is ever listened on. The tree it serves is described in
//! `tree.rs`, the orders it takes in `faults.rs`.
//!
//! ```text
//! registryd --root DIR [--port N] [--tls --ca-out FILE] [--auth basic|bearer --user NAME:PASSWORD]
//! registryd load --root DIR --repo R --tag T IMAGE_DIR [--also FILE]...
//! ```

mod auth;
mod faults;
mod image;
mod journal;
mod link;
mod reply;
mod routes;
mod send;
mod tls;
mod tree;
mod uploads;
mod wire;

use clap::{Args, Parser, Subcommand, ValueEnum};
use nix::sys::signal::{SigSet, Signal};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::{process, thread};

/// A loopback OCI registry from a directory, with faults and delays on command.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Option<Serve>,
}

#[derive(Subcommand)]
enum Command {
    /// Put a lazy-loading image (image.boot and blobs in one folder) into the tree of a registry.
    Load(image::Load),
}

#[derive(Args)]
pub(crate) struct Serve {
    /// The tree to serve; made when it is missing.
    #[arg(long)]
    root: PathBuf,
    /// The port of the registry; 0 lets the kernel choose.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Speak TLS, with a certificate authority made at start.
    #[arg(long)]
    tls: bool,
    /// Where the authority's certificate goes (PEM); in the root unless given.
    #[arg(long, requires = "tls")]
    ca_out: Option<PathBuf>,
    /// What a client must show.
    #[arg(long, value_enum, default_value_t = AuthMode::None)]
    auth: AuthMode,
    /// NAME:PASSWORD of the one account.
    #[arg(long, default_value = "user:password")]
    user: String,
    /// How long a bearer token lives.
    #[arg(long, default_value_t = 300)]
    token_lifetime_s: u64,
    /// The token endpoint gives tokens for pulling to clients without a name.
    #[arg(long)]
    anonymous_pull: bool,
    /// Stop as soon as standard input ends: the registry dies with whoever started it.
    #[arg(long)]
    until_stdin_closes: bool,
}

/// Who may ask.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum AuthMode {
    /// Everybody.
    None,
    /// Name and password with every request.
    Basic,
    /// Tokens from our own endpoint.
    Bearer,
}

/// Which of the listeners a connection came in by.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Door {
    /// The registry itself.
    Registry,
    /// Where redirects lead: serves blobs, refuses requests that carry credentials.
    Storage,
    /// Orders only, never TLS.
    Control,
}

/// What all connections share.
pub(crate) struct Server {
    pub(crate) tree: tree::Tree,
    pub(crate) faults: faults::Faults,
    pub(crate) journal: journal::Journal,
    pub(crate) link: link::Link,
    pub(crate) auth: auth::Auth,
    pub(crate) uploads: uploads::Uploads,
    pub(crate) tls: Option<Arc<rustls::ServerConfig>>,
    /// `http://127.0.0.1:PORT` of the registry.
    pub(crate) registry_url: String,
    /// The same of the storage port.
    pub(crate) storage_url: String,
}

fn main() {
    let arguments = Arguments::parse();
    let outcome = match (arguments.command, arguments.serve) {
        (Some(Command::Load(load)), _) => image::load(&load),
        (None, Some(serve)) => run(serve),
        (None, None) => Err(io::Error::other("--root says which tree to serve")),
    };
    if let Err(error) = outcome {
        eprintln!("registryd: {error}");
        process::exit(1);
    }
}

fn run(options: Serve) -> io::Result<()> {
    // Blocked before the first thread starts, so that every thread leaves it to `wait` below.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;

    let listen = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port));
    let (registry, storage, control) = (listen(options.port)?, listen(0)?, listen(0)?);
    let tree = tree::Tree::open(&options.root)?;
    tree.forget_uploads()?;
    let ca = options.ca_out.clone().unwrap_or_else(|| options.root.join("ca.pem"));
    let tls = if options.tls { Some(tls::private_authority(&ca)?) } else { None };
    let scheme = if options.tls { "https" } else { "http" };
    let url = |listener: &TcpListener| -> io::Result<String> {
        Ok(format!("{scheme}://{}", listener.local_addr()?))
    };
    let line = serde_json::json!({
        "address": registry.local_addr()?.to_string(),
        "storage": storage.local_addr()?.to_string(),
        "control": control.local_addr()?.to_string(),
        "pid": process::id(),
        "ca": options.tls.then_some(ca),
    });
    let server = Arc::new(Server {
        tree,
        faults: faults::Faults::default(),
        journal: journal::Journal::default(),
        link: link::Link::default(),
        auth: auth::Auth::new(&options)?,
        uploads: uploads::Uploads::default(),
        tls,
        registry_url: url(&registry)?,
        storage_url: url(&storage)?,
    });
    for (listener, door) in
        [(registry, Door::Registry), (storage, Door::Storage), (control, Door::Control)]
    {
        let server = server.clone();
        thread::spawn(move || accept(&listener, door, &server));
    }
    println!("{line}");
    io::stdout().flush()?;
    if options.until_stdin_closes {
        thread::spawn(|| {
            let mut ignored = [0; 64];
            while io::stdin().read(&mut ignored).is_ok_and(|count| count > 0) {}
            process::exit(0);
        });
    }
    signals.wait()?;
    process::exit(0);
}

fn accept(listener: &TcpListener, door: Door, server: &Arc<Server>) {
    for stream in listener.incoming() {
        let server = server.clone();
        // A connection that breaks is the peer's business or a fault we were told to make.
        let serve = move |stream: TcpStream| routes::serve(stream, door, &server);
        match stream {
            Ok(stream) => drop(thread::spawn(move || serve(stream))),
            Err(error) => eprintln!("registryd: accept: {error}"),
        }
    }
}
