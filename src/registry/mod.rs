//! Where bytes come from: registries, their mirrors and proxies, and directories of blobs.
//!
//! A caller needs `route::Shared` (one per process), `client::Client` (one per core) and
//! `config::Backend`. From the outside in: `client` asks a `way` (a core's side of a `route`),
//! `fetch` goes round its sources, `login` gets tokens, `exchange` carries one request on a
//! `connection` of the `pool`. Who makes images needs more: `download` gives a whole blob, and a
//! `repository` is written to, blob by blob by `upload`. Pure files, without I/O and without the
//! engine: `config`, `reference`, `origin`, `secret`, `http`, `framing`, `auth`, `credentials`,
//! `mirrors`, `redirects`, `timestamp`, `tokens`, `complaint`, `patience`.

pub mod auth;
pub mod body;
pub mod client;
pub mod complaint;
pub mod config;
pub mod connection;
pub mod credentials;
pub mod download;
pub mod exchange;
pub mod fetch;
pub mod framing;
pub mod http;
pub mod localfs;
mod login;
pub mod mirrors;
pub mod origin;
pub mod pace;
pub mod patience;
pub mod pool;
pub mod redirects;
pub mod reference;
pub mod repository;
pub mod request;
pub mod resolve;
pub mod route;
pub mod secret;
pub mod timestamp;
pub mod tls;
pub mod tokens;
mod upkeep;
pub mod upload;
pub mod vault;
pub mod way;

#[cfg(test)]
mod client_tests;
#[cfg(test)]
mod config_tests;
#[cfg(test)]
mod http_tests;
#[cfg(test)]
mod login_tests;
#[cfg(test)]
mod patience_tests;
#[cfg(test)]
mod server_tests;
#[cfg(test)]
mod upload_tests;
#[cfg(test)]
mod vault_tests;
