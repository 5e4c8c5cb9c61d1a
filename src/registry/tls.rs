//! TLS as bytes in and bytes out; the only file that names rustls.
//!
//! Owns the client configurations: one per host with certificates of its own in Docker's
//! `certs.d/HOST[:PORT]`, one for everybody else, so that session tickets are shared by all cores.
//! A configuration is built by reading files: do that on a helper thread. Never touches a socket.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme,
};

use crate::config as limits;
use crate::error::{Error, Result};
use crate::registry::origin::Origin;

/// How a server proves who it is; shared.
#[derive(Clone, Debug)]
pub struct TlsConfig(Arc<ClientConfig>);

/// All configurations of the process.
#[derive(Debug)]
pub struct TlsConfigs {
    directory: PathBuf,
    known: Mutex<HashMap<(bool, String), TlsConfig>>,
}

impl TlsConfigs {
    /// None loaded; `directory` is Docker's `certs.d`.
    pub fn new(directory: &Path) -> Self {
        TlsConfigs { directory: directory.to_path_buf(), known: Mutex::default() }
    }

    /// The configuration for a host, when it was loaded before.
    pub fn find(&self, skip_verify: bool, origin: &Origin) -> Option<TlsConfig> {
        self.lock().get(&(skip_verify, origin.host_port())).cloned()
    }

    /// Loads the configuration for a host; reads files.
    pub fn load(&self, skip_verify: bool, origin: &Origin) -> Result<TlsConfig> {
        let own = HostFiles::read(&self.directory, origin)?;
        let general = (skip_verify, String::new());
        let shared = match own.is_empty() {
            true => self.lock().get(&general).cloned(),
            false => None,
        };
        let config = match shared {
            Some(config) => config,
            None => TlsConfig(Arc::new(build(skip_verify, &own)?)),
        };
        let mut known = self.lock();
        if known.len() >= limits::RESOLVE_NAME_COUNT_MAX {
            known.clear();
        }
        if own.is_empty() {
            known.insert(general, config.clone());
        }
        known.insert((skip_verify, origin.host_port()), config.clone());
        Ok(config)
    }

    /// Forgets everything, so that changed certificates are read at the next connection.
    pub fn forget(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(bool, String), TlsConfig>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One TLS connection: what it was fed and what it has to say.
#[derive(Debug)]
pub struct TlsStream {
    inner: ClientConnection,
    is_ended: bool,
}

/// What one `TlsStream::read` did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pumped {
    /// Bytes of ciphertext taken.
    pub consumed: usize,
    /// Bytes of plaintext given.
    pub produced: usize,
}

impl TlsStream {
    /// A connection about to shake hands with `host`.
    pub fn new(config: &TlsConfig, host: &str) -> Result<Self> {
        let name = ServerName::try_from(host.to_string())
            .map_err(|_| Error::Malformed(format!("{host:?} cannot be a TLS server name")))?;
        let inner = ClientConnection::new(Arc::clone(&config.0), name)
            .map_err(|error| Error::unavailable(format!("TLS to {host}: {error}")))?;
        Ok(TlsStream { inner, is_ended: false })
    }

    /// Whether the handshake is still going on.
    pub fn is_handshaking(&self) -> bool {
        self.inner.is_handshaking()
    }

    /// Whether the server said goodbye.
    pub fn is_ended(&self) -> bool {
        self.is_ended
    }

    /// Takes plaintext to be sent; all of it, up to 64 KiB.
    pub fn write(&mut self, plaintext: &[u8]) -> Result<()> {
        self.inner
            .writer()
            .write_all(plaintext)
            .map_err(|error| Error::unavailable(format!("TLS: {error}")))
    }

    /// Moves what is to be sent into `out`; 0 when there is nothing.
    pub fn take_output(&mut self, mut out: &mut [u8]) -> usize {
        let size = out.len();
        while self.inner.wants_write() && !out.is_empty() {
            match self.inner.write_tls(&mut out) {
                Ok(1..) => {}
                Ok(0) | Err(_) => break,
            }
        }
        size - out.len()
    }

