//! The names of things inside an image: blobs and chunks.
//!
//! A blob id becomes a cookie key, a path component and part of a URL, so the characters that
//! would mean something there cannot get past [`BlobId::parse`].

use crate::error::Result;
use std::fmt;
use std::sync::Arc;

/// The longest blob id: the width of its field on disk.
pub const BLOB_ID_MAX_BYTES: usize = 64;

/// The name of a data blob: 1 to 64 bytes of `[0-9A-Za-z._-]`, not starting with a dot.
///
/// Usually the hex SHA-256 of the blob as the registry knows it. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobId(Arc<str>);

impl BlobId {
    /// Takes `text` as a blob id; `Malformed` if it is not one.
    pub fn parse(text: &str) -> Result<Self> {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if text.is_empty() || text.len() > BLOB_ID_MAX_BYTES {
            return Err(malformed!(
                "a blob id has 1 to {BLOB_ID_MAX_BYTES} characters, not {}",
                text.len()
            ));
        }
        if text.starts_with('.') || !text.bytes().all(legal) {
            return Err(malformed!(
                "blob id {text:?}: only letters, digits, '.', '_' and '-' are allowed, no dot first"
            ));
        }
        Ok(BlobId(text.into()))
    }

    /// The id of a blob with this SHA-256.
    pub fn of_digest(digest: &super::digest::Digest) -> Self {
        BlobId(digest.to_string().into())
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Takes a NUL-padded on-disk field as a blob id. Bytes behind the first NUL must be NUL.
    pub(super) fn from_field(field: &[u8; BLOB_ID_MAX_BYTES]) -> Result<Self> {
        let length = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
        if field[length..].iter().any(|&byte| byte != 0) {
            return Err(malformed!("a blob id field has bytes behind its terminating NUL"));
        }
        match std::str::from_utf8(&field[..length]) {
            Ok(text) => BlobId::parse(text),
            Err(_) => Err(malformed!("a blob id field is not text")),
        }
    }

    /// The NUL-padded on-disk field.
    pub(super) fn to_field(&self) -> [u8; BLOB_ID_MAX_BYTES] {
        let mut field = [0; BLOB_ID_MAX_BYTES];
        field[..self.0.len()].copy_from_slice(self.0.as_bytes());
        field
    }

    /// Whether this is the placeholder (64 times `x`) of a bootstrap stored inside its own blob,
    /// which could not know the id it would get.
    pub fn is_inlined_placeholder(&self) -> bool {
        self.0.len() == BLOB_ID_MAX_BYTES && self.0.bytes().all(|byte| byte == b'x')
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlobId({})", self.0)
    }
}

/// The position of a chunk in its blob, counted from 0, gaps of the chunk table included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkIndex(pub u32);

impl fmt::Display for ChunkIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blob_id_refuses_what_paths_and_urls_would_interpret() {
        for text in ["", ".", "..", ".hidden", "a/b", "a b", "a%2f", "a\0", "ä", "a\n", "a?b"] {
            assert!(BlobId::parse(text).is_err(), "{text:?}");
        }
        assert!(BlobId::parse(&"a".repeat(65)).is_err());
        for text in ["a", "0123.ABC_-", &"f".repeat(64)] {
            assert_eq!(BlobId::parse(text).unwrap().as_str(), text);
        }
    }

    #[test]
    fn blob_id_field_survives_both_ways_and_refuses_text_behind_nul() {
        let id = BlobId::parse("abc").unwrap();
        let mut field = id.to_field();
        assert_eq!(BlobId::from_field(&field).unwrap(), id);
        field[5] = b'x';
        assert!(BlobId::from_field(&field).is_err());
    }

    #[test]
    fn placeholder_is_exactly_sixty_four_x() {
        assert!(BlobId::parse(&"x".repeat(64)).unwrap().is_inlined_placeholder());
        assert!(!BlobId::parse(&"x".repeat(63)).unwrap().is_inlined_placeholder());
    }
}
