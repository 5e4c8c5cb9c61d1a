//! Limits of the Docker plugin: layers it unpacks and packs, and the socket it serves.

use super::*;

// Layers: hostile input from registries and containers.

/// Paths of a layer's directories, kept until its end to set their times: about a million.
pub const LAYER_DIRECTORIES_MAX_BYTES: usize = 128 * MIB;
/// Directories in each other: PATH_MAX has room for 2,048, and each costs a descriptor.
pub const LAYER_DEPTH_MAX: usize = 1000;
/// Paths in one answer to `docker diff`.
pub const LAYER_CHANGES_MAX: usize = 1 << 20;
/// Layers on top of each other: Docker stacks at most 127, overlayfs 500.
pub const LAYERS_STACKED_MAX: usize = 500;
/// A layer's identifier; Docker's have 64 bytes and perhaps `-init`.
pub const LAYER_ID_MAX_BYTES: usize = 128;
/// Mounts on top of each other at one place.
pub const MOUNTS_STACKED_MAX: usize = 16;
/// A file of Docker's image store: names and notes, a few hundred bytes for each image.
pub const DOCKER_NOTES_MAX_BYTES: u64 = 64 * MIB as u64;
/// A container's start waits so long for a daemon that does not answer.
pub const DOCKER_DAEMON_WAIT_MS: u64 = 30_000;
/// The pause between two tries.
pub const DOCKER_DAEMON_LOOK_MS: u64 = 250;
/// A daemon of the plugin's own that died is started again after so long.
pub const DOCKER_DAEMON_AGAIN_MS: u64 = 1_000;
/// An image stays mounted so long after its last user: a container's start gets it three times.
pub const DOCKER_IMAGE_IDLE_MS: u64 = 3_000;
/// The pause between two looks at such images.
pub const DOCKER_SWEEP_MS: u64 = 1_000;

// The socket. Memory: 64 connections x (64 KiB in + 64 KiB out + 256 KiB of a file) = 24 MiB.

/// Connections of Docker at once, each with a thread; more wait in the kernel.
pub const DOCKER_CONNECTIONS_MAX: usize = 64;
/// A request's head.
pub const DOCKER_HEAD_MAX_BYTES: usize = 16 * KIB;
/// Header lines of a request, and trailers.
pub const DOCKER_HEADER_COUNT_MAX: usize = 64;
/// A line with the size of a chunk.
pub const DOCKER_LINE_MAX_BYTES: usize = 4 * KIB;
/// The arguments of a method other than ApplyDiff.
pub const DOCKER_ARGUMENTS_MAX_BYTES: u64 = MIB as u64;
/// Bytes read from a connection at once.
pub const DOCKER_READ_BYTES: usize = 64 * KIB;
/// Bytes sent as one chunk.
pub const DOCKER_CHUNK_BYTES: usize = 64 * KIB;
/// Of a body nobody wanted, so much is read away before the connection is given up.
pub const DOCKER_DRAIN_MAX_BYTES: u64 = 16 * MIB as u64;
/// A connection without a request is kept this long: Docker would take a close for a failure.
pub const DOCKER_IDLE_MS: u64 = 3_600_000;
/// Docker may be silent this long within a request: it forwards a download.
pub const DOCKER_PATIENCE_MS: u64 = 600_000;
/// Calls under way at a stop may take so long; systemd waits 90 s.
pub const DOCKER_STOP_WAIT_MS: u64 = 20_000;
/// Accepting rests so long after the process ran out of descriptors.
pub const DOCKER_ACCEPT_PAUSE_MS: u64 = 100;

// Where things are.

/// The storage driver's name in the Nydus guide, whose daemon.json needs no change then.
pub const DOCKER_NAME_DEFAULT: &str = "hsiangkao/nydus-erofs-graphdriver:0.3.0";
/// Where Docker looks for plugins.
pub const DOCKER_PLUGINS_DIR: &str = "/run/docker/plugins";
/// What an operator may write down for the plugin.
pub const DOCKER_SETTINGS_DEFAULT: &str = "/etc/sluice/docker.json";
