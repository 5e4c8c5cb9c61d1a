//! Making images: layers in, blobs and a bootstrap out.
//!
//! ```text
//! tar, directory -> Entry -> Tree (names, whiteouts, links)  ----------+-> bootstrap
//!       file data -> Feeder -> workers (digest, compress) -> Scribe ---+-> one blob per layer
//! ```
//! [`Builder`] is the door: add layers from the lowest to the highest, then finish. Layers are
//! streamed: memory does not depend on their sizes, only on how many files and chunks there are.
//! The same layers and options give the same bytes on any machine with any number of threads.
//!
//! The builder reads what it is handed (a stream, a directory) and writes only into its output
//! directory. Whatever a layer says, nothing outside that directory is touched.
//!
//! Around it, from place to place ([`transport`] opens them):
//! ```text
//! place -> Source (images, checked layers) -> Conversion -> Sink (blobs, then manifests, the tag)
//!   registry_image (through remote), oci_layout, docker_archive / docker_save, unpacked
//! ```
//! [`optimize`] writes an image's bootstrap anew around one blob with what a start needs, and
//! [`republish`] puts that under the image's name.

pub mod bootstrap_layer;
pub mod builder;
pub mod convert;
pub mod docker_archive;
pub mod docker_save;
pub mod documents;
pub mod for_docker;
pub mod image_config;
pub mod layer_stream;
pub mod oci_layout;
pub mod optimize;
pub mod options;
pub mod place;
pub mod registry_image;
pub mod remote;
pub mod republish;
pub mod sink;
pub mod source;
pub mod tally;
pub mod trace;
pub mod transport;
pub mod tree;
pub mod unpack;
pub mod unpacked;
pub mod workdir;

mod bootstrap;
mod chunks;
mod compress;
mod directory;
mod entry;
mod feeder;
mod gzip_index;
mod node;
mod numbering;
mod pipeline;
mod scribe;
mod stream;
mod target;
#[cfg(test)]
mod tree_tests;
mod zran;

pub use builder::{Blob, BlobRole, Builder, Image, LayerReport, Report};
pub use options::{Compression, Options, Progress};
