//! A certificate authority of one process: made at start, trusted by nobody else.
//!
//! Owns the making of the certificates. Only the authority's certificate is ever written down, in
//! PEM; its key and the server's stay in memory.

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use std::path::Path;
use std::sync::Arc;
use std::{fs, io};

/// Makes an authority and a certificate for loopback; the authority's goes to `ca_out`.
pub fn private_authority(ca_out: &Path) -> io::Result<Arc<rustls::ServerConfig>> {
    let mut params = CertificateParams::new(Vec::new()).map_err(io::Error::other)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let ca_key = KeyPair::generate().map_err(io::Error::other)?;
    let ca = params.self_signed(&ca_key).map_err(io::Error::other)?;
    fs::write(ca_out, ca.pem())?;

    let names = ["127.0.0.1", "::1", "localhost"].map(str::to_owned).to_vec();
    let leaf_key = KeyPair::generate().map_err(io::Error::other)?;
    let leaf = CertificateParams::new(names).map_err(io::Error::other)?;
    let issuer = Issuer::new(params, ca_key);
    let leaf = leaf.signed_by(&leaf_key, &issuer).map_err(io::Error::other)?;

    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(leaf_key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(provider);
    let builder = builder.with_safe_default_protocol_versions().map_err(io::Error::other)?;
    let chain = vec![leaf.der().clone(), ca.der().clone()];
    let config = builder.with_no_client_auth().with_single_cert(chain, key);
    config.map(Arc::new).map_err(io::Error::other)
}
