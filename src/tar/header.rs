//! One 512-byte header of a tar: ustar, GNU or older.
//!
//! Pure. Decodes fields and checks the sum; what follows from them is decided by
//! [`super::archive`].

use super::{BLOCK_BYTES, Segment};
use crate::error::Result;

/// A header whose sum is right.
#[derive(Clone, Debug)]
pub(super) struct Header {
    block: [u8; BLOCK_BYTES],
}

impl Header {
    /// `None` for a block of zeros, which ends an archive.
    pub(super) fn parse(block: &[u8; BLOCK_BYTES]) -> Result<Option<Self>> {
        if block.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let sum = |byte: fn(u8) -> i64| -> i64 {
            let blanked = block.iter().enumerate().map(|(at, &value)| match at {
                148..156 => byte(b' '),
                _ => byte(value),
            });
            blanked.sum()
        };
        let stated = number(&block[148..156]);
        // Some old archivers added signed characters.
        let sums = [sum(i64::from), sum(|value| i64::from(value as i8))];
        match stated {
            Ok(stated) if sums.contains(&stated) => Ok(Some(Header { block: *block })),
            _ => Err(malformed!("a tar header whose checksum is wrong")),
        }
    }

    /// The type of the entry, as the character that stands for it.
    pub(super) fn kind(&self) -> u8 {
        self.block[156]
    }

    pub(super) fn path(&self) -> Vec<u8> {
        let name = text(&self.block[..100]);
        let prefix = match self.is_ustar() {
            // The archiver star signs with its name, and keeps times at the end of the prefix.
            true if self.block[508..512] == *b"tar\0" => text(&self.block[345..476]),
            true => text(&self.block[345..500]),
            false => &[],
        };
        match prefix {
            [] => name.to_vec(),
            prefix => [prefix, b"/", name].concat(),
        }
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(&self.block[157..257]).to_vec()
    }

    pub(super) fn mode(&self) -> Result<i64> {
        number(&self.block[100..108])
    }

    pub(super) fn uid(&self) -> Result<i64> {
        number(&self.block[108..116])
    }

    pub(super) fn gid(&self) -> Result<i64> {
        number(&self.block[116..124])
    }

    pub(super) fn size(&self) -> Result<u64> {
        length(&self.block[124..136])
    }

    pub(super) fn mtime(&self) -> Result<i64> {
        number(&self.block[136..148])
    }

    /// Major and minor number of a device.
    pub(super) fn device(&self) -> Result<(u32, u32)> {
        let part = |field: &[u8]| {
            let value = number(field)?;
            u32::try_from(value).map_err(|_| malformed!("device number {value}"))
        };
        Ok((part(&self.block[329..337])?, part(&self.block[337..345])?))
    }

    /// Segments in an old GNU sparse header, the file's size, and whether more blocks follow.
    pub(super) fn sparse(&self) -> Result<(Vec<Segment>, u64, bool)> {
        let segments = segments(&self.block[386..482])?;
        Ok((segments, length(&self.block[483..495])?, self.block[482] != 0))
    }

    /// POSIX, as opposed to GNU, which has other fields where the prefix is.
    fn is_ustar(&self) -> bool {
        self.block[257..263] == *b"ustar\0"
    }
}

/// A block of segments behind an old GNU sparse header, and whether more blocks follow.
pub(super) fn sparse_extension(block: &[u8; BLOCK_BYTES]) -> Result<(Vec<Segment>, bool)> {
    Ok((segments(&block[..504])?, block[504] != 0))
}

fn segments(fields: &[u8]) -> Result<Vec<Segment>> {
    let used = fields.chunks_exact(24).take_while(|pair| pair[12] != 0);
    used.map(|pair| Ok((length(&pair[..12])?, length(&pair[12..])?))).collect()
}

fn text(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

fn length(field: &[u8]) -> Result<u64> {
    let value = number(field)?;
    u64::try_from(value).map_err(|_| malformed!("a length of {value}"))
}

/// A number: octal digits, or with the highest bit set, a two's complement number of 8 bits per
/// byte. An empty field is 0.
fn number(field: &[u8]) -> Result<i64> {
    if field[0] & 0x80 != 0 {
        return binary(field);
    }
    let text = text(field).trim_ascii();
    let mut value: i64 = 0;
    for &digit in text {
        if !(b'0'..=b'7').contains(&digit) {
            return Err(malformed!("{:?} is no number", String::from_utf8_lossy(text)));
        }
        value = value
            .checked_mul(8)
            .and_then(|value| value.checked_add((digit - b'0').into()))
            .ok_or_else(|| malformed!("a number above 2^63"))?;
    }
    Ok(value)
}

fn binary(field: &[u8]) -> Result<i64> {
    // The bit below the mark is the sign.
    let negative = field[0] & 0x40 != 0;
    let first = if negative { field[0] } else { field[0] & 0x7f };
    let mut value: i128 = if negative { -1 } else { 0 };
    for byte in std::iter::once(first).chain(field[1..].iter().copied()) {
        value = value << 8 | i128::from(byte);
    }
    // Twelve bytes at most: no bit has been shifted out.
    i64::try_from(value).map_err(|_| malformed!("a number outside 64 bits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary() {
        assert_eq!(number(b"0000644\0"), Ok(0o644));
        assert_eq!(number(b"   644 \0"), Ok(0o644));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Ok(0));
        assert_eq!(number(b"777777777777"), Ok(0o7777_7777_7777));
        assert_eq!(number(b"\x80\0\0\0\x80\0\0\0"), Ok(1 << 31));
        assert_eq!(number(&[0xff; 12]), Ok(-1));
        assert_eq!(number(b"\xff\xff\xff\xff\xff\xff\xff\xfe"), Ok(-2));
        let mut wide = [0xffu8; 12];
        wide[0] = 0x80;
        for field in [&wide[..], b"12a4567\0", b"9\0\0\0\0\0\0\0", b"-1\0\0\0\0\0\0"] {
            assert!(number(field).is_err(), "{field:?}");
        }
    }

    #[test]
    fn a_header_needs_its_checksum() {
        let mut header = tar::Header::new_ustar();
        header.set_path("a/b").unwrap();
        header.set_size(7);
        header.set_mode(0o644);
        header.set_cksum();
        let mut block = *header.as_bytes();
        let parsed = Header::parse(&block).unwrap().unwrap();
        assert_eq!((parsed.path(), parsed.size().unwrap()), (b"a/b".to_vec(), 7));
        block[0] ^= 1;
        assert!(Header::parse(&block).is_err());
        assert!(Header::parse(&[0; 512]).unwrap().is_none());
    }
}
