//! Wiring: the control API and the state it speaks about.

pub mod api;
pub mod entry;
pub mod reply;
pub mod state;
pub mod statistics;
