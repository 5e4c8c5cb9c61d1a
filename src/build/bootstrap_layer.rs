//! The layer that carries a bootstrap: a gzipped tar with `image/image.boot`, always the same.
//!
//! Pure. Owner, times and modes are fixed and gzip's header has neither name nor time, so equal
//! bootstraps give equal layers.

use std::io::Write;

use flate2::write::GzEncoder;
use flate2::{Compression, GzBuilder};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};
use crate::image::Digest;
use crate::image::layer::BOOTSTRAP_PATH;

/// A finished layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootstrapLayer {
    /// The gzipped tar.
    pub bytes: Vec<u8>,
    /// The digest of the tar inside.
    pub diff_id: Digest,
}

/// Both ends of the pipe: the tar is hashed on its way into gzip.
struct Hashed<W> {
    sink: W,
    hasher: Sha256,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let size = self.sink.write(bytes)?;
        self.hasher.update(&bytes[..size]);
        Ok(size)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.sink.flush()
    }
}

impl BootstrapLayer {
    /// Packs a bootstrap.
    pub fn pack(bootstrap: &[u8]) -> Result<BootstrapLayer> {
        write(bootstrap).map_err(|error| Error::io(&error, "packing the bootstrap"))
    }
}

fn write(bootstrap: &[u8]) -> std::io::Result<BootstrapLayer> {
    let gzip: GzEncoder<Vec<u8>> =
        GzBuilder::new().mtime(0).operating_system(255).write(Vec::new(), Compression::default());
    let mut tar = tar::Builder::new(Hashed { sink: gzip, hasher: Sha256::new() });
    let (folder, _) = BOOTSTRAP_PATH.split_once('/').unwrap_or((BOOTSTRAP_PATH, ""));
    let mut directory = header(0o755, 0);
    directory.set_entry_type(tar::EntryType::Directory);
    tar.append_data(&mut directory, folder, std::io::empty())?;
    tar.append_data(&mut header(0o444, bootstrap.len() as u64), BOOTSTRAP_PATH, bootstrap)?;
    let Hashed { sink, hasher } = tar.into_inner()?;
    Ok(BootstrapLayer { bytes: sink.finish()?, diff_id: Digest(hasher.finalize().into()) })
}

fn header(mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::DigestAlgorithm;
    use crate::image::layer::read_bootstrap;
    use std::io::Read;

    #[test]
    fn a_bootstrap_comes_out_as_it_went_in_and_the_layer_is_always_the_same() {
        let bootstrap: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        let layer = BootstrapLayer::pack(&bootstrap).unwrap();
        assert_eq!(read_bootstrap(layer.bytes.as_slice()).unwrap(), bootstrap);
        assert_eq!(BootstrapLayer::pack(&bootstrap).unwrap(), layer);
        let mut tar = Vec::new();
        flate2::read::GzDecoder::new(layer.bytes.as_slice()).read_to_end(&mut tar).unwrap();
        assert_eq!(DigestAlgorithm::Sha256.digest(&tar), layer.diff_id);
        let digest = DigestAlgorithm::Sha256.digest(&BootstrapLayer::pack(b"x").unwrap().bytes);
        assert_eq!(
            digest.to_string(),
            "07e8e74691b58d8dc4a2e8ce3559eacd17e0464d0ca450a208975a2706c8dbba"
        );
    }
}
