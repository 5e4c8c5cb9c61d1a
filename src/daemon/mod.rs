//! Wiring: the control API and the state it speaks about.

pub mod api;
pub mod connection;
pub mod control;
pub mod crew;
pub mod cull;
pub mod entry;
pub mod http;
pub mod reply;
pub mod server;
pub mod socket;
pub mod state;
pub mod statistics;

#[cfg(test)]
mod control_tests;
#[cfg(test)]
mod server_tests;
