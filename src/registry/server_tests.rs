//! A scripted HTTP server for tests: threads on loopback, gone when the value is dropped.
//!
//! A script sees each request with the number of its connection and answers with what to do. Every
//! request is recorded. Dropping the server closes all sockets and joins all threads.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Counted from 0.
    pub connection: usize,
    /// Requests before it on all connections.
    pub number: usize,
    /// `GET /path`.
    pub line: String,
    /// The whole head and, for a POST, its body.
    pub text: String,
}

impl Seen {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let is_it = |line: &&str| {
            line.split_once(':').is_some_and(|(key, _)| key.eq_ignore_ascii_case(name))
        };
        let line = self.text.lines().find(is_it)?;
        line.split_once(':').map(|(_, value)| value.trim())
    }

    /// The bytes of the asked range.
    pub fn range(&self) -> Option<(usize, usize)> {
        let (first, last) = self.header("Range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?))
    }
}

/// What a script answers.
pub enum Play {
    /// These bytes, then the next request.
    Send(Vec<u8>),
    /// These bytes, then close.
    Last(Vec<u8>),
    /// The first bytes at once, then one byte each so many milliseconds.
    Drip(Vec<u8>, usize, u64),
    /// These bytes after so many milliseconds, then the next request.
    Late(Vec<u8>, u64),
    /// Nothing, until the test is over.
    Stall,
}

/// The body all ranges are cut from.
pub fn blob() -> Vec<u8> {
    (0..300_000_usize).map(|at| (at * 7 + at / 251) as u8).collect()
}

/// A right answer to a range request for `blob()`.
pub fn partial(seen: &Seen) -> Vec<u8> {
    let blob = blob();
    let (first, last) = seen.range().expect("a range was asked for");
    let body = &blob[first..=last];
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{}\r\n\
         Content-Length: {}\r\n\r\n",
        blob.len(),
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// An answer without a body.
pub fn status(code: u16, headers: &str) -> Vec<u8> {
    format!("HTTP/1.1 {code} X\r\nContent-Length: 0\r\n{headers}\r\n").into_bytes()
}

/// An answer with a JSON body.
pub fn json(text: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len()).into_bytes()
}

type Script = dyn Fn(&Seen) -> Play + Send + Sync;

struct State {
    script: Box<Script>,
    tls: Option<Arc<ServerConfig>>,
    seen: Mutex<Vec<Seen>>,
    sockets: Mutex<Vec<TcpStream>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    is_over: AtomicBool,
    over: (Mutex<()>, Condvar),
}

/// A running server.
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    state: Arc<State>,
}

impl Server {
    /// A plain server.
    pub fn start(script: impl Fn(&Seen) -> Play + Send + Sync + 'static) -> Self {
        Server::listen(Box::new(script), None)
    }

    /// A TLS server.
    pub fn start_tls(
        config: Arc<ServerConfig>,
        script: impl Fn(&Seen) -> Play + Send + Sync + 'static,
    ) -> Self {
        Server::listen(Box::new(script), Some(config))
    }

    fn listen(script: Box<Script>, tls: Option<Arc<ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            script,
            tls,
            seen: Mutex::default(),
            sockets: Mutex::default(),
            threads: Mutex::default(),
            is_over: AtomicBool::new(false),
            over: (Mutex::new(()), Condvar::new()),
        });
        let shared = Arc::clone(&state);
        let acceptor = std::thread::spawn(move || accept(&listener, &shared));
        state.threads.lock().unwrap().push(acceptor);
        Server { address, state }
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().unwrap().clone()
    }

    /// Closes every connection that stands, as a server does with idle ones.
    pub fn hang_up(&self) {
        for socket in self.state.sockets.lock().unwrap().drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.state.is_over.store(true, Ordering::SeqCst);
        self.state.over.1.notify_all();
        self.hang_up();
        let _ = TcpStream::connect(self.address);
        let threads: Vec<_> = self.state.threads.lock().unwrap().drain(..).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let late: Vec<_> = self.state.threads.lock().unwrap().drain(..).collect();
        self.hang_up();
        late.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

fn accept(listener: &TcpListener, state: &Arc<State>) {
    for (connection, socket) in listener.incoming().enumerate() {
        if state.is_over.load(Ordering::SeqCst) {
            return;
        }
        let Ok(socket) = socket else { continue };
        socket.set_nodelay(true).unwrap();
        state.sockets.lock().unwrap().push(socket.try_clone().unwrap());
        let shared = Arc::clone(state);
        let thread = std::thread::spawn(move || {
            let end = socket.try_clone().unwrap();
            match &shared.tls {
                None => serve(connection, socket, &shared),
                Some(config) => {
                    let tls = ServerConnection::new(Arc::clone(config)).unwrap();
                    serve(connection, StreamOwned::new(tls, socket), &shared);
                }
            }
            // The list of sockets holds another descriptor: dropping this one would not close.
            let _ = end.shutdown(Shutdown::Both);
        });
        state.threads.lock().unwrap().push(thread);
    }
}

fn serve(connection: usize, mut stream: impl Read + Write, state: &State) {
    let mut buffer = Vec::new();
    loop {
        let Some(text) = receive(&mut stream, &mut buffer) else { return };
        let line = text.lines().next().unwrap_or("").replace(" HTTP/1.1", "");
        let seen = {
            let mut all = state.seen.lock().unwrap();
            let seen = Seen { connection, number: all.len(), line, text };
            all.push(seen.clone());
            seen
        };
        let (bytes, at_once, pause_ms, is_last) = match (state.script)(&seen) {
            Play::Send(bytes) => (bytes, usize::MAX, 0, false),
            Play::Last(bytes) => (bytes, usize::MAX, 0, true),
            Play::Drip(bytes, at_once, pause_ms) => (bytes, at_once, pause_ms, true),
            Play::Late(_, pause_ms) if wait(state, pause_ms) => return,
            Play::Late(bytes, _) => (bytes, usize::MAX, 0, false),
            Play::Stall => (Vec::new(), 0, u64::MAX, true),
        };
        let at_once = at_once.min(bytes.len());
        if stream.write_all(&bytes[..at_once]).and_then(|()| stream.flush()).is_err() {
            return;
        }
        for byte in &bytes[at_once..] {
            if wait(state, pause_ms) || stream.write_all(&[*byte]).is_err() {
                return;
            }
        }
        if pause_ms == u64::MAX {
            wait(state, pause_ms);
        }
        if is_last {
            return;
        }
    }
}

/// Waits so long; true when the test is over.
fn wait(state: &State, pause_ms: u64) -> bool {
    let guard = state.over.0.lock().unwrap();
    let pause = Duration::from_millis(pause_ms.min(60_000));
    let goes_on = |(): &mut ()| !state.is_over.load(Ordering::SeqCst);
    let _ = state.over.1.wait_timeout_while(guard, pause, goes_on).unwrap();
    state.is_over.load(Ordering::SeqCst)
}

fn receive(stream: &mut impl Read, buffer: &mut Vec<u8>) -> Option<String> {
    loop {
        let end = buffer.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4);
        if let Some(end) = end {
            let head = String::from_utf8_lossy(&buffer[..end]).to_string();
            let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
            let size = end + length.map_or(0, |text| text.parse::<usize>().unwrap());
            if buffer.len() >= size {
                let text = String::from_utf8_lossy(&buffer[..size]).to_string();
                buffer.drain(..size);
                return Some(text);
            }
        }
        let mut bytes = [0_u8; 4096];
        match stream.read(&mut bytes) {
            Ok(0) | Err(_) => return None,
            Ok(size) => buffer.extend_from_slice(&bytes[..size]),
        }
    }
}
