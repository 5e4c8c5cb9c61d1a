//! Wiring: the control API and the state it speaks about.

mod admission;
pub mod api;
mod clearing;
mod comeback;
pub mod connection;
pub mod control;
pub mod cookies;
pub mod crew;
pub mod cull;
mod doors;
mod durability;
pub mod entry;
pub mod evictor;
pub mod http;
pub mod keeper;
pub mod keeper_link;
pub mod keeper_process;
pub mod keeper_systemd;
pub mod keeper_wire;
pub mod lineage;
pub mod log;
mod mount_wish;
pub mod mounts;
pub mod options;
mod recording;
mod registering;
pub mod remember;
pub mod reply;
mod sealer;
pub mod server;
mod service;
pub mod socket;
mod starts;
pub mod state;
pub mod statistics;
pub mod succession;
mod succession_device;
pub mod supervisor;
mod sys;
mod touched_files;
mod usage;
mod witness;
pub mod worker;

pub use service::run;

#[cfg(test)]
mod control_tests;
#[cfg(test)]
mod entry_tests;
#[cfg(test)]
mod lineage_tests;
#[cfg(test)]
mod remember_tests;
#[cfg(test)]
mod server_tests;
