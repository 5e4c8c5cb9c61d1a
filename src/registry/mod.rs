//! Where bytes come from: registries, their mirrors and proxies, and directories of blobs.
//!
//! Pure files, without I/O and without the engine: `config`, `reference`, `origin`, `secret`,
//! `http`, `framing`, `auth`, `credentials`, `mirrors`, `redirects`.

pub mod auth;
pub mod config;
pub mod credentials;
pub mod framing;
pub mod http;
pub mod mirrors;
pub mod origin;
pub mod redirects;
pub mod reference;
pub mod secret;
pub mod timestamp;

#[cfg(test)]
mod config_tests;
#[cfg(test)]
mod http_tests;
