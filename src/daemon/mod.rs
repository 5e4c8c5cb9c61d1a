//! Wiring: the control API and the state it speaks about.

pub mod api;
pub mod entry;
pub mod http;
pub mod reply;
pub mod socket;
pub mod state;
pub mod statistics;
