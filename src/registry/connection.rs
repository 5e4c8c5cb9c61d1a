//! One connection to a server or a proxy: plain or TLS, from dialling to closing.
//!
//! Owns its socket and, while a request is on its way, one wire lease cut into three zones: the
//! request head, text that was received, and ciphertext. An idle connection holds no lease.
//! Dropping it closes it. Knows nothing of HTTP; body bytes of a plain connection go from the
//! socket to where they are wanted, those of a TLS one are decrypted there.

use std::net::SocketAddr;
use std::ops::Range;

use crate::config as limits;
use crate::engine::{Class, Core, Fd, Lane, Lease};
use crate::error::{Error, Result};
use crate::registry::tls::TlsStream;

/// Where the request head is written.
const REQUEST: Range<usize> = 0..limits::HTTP_REQUEST_HEAD_SIZE_MAX;
/// Where received text lies: response heads, chunk sizes, what came with them.
const TEXT: Range<usize> = REQUEST.end..REQUEST.end + limits::HTTP_RESPONSE_HEAD_SIZE_MAX;
/// Where ciphertext lies.
const CIPHER: Range<usize> = TEXT.end..limits::WIRE_LEASE_SIZE;

/// Plaintext given to TLS at once: half of what it holds.
const TLS_PIECE_SIZE: usize = 32 * limits::KIB;

/// Bytes of the text zone.
pub const TEXT_SIZE: usize = TEXT.end - TEXT.start;

// A TLS record of 16 KiB fits, so that one receive can bring a whole one.
const _: () = assert!(CIPHER.end - CIPHER.start >= 17 * limits::KIB);

/// An open connection.
pub struct Connection {
    core: Core,
    fd: Fd,
    tls: Option<Box<TlsStream>>,
    wire: Option<Lease>,
    /// Ciphertext received and not yet fed to TLS, within `CIPHER`.
    cipher: Range<usize>,
    /// Whether it has served a request before: then its first failure says nothing.
    pub is_reused: bool,
    /// Since when it has been idle.
    pub idle_since_ns: u64,
}

impl Connection {
    /// Connects to `address`.
    pub async fn dial(core: &Core, address: SocketAddr, deadline_ns: u64) -> Result<Self> {
        let fd = core.socket(&address)?;
        let connection = Connection {
            core: core.clone(),
            fd,
            tls: None,
            wire: None,
            cipher: CIPHER.start..CIPHER.start,
            is_reused: false,
            idle_since_ns: 0,
        };
        let dialled = core.connect(fd, address).by(deadline_ns).await;
        dialled.map_err(|error| trouble(error, "connecting"))?;
        Ok(connection)
    }

    /// Takes the lease a request needs.
    pub async fn wake(&mut self, lane: Lane) {
        if self.wire.is_none() {
            self.wire = Some(self.core.lease_for(lane, Class::Wire).await);
        }
    }

    /// Gives the lease back; false when bytes nobody asked for have arrived, so that the connection
    /// must not be used again.
    pub fn rest(&mut self) -> bool {
        let is_quiet = match (&mut self.tls, &self.wire) {
            (Some(tls), Some(wire)) => {
                let mut surplus = [0_u8; 1];
                let pumped = tls.read(&wire[self.cipher.clone()], &mut surplus);
                let left = self.cipher.end - self.cipher.start;
                matches!(pumped, Ok(done) if done.produced == 0 && done.consumed == left)
                    && !tls.is_ended()
            }
            _ => true,
        };
        self.cipher = CIPHER.start..CIPHER.start;
        self.wire = None;
        self.is_reused = true;
        self.idle_since_ns = self.core.now();
        is_quiet
    }

    /// Whether the server has closed an idle connection, or sent something unasked.
    pub async fn is_stale(&self) -> bool {
        let events = (libc::POLLIN | libc::POLLRDHUP) as u32;
        // A deadline of now: the poll is looked at once, never waited for.
        let polled = self.core.poll(self.fd, events).by(self.core.now()).await;
        !matches!(polled, Err(Error::Deadline(_)))
    }

    /// Shakes hands.
    pub async fn secure(&mut self, tls: TlsStream, deadline_ns: u64) -> Result<()> {
        self.tls = Some(Box::new(tls));
        loop {
            self.flush(deadline_ns).await?;
            if self.tls.as_ref().is_none_or(|tls| !tls.is_handshaking()) {
                return Ok(());
            }
            if self.receive_cipher(deadline_ns).await? == 0 {
                return Err(Error::unavailable("the server closed during the TLS handshake"));
            }
            let (Some(tls), Some(wire)) = (&mut self.tls, &self.wire) else { continue };
            // No room for plaintext: none may come before the handshake is over.
            let pumped = tls.read(&wire[self.cipher.clone()], &mut []);
            if pumped.is_err() {
                // The alert that says why; the refusal matters more than its delivery.
                let _ = self.flush(deadline_ns).await;
            }
            self.cipher.start += pumped?.consumed;
        }
    }

    /// Where the next request head is written.
    pub fn request_zone(&mut self) -> &mut [u8] {
        &mut self.wire.as_mut().expect("awake while a request is made")[REQUEST]
    }

    /// Received text, by its place in the text zone.
    pub fn text(&self, range: Range<usize>) -> &[u8] {
        let wire = self.wire.as_ref().expect("awake while a request is made");
        &wire[TEXT][range]
    }

    /// Sends the first `size` bytes of the request zone.
    pub async fn send(&mut self, size: usize, deadline_ns: u64) -> Result<()> {
        match (&mut self.tls, &self.wire) {
            (Some(tls), Some(wire)) => {
                tls.write(&wire[..size])?;
                self.flush(deadline_ns).await
            }
            _ => self.send_wire(0..size, deadline_ns).await,
        }
    }

