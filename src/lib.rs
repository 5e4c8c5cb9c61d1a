//! sluice: containers start before their image has been downloaded.
//!
//! The architecture page; filled in room by room.

pub mod blob;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod engine;
pub mod error;
pub mod image;
pub mod registry;
pub mod store;
pub mod upcall;
