//! What container services plug in: Docker's graphdriver and containerd's snapshotter.
//!
//! For Docker, [`docker_server`] speaks the graphdriver protocol and [`driver`] carries it out on
//! [`layers`], with images that the daemon mounts ([`driver_images`]).
//!
//! For containerd, [`snapshotter`] speaks the snapshots service; [`snapshot_store`] carries out its
//! calls by the rules of [`snapshots`], on records that survive any crash ([`snapshot_records`]),
//! with images that the daemon mounts ([`snapshot_images`]). [`pull`] is the way in for clients
//! that pass no labels.
//!
//! Both meet a daemon or a registry that fails by the same policies ([`start`]).
//!
//! This room knows neither the daemon nor the command line: that a lazily loaded image is mounted
//! and unmounted is done by functions it is handed.

pub mod beneath;
pub mod changes;
pub mod containerd;
pub mod containerd_messages;
pub mod docker;
pub mod docker_http;
pub mod docker_image;
pub mod docker_origin;
pub mod docker_server;
pub mod driver;
pub mod driver_images;
pub mod labels;
pub mod layers;
pub mod overlay;
pub mod pack;
pub mod probe;
pub mod pull;
pub mod snapshot_filter;
pub mod snapshot_images;
pub mod snapshot_layer;
pub mod snapshot_overlay;
pub mod snapshot_records;
pub mod snapshot_store;
pub mod snapshot_usage;
pub mod snapshots;
pub mod snapshotter;
pub mod stack;
pub mod start;
pub mod unpack;

#[cfg(test)]
mod docker_tests;

#[cfg(test)]
mod driver_tests;

#[cfg(test)]
mod layer_tests;

#[cfg(test)]
mod snapshot_store_tests;

#[cfg(test)]
mod snapshots_tests;
