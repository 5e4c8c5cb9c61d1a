//! Limits of the fanotify door: devices and segments of an image, and mounts.
//!
//! At most 65,535 segments of one image: 32 bytes of plan each, 2 MiB; a device table of 8 MiB; as
//! many files of up to 64 + 16 MiB.

use super::CHUNK_MAX_BYTES;

/// Devices besides the bootstrap's own: EROFS counts them in 16 bits.
pub const DEVICES_PER_IMAGE_MAX: usize = 65_535;
/// Segments of small blobs: 64 KiB, the chunk size of images made for lazy loading.
pub const SEGMENT_SHIFT_MIN: u32 = 16;
/// Segments of blobs whose units decode to up to 2 MiB.
pub const SEGMENT_SHARED_SHIFT_MIN: u32 = 21;
/// The largest segments, 64 MiB: a reader may wait for all that lies before its chunk.
pub const SEGMENT_SHIFT_MAX: u32 = 26;
const _: () = assert!((1usize << SEGMENT_SHIFT_MAX) + CHUNK_MAX_BYTES < u32::MAX as usize);
/// A value given to the kernel's mount context, without its NUL: fsconfig(2) takes no more.
pub const MOUNT_VALUE_MAX_BYTES: usize = 255;
/// Messages a mount context keeps for its owner: 8 (struct fc_log), each read once.
pub const MOUNT_MESSAGES_MAX: usize = 8;
/// Bytes of one of them that are read.
pub const MOUNT_MESSAGE_MAX_BYTES: usize = 1024;
/// Images whose mounting is remembered: 32 bytes each. Of further ones it is taken for granted.
pub const MOUNTED_IMAGES_NOTED_MAX: usize = 16_384;
/// What the kernel reads ahead of an image that it reads directly: eight segments of 128 KiB, which
/// are those of an image of half a gigabyte. Its own 128 KiB would be one.
pub const DIRECT_READ_AHEAD_KIB: u32 = 1024;
/// All that is tried at start to see how the kernel behaves takes no longer.
pub const PROBE_WAIT_MS: u64 = 10_000;
