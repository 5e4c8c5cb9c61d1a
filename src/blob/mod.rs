//! Policy: what is known about images and blobs, which bytes are here, who fetches the rest, in
//! which order.
//!
//! A fault is the function in `serve.rs`, a fetch the one in `fetch.rs`; `map.rs` is the only
//! memory of the fault path that several cores write.

pub mod awaited;
pub mod cache;
pub mod catalog;
pub mod crew;
mod fetch;
mod fetchers;
pub mod flight;
mod inlined;
pub mod journal;
pub mod latency;
mod launch;
pub mod load;
pub mod map;
pub mod open;
pub mod plan;
mod prefetch;
pub mod recorder;
pub mod registration;
mod retry;
pub mod schedule;
pub mod seats;
mod serve;
pub mod statistics;
pub mod touches;
pub mod workbench;

#[cfg(test)]
mod catalog_tests;