    /// Sends `lease[range]`, somebody's bytes.
    pub async fn send_from(
        &mut self,
        lease: Lease,
        range: Range<usize>,
        deadline_ns: u64,
    ) -> (Lease, Result<()>) {
        if self.tls.is_none() {
            return self.send_all(lease, range, deadline_ns).await;
        }
        for start in range.clone().step_by(TLS_PIECE_SIZE) {
            let end = range.end.min(start + TLS_PIECE_SIZE);
            let written = self.tls.as_mut().map_or(Ok(()), |tls| tls.write(&lease[start..end]));
            if let Err(error) = written {
                return (lease, Err(error));
            }
            if let Err(error) = self.flush(deadline_ns).await {
                return (lease, Err(error));
            }
        }
        (lease, Ok(()))
    }

    /// Receives more text to `place` of the text zone; 0 when the server closed.
    pub async fn receive_text(&mut self, place: Range<usize>, deadline_ns: u64) -> Result<usize> {
        let place = TEXT.start + place.start..TEXT.start + place.end;
        if self.tls.is_none() {
            return self.receive_wire(place, deadline_ns).await;
        }
        loop {
            let (Some(tls), Some(wire)) = (&mut self.tls, &mut self.wire) else {
                return Ok(0);
            };
            let (text, cipher) = wire.split_at_mut(CIPHER.start);
            let fed = self.cipher.start - CIPHER.start..self.cipher.end - CIPHER.start;
            let done = tls.read(&cipher[fed], &mut text[place.clone()])?;
            self.cipher.start += done.consumed;
            if done.produced > 0 || tls.is_ended() {
                return Ok(done.produced);
            }
            if self.receive_cipher(deadline_ns).await? == 0 {
                return Ok(0);
            }
        }
    }

    /// Receives into somebody's lease; 0 when the server closed.
    pub async fn receive_into(
        &mut self,
        mut lease: Lease,
        range: Range<usize>,
        deadline_ns: u64,
    ) -> (Lease, Result<usize>) {
        if self.tls.is_none() {
            let (lease, got) = self.core.recv(self.fd, lease, range).by(deadline_ns).await;
            return (lease, got.map_err(|error| trouble(error, "receiving")));
        }
        loop {
            let (Some(tls), Some(wire)) = (&mut self.tls, &self.wire) else {
                return (lease, Ok(0));
            };
            match tls.read(&wire[self.cipher.clone()], &mut lease[range.clone()]) {
                Err(error) => return (lease, Err(error)),
                Ok(done) => {
                    self.cipher.start += done.consumed;
                    if done.produced > 0 || tls.is_ended() {
                        return (lease, Ok(done.produced));
                    }
                }
            }
            match self.receive_cipher(deadline_ns).await {
                Ok(0) => return (lease, Ok(0)),
                Ok(_) => {}
                Err(error) => return (lease, Err(error)),
            }
        }
    }

    /// Sends everything TLS has to say.
    async fn flush(&mut self, deadline_ns: u64) -> Result<()> {
        loop {
            let (Some(tls), Some(wire)) = (&mut self.tls, &mut self.wire) else { return Ok(()) };
            // The request zone is free: TLS has taken its copy.
            let size = tls.take_output(&mut wire[REQUEST]);
            if size == 0 {
                return Ok(());
            }
            self.send_wire(0..size, deadline_ns).await?;
        }
    }

    async fn send_wire(&mut self, range: Range<usize>, deadline_ns: u64) -> Result<()> {
        let lease = self.wire.take().expect("awake while a request is made");
        let (lease, sent) = self.send_all(lease, range, deadline_ns).await;
        self.wire = Some(lease);
        sent
    }

    async fn send_all(
        &self,
        mut lease: Lease,
        mut range: Range<usize>,
        deadline_ns: u64,
    ) -> (Lease, Result<()>) {
        while range.start < range.end {
            let sending = self.core.send(self.fd, lease, range.clone()).by(deadline_ns);
            let (back, sent) = sending.await;
            lease = back;
            match sent.map_err(|error| trouble(error, "sending")) {
                Ok(0) => {
                    let why = "sending: the connection takes nothing";
                    return (lease, Err(Error::unavailable(why)));
                }
                Ok(size) => range.start += size,
                Err(error) => return (lease, Err(error)),
            }
        }
        (lease, Ok(()))
    }

    async fn receive_wire(&mut self, range: Range<usize>, deadline_ns: u64) -> Result<usize> {
        let lease = self.wire.take().expect("awake while a request is made");
        let (lease, got) = self.core.recv(self.fd, lease, range).by(deadline_ns).await;
        self.wire = Some(lease);
        got.map_err(|error| trouble(error, "receiving"))
    }

    /// Receives ciphertext behind what is not yet fed.
    async fn receive_cipher(&mut self, deadline_ns: u64) -> Result<usize> {
        if self.cipher.start == self.cipher.end {
            self.cipher = CIPHER.start..CIPHER.start;
        }
        if self.cipher.end == CIPHER.end {
            return Err(Error::unavailable("TLS: the server sends faster than it may"));
        }
        let got = self.receive_wire(self.cipher.end..CIPHER.end, deadline_ns).await?;
        self.cipher.end += got;
        Ok(got)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.core.close(self.fd);
    }
}

/// A failed operation on a connection: another connection may do better.
fn trouble(error: Error, doing: &str) -> Error {
    match error {
        Error::System { .. } => Error::unavailable(format!("{doing}: {}", cause(&error))),
        other => other.context(doing),
    }
}

fn cause(error: &Error) -> String {
    match error {
        Error::System { errno, .. } => std::io::Error::from_raw_os_error(*errno).to_string(),
        other => other.to_string(),
    }
}