    /// Takes ciphertext and gives plaintext until one of both is used up.
    pub fn read(&mut self, cipher: &[u8], out: &mut [u8]) -> Result<Pumped> {
        let mut done = Pumped::default();
        loop {
            if done.produced < out.len() {
                match self.inner.reader().read(&mut out[done.produced..]) {
                    Ok(0) => self.is_ended = true,
                    Ok(size) => {
                        done.produced += size;
                        continue;
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return Err(Error::unavailable(format!("TLS: {error}"))),
                }
            }
            let is_full = done.produced == out.len() && !out.is_empty();
            if is_full || self.is_ended || done.consumed == cipher.len() {
                return Ok(done);
            }
            match self.inner.read_tls(&mut &cipher[done.consumed..]) {
                Ok(0) => {
                    self.is_ended = true;
                    return Ok(done);
                }
                Ok(size) => done.consumed += size,
                // Its plaintext buffer is full: the caller has to read first.
                Err(_) => return Ok(done),
            }
            self.inner.process_new_packets().map_err(refused)?;
        }
    }
}

fn refused(error: rustls::Error) -> Error {
    match error {
        rustls::Error::InvalidCertificate(why) => Error::Unavailable {
            what: format!(
                "its certificate was refused ({why}); put its CA into \
                 /etc/docker/certs.d/HOST:PORT/ca.crt or the system's store"
            ),
            retry_after_ms: None,
        },
        other => Error::unavailable(format!("TLS: {other}")),
    }
}

fn build(skip_verify: bool, own: &HostFiles) -> Result<ClientConfig> {
    let provider = Arc::new(ring::default_provider());
    let mut roots = RootCertStore::empty();
    if !skip_verify {
        // Single unreadable files are passed over: a store is useful without them.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        roots.add_parsable_certificates(own.roots.iter().cloned());
    }
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::Unsupported(format!("TLS: {error}")))?
        .with_root_certificates(roots);
    let mut config = match &own.identity {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => builder
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(|error| Error::Malformed(format!("client certificate: {error}")))?,
    };
    if skip_verify {
        config.dangerous().set_certificate_verifier(Arc::new(Unseen(provider)));
    }
    Ok(config)
}

/// What Docker's directory holds for one host: `*.crt` are roots, `NAME.cert` with `NAME.key` is
/// who we are.
#[derive(Default)]
struct HostFiles {
    roots: Vec<CertificateDer<'static>>,
    identity: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
}

impl HostFiles {
    fn is_empty(&self) -> bool {
        self.roots.is_empty() && self.identity.is_none()
    }

    fn read(directory: &Path, origin: &Origin) -> Result<Self> {
        let mut files = HostFiles::default();
        for name in [origin.authority(), origin.host_port()] {
            let Ok(entries) = std::fs::read_dir(directory.join(name)) else { continue };
            for path in entries.filter_map(|entry| entry.ok().map(|entry| entry.path())) {
                match path.extension().and_then(|extension| extension.to_str()) {
                    Some("crt") => files.roots.extend(certificates(&path)?),
                    Some("cert") => {
                        let key_path = path.with_extension("key");
                        let key = PrivateKeyDer::from_pem_file(&key_path)
                            .map_err(|error| damaged(&key_path, &error))?;
                        files.identity = Some((certificates(&path)?, key));
                    }
                    _ => {}
                }
            }
        }
        Ok(files)
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let damaged = |error| damaged(path, &error);
    let found = CertificateDer::pem_file_iter(path).map_err(damaged)?;
    found.collect::<std::result::Result<_, _>>().map_err(damaged)
}

fn damaged(path: &Path, error: &rustls::pki_types::pem::Error) -> Error {
    Error::Malformed(format!("{}: not PEM: {error}", path.display()))
}

/// `skip_verify`: the operator said that any certificate will do. Signatures are still checked, so
/// that the other side holds the key of whatever it showed.
#[derive(Debug)]
struct Unseen(Arc<CryptoProvider>);

impl ServerCertVerifier for Unseen {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
