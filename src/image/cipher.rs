//! AES-128-XTS as encrypted images use it.
//!
//! Key and tweak stand in clear in the blob table: this hides blobs from a registry, not from
//! whoever holds the image. Every object (chunk, context table, its header) is one data unit
//! under the same tweak, as long as its plaintext, except that a plaintext under 16 bytes is
//! padded to 18: to 16 with the number of bytes added, then the two bytes 78 90.

use crate::error::Result;
use aes::Aes128;
use aes::cipher::KeyInit;
use std::fmt;
use xts_mode::Xts128;

/// The shortest object XTS can hold.
const BLOCK_BYTES: usize = 16;
const SHORT_MARK: [u8; 2] = [0x78, 0x90];
/// The length of every padded object.
pub(super) const SHORT_BYTES: usize = BLOCK_BYTES + SHORT_MARK.len();

/// The key of one blob. Its text form never shows the key.
#[derive(Clone, PartialEq, Eq)]
pub struct Cipher {
    key: [u8; 32],
    tweak: [u8; 16],
}

impl Cipher {
    /// AES-128-XTS with two 128-bit keys in `key` and the initial `tweak`.
    pub fn aes_128_xts(key: [u8; 32], tweak: [u8; 16]) -> Self {
        Cipher { key, tweak }
    }

    /// Decrypts `object` in place and answers how many plaintext bytes it starts with.
    ///
    /// `plain_size`: the length of the plaintext where the caller knows it; a plaintext known to
    /// have 18 bytes is not mistaken for a padded one. Allocates nothing.
    pub fn decrypt(&self, object: &mut [u8], plain_size: Option<usize>) -> Result<usize> {
        if object.len() < BLOCK_BYTES {
            return Err(malformed!("an encrypted object of {} bytes, at least 16", object.len()));
        }
        self.schedule().decrypt_sector(object, self.tweak.into());
        let padded = object.len() == SHORT_BYTES && object[BLOCK_BYTES..] == SHORT_MARK;
        let added = usize::from(object[BLOCK_BYTES - 1]);
        if padded && plain_size != Some(SHORT_BYTES) && (1..=BLOCK_BYTES).contains(&added) {
            return Ok(BLOCK_BYTES - added);
        }
        Ok(object.len())
    }

    /// Encrypts `plain` as an image builder would.
    pub fn encrypt(&self, plain: &[u8]) -> Vec<u8> {
        let mut object = plain.to_vec();
        if object.len() < BLOCK_BYTES {
            object.resize(BLOCK_BYTES, (BLOCK_BYTES - plain.len()) as u8);
            object.extend(SHORT_MARK);
        }
        self.schedule().encrypt_sector(&mut object, self.tweak.into());
        object
    }

    fn schedule(&self) -> Xts128<Aes128> {
        let half = |from: usize| {
            let key: [u8; 16] = super::little::bytes_at(&self.key, from);
            Aes128::new(&key.into())
        };
        Xts128::new(half(0), half(16))
    }
}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher(AES-128-XTS)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cipher() -> Cipher {
        Cipher::aes_128_xts(std::array::from_fn(|i| i as u8), [7; 16])
    }

    #[test]
    fn every_length_survives_and_short_ones_take_eighteen_bytes() {
        for length in 0..100usize {
            let plain: Vec<u8> = (0..length).map(|byte| byte as u8).collect();
            let mut object = cipher().encrypt(&plain);
            assert_eq!(object.len(), if length < 16 { 18 } else { length });
            let size = cipher().decrypt(&mut object, None).unwrap();
            assert_eq!(object[..size], plain, "length {length}");
        }
    }

    #[test]
    fn known_eighteen_bytes_that_look_padded_are_kept() {
        let mut plain = [1; 18];
        plain[16..].copy_from_slice(&SHORT_MARK);
        let mut object = cipher().encrypt(&plain);
        assert_eq!(cipher().decrypt(&mut object, Some(18)).unwrap(), 18);
        assert_eq!(object, plain);
    }

    #[test]
    fn known_answer_of_ieee_1619_vector_2() {
        let mut key = [0x11; 32];
        key[16..].fill(0x22);
        let mut tweak = [0; 16];
        tweak[..5].fill(0x33);
        let object = Cipher::aes_128_xts(key, tweak).encrypt(&[0x44; 32]);
        let text: String = object.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(text, "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0");
    }

    #[test]
    fn objects_shorter_than_a_block_are_refused() {
        assert!(cipher().decrypt(&mut [0; 15], None).is_err());
    }

    #[test]
    fn debug_text_hides_the_key() {
        assert_eq!(format!("{:?}", cipher()), "Cipher(AES-128-XTS)");
    }
}
