//! Wiring: the control API and the state it speaks about.

pub mod entry;
pub mod state;
