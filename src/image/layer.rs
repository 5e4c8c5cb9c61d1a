//! Finding the bootstrap in a layer: a tar, plain or compressed.
//!
//! Reads the layer as a stream, once, and keeps nothing of it but `image/image.boot`. Both what
//! is read and what is kept have limits, so a compressed endless layer ends in an error.

use crate::config::{BOOTSTRAP_MAX_BYTES, LAYER_SCAN_MAX_BYTES};
use crate::error::{Error, Result};
use std::io::{BufReader, Read};

/// Where a layer keeps its bootstrap.
pub const BOOTSTRAP_PATH: &str = "image/image.boot";

/// What a gzip layer begins with.
pub const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
/// What a zstd frame begins with.
pub const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// The largest window a zstd layer may ask memory for: 8 MiB, as the format recommends.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// Reads a layer (tar, tar+gzip or tar+zstd, told apart by their first bytes) up to its
/// bootstrap. `NotFound` if it has none: then the image is no lazily loadable one.
pub fn read_bootstrap(layer: impl Read) -> Result<Vec<u8>> {
    let mut layer = BufReader::new(layer);
    // One read fills the buffer of a reader that has anything.
    let front = std::io::BufRead::fill_buf(&mut layer).map_err(broken)?;
    if front.starts_with(GZIP_MAGIC) {
        scan(flate2::bufread::MultiGzDecoder::new(layer))
    } else if is_zstd(front) {
        let mut decoder = zstd::stream::Decoder::with_buffer(layer).map_err(broken)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(broken)?;
        scan(decoder)
    } else {
        scan(layer)
    }
}

/// Whether a layer is zstd. One that several threads packed (pzstd) begins with a frame to skip,
/// RFC 8878 section 3.1.2, whose first byte is any of 16.
pub fn is_zstd(front: &[u8]) -> bool {
    front.starts_with(ZSTD_MAGIC)
        || matches!(front, [kind, 0x2a, 0x4d, 0x18, ..] if kind & 0xf0 == 0x50)
}

fn scan(tar: impl Read) -> Result<Vec<u8>> {
    let mut archive = tar::Archive::new(tar.take(LAYER_SCAN_MAX_BYTES));
    // Raw: extension headers, which the library would keep in memory whole, are entries to skip.
    // The path looked for is short and needs none.
    for entry in archive.entries().map_err(broken)?.raw(true) {
        let mut entry = entry.map_err(broken)?;
        if !is_bootstrap(entry.header()) {
            continue;
        }
        let size = entry.size();
        if size > BOOTSTRAP_MAX_BYTES as u64 {
            return Err(unsupported!("a bootstrap of {size} bytes in a layer"));
        }
        // Grows with what arrives, not with what was promised.
        let mut bootstrap = Vec::new();
        entry.read_to_end(&mut bootstrap).map_err(broken)?;
        if bootstrap.len() as u64 != size {
            return Err(malformed!("the layer ends within its {BOOTSTRAP_PATH}"));
        }
        return Ok(bootstrap);
    }
    Err(Error::NotFound(format!(
        "the layer has no {BOOTSTRAP_PATH}: this is not a lazily loadable image"
    )))
}

fn is_bootstrap(header: &tar::Header) -> bool {
    let path = header.path_bytes();
    let path = path.strip_prefix(b"./").or_else(|| path.strip_prefix(b"/")).unwrap_or(&path);
    path == BOOTSTRAP_PATH.as_bytes() && header.entry_type().is_file()
}

fn broken(error: std::io::Error) -> Error {
    Error::io(&error, "the layer cannot be read")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, data) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, path, *data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn gzip(plain: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Default::default());
        encoder.write_all(plain).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn bootstrap_is_found_in_every_wrapping() {
        let long = "a/".repeat(150);
        let long = format!("{long}name");
        for path in ["image/image.boot", "./image/image.boot"] {
            let tar = tar_of(&[(&long, b"x"), ("image/other", b"no"), (path, b"boot")]);
            let zstd = zstd::bulk::compress(&tar, 3).unwrap();
            let skipped = [&[0x5f, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 7, 7], &zstd[..]].concat();
            for layer in [tar.clone(), gzip(&tar), zstd, skipped] {
                assert_eq!(read_bootstrap(&layer[..]).unwrap(), b"boot");
            }
        }
    }

    #[test]
    fn layers_without_it_are_not_found_and_broken_ones_refused() {
        let other = tar_of(&[("image/image.boot.old", b"x"), ("image.boot", b"y")]);
        assert!(matches!(read_bootstrap(&other[..]), Err(Error::NotFound(_))));
        assert!(matches!(read_bootstrap(&b""[..]), Err(Error::NotFound(_))));
        let whole = tar_of(&[("image/image.boot", &[7; 5000])]);
        assert!(read_bootstrap(&whole[..3000]).is_err());
        assert!(read_bootstrap(&gzip(&whole)[..30]).is_err());
        assert!(read_bootstrap(&b"\x1f\x8bjunk"[..]).is_err());
        assert!(read_bootstrap(&[b'x'; 1024][..]).is_err());
    }

    #[test]
    fn promised_size_above_the_limit_is_refused_before_reading() {
        let mut header = tar::Header::new_gnu();
        header.set_path(BOOTSTRAP_PATH).unwrap();
        header.set_size(1 << 40);
        header.set_cksum();
        assert!(matches!(read_bootstrap(&header.as_bytes()[..]), Err(Error::Unsupported(_))));
    }
}
