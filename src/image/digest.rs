//! Digests of chunks, tables and blobs.

use crate::error::Result;
use sha2::Digest as _;
use std::fmt;

/// 32 bytes that stand for some others. Which algorithm made them is known from where they stood.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Takes 64 hexadecimal digits of either case.
    pub fn parse(text: &str) -> Result<Self> {
        let value = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            b'A'..=b'F' => Some(digit - b'A' + 10),
            _ => None,
        };
        let mut digest = [0; 32];
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if pairs.len() != digest.len() || !rest.is_empty() {
            return Err(malformed!("a digest has 64 hexadecimal digits, not {}", text.len()));
        }
        for (byte, [high, low]) in digest.iter_mut().zip(pairs) {
            match (value(*high), value(*low)) {
                (Some(high), Some(low)) => *byte = high << 4 | low,
                _ => return Err(malformed!("digest {text:?} is not hexadecimal")),
            }
        }
        Ok(Digest(digest))
    }

    /// Whether every byte is 0: how the format writes "no digest".
    pub fn is_zero(&self) -> bool {
        self.0 == [0; 32]
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// How a digest is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DigestAlgorithm {
    /// BLAKE3, the default of image builders.
    Blake3,
    /// SHA-256, also the algorithm of registries.
    Sha256,
}

impl DigestAlgorithm {
    /// The digest of `bytes`. Allocates nothing.
    pub fn digest(self, bytes: &[u8]) -> Digest {
        match self {
            DigestAlgorithm::Blake3 => Digest(*blake3::hash(bytes).as_bytes()),
            DigestAlgorithm::Sha256 => Digest(sha2::Sha256::digest(bytes).into()),
        }
    }

    /// The algorithm a blob table names by number.
    pub(super) fn from_number(number: u32) -> Result<Self> {
        match number {
            0 => Ok(DigestAlgorithm::Blake3),
            1 => Ok(DigestAlgorithm::Sha256),
            _ => Err(unsupported!("digest algorithm {number} (known: 0 blake3, 1 sha256)")),
        }
    }

    /// The number that stands for it on disk.
    pub(super) fn number(self) -> u32 {
        match self {
            DigestAlgorithm::Blake3 => 0,
            DigestAlgorithm::Sha256 => 1,
        }
    }
}

impl fmt::Display for DigestAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DigestAlgorithm::Blake3 => "blake3",
            DigestAlgorithm::Sha256 => "sha256",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY_SHA256: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    const EMPTY_BLAKE3: &str = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";

    #[test]
    fn known_answers() {
        assert_eq!(DigestAlgorithm::Sha256.digest(b"").to_string(), EMPTY_SHA256);
        assert_eq!(DigestAlgorithm::Blake3.digest(b"").to_string(), EMPTY_BLAKE3);
    }

    #[test]
    fn text_survives_both_ways_and_bad_text_is_refused() {
        assert_eq!(Digest::parse(EMPTY_SHA256).unwrap().to_string(), EMPTY_SHA256);
        assert_eq!(Digest::parse(&EMPTY_SHA256.to_uppercase()).unwrap().to_string(), EMPTY_SHA256);
        for text in ["", "e3", &EMPTY_SHA256[1..], &"g".repeat(64), &"é".repeat(32)] {
            assert!(Digest::parse(text).is_err(), "{text:?}");
        }
    }
}
