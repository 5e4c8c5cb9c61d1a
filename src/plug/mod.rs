//! How container services plug in: containerd's snapshotter, and images made known to containerd.
//!
//! [`snapshotter`] speaks containerd's snapshots service; [`snapshot_store`] carries out its calls
//! by the rules of [`snapshots`], on records that survive any crash ([`snapshot_records`]), with
//! images that the daemon mounts ([`snapshot_images`]). [`pull`] is the way in for clients that
//! pass no labels. What this room needs of the daemon is handed in as functions: it knows no socket
//! of ours and no engine.

pub mod containerd;
pub mod containerd_messages;
pub mod labels;
pub mod pull;
pub mod snapshot_filter;
pub mod snapshot_images;
pub mod snapshot_layer;
pub mod snapshot_overlay;
pub mod snapshot_probe;
pub mod snapshot_records;
pub mod snapshot_store;
pub mod snapshot_usage;
pub mod snapshots;
pub mod snapshotter;

#[cfg(test)]
mod snapshot_store_tests;
#[cfg(test)]
mod snapshots_tests;
