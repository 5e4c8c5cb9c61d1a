//! Wiring: the control API and the state it speaks about.

mod admission;
pub mod api;
pub mod connection;
pub mod control;
pub mod cookies;
pub mod crew;
pub mod cull;
mod doors;
pub mod entry;
pub mod evictor;
pub mod http;
mod log;
mod mount_wish;
pub mod mounts;
pub mod options;
pub mod reply;
mod sealer;
pub mod server;
mod service;
pub mod socket;
pub mod state;
pub mod statistics;
mod usage;
pub mod worker;

pub use service::run;

#[cfg(test)]
mod control_tests;
#[cfg(test)]
mod entry_tests;
#[cfg(test)]
mod server_tests;
