//! Image formats: what the bytes of an image mean.
//!
//! Pure: every parser takes bytes and returns values; nothing here opens, reads, waits or knows an
//! engine. All input is hostile: a parser answers [`crate::error::Error::Malformed`] or
//! `Unsupported`, it never panics, never loops without a bound and never allocates more than a
//! limit of `config` or a small multiple of its input.
//!
//! How the files hang together:
//! ```text
//! manifest -> layer -> Bootstrap (superblock, blob_table, chunk_table) -> Tree (erofs)
//!                          |            Toc (toc) -> blob.meta -> ContextTable (context)
//!                          +-> Layout (layout) <----------------------+
//!                                 +-> Decoder (decode: cipher, codec, inflate) -> Layout::verify
//! Bootstrap -> Segmentation (segmentation) -> KernelView (view): what is mounted behind fanotify
//! ```

pub mod blob_table;
pub mod bootstrap;
pub mod chunk_table;
pub mod cipher;
pub mod codec;
pub mod compare;
pub mod context;
pub mod decode;
pub mod digest;
pub mod entry;
pub mod erofs;
pub mod files;
pub mod identity;
pub mod inflate;
pub mod inode;
pub mod inode_writer;
pub mod layer;
pub mod layout;
pub mod manifest;
pub mod miniature;
pub mod prefetch;
pub mod record_writer;
pub mod segmentation;
pub mod superblock;
pub mod toc;
pub mod view;
pub mod walk;

mod assembly;
#[cfg(test)]
mod draft_tests;
#[cfg(test)]
mod erofs_tests;
mod little;
#[cfg(test)]
mod segmentation_tests;
#[cfg(test)]
mod specimen_tests;
mod tiling;
#[cfg(test)]
mod view_tests;

pub use blob_table::{BlobFeatures, BlobRecord};
pub use bootstrap::Bootstrap;
pub use chunk_table::ChunkRecord;
pub use codec::Compressor;
pub use context::ContextTable;
pub use decode::Decoder;
pub use digest::{Digest, DigestAlgorithm};
pub use erofs::Tree;
pub use files::FileChunk;
pub use identity::{BlobId, ChunkIndex};
pub use inode::{FileKind, Inode};
pub use layout::{Chunk, Layout, Unit};
pub use segmentation::{Recipe, SegmentPlan, Segmentation};
pub use view::{DeviceRef, KernelView};
