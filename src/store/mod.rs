//! Where bytes go: the cache objects behind the kernel's doors, and the record of what is in them.
//!
//! Behind the cachefiles door the kernel owns the files: `object.rs` is one of them, `ledger.rs`
//! and `record.rs` know what they may hold. Behind the fanotify door they are ours: `segment.rs` is
//! one, `segments.rs` all of them, `completion.rs` the record of what is complete on the disk,
//! `space.rs` how many bytes there may be and what has to go.

pub mod completion;
pub mod ledger;
pub mod object;
pub mod record;
pub mod segment;
pub mod segments;
pub mod space;

#[cfg(test)]
mod ledger_tests;
