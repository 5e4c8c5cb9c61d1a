//! Where a body ends: by length, by chunks, by the peer's close.
//!
//! Pure. A `Decoder` is told which bytes arrived and says which of them are the body's; it never
//! holds any itself. Strict where leniency lets two readers differ: chunk sizes are hex digits of
//! at most 16 places, lines end in CR LF, and lengths of lines and trailers are bounded. A body
//! that ends early is an error, never a short success.

use crate::config as limits;
use crate::error::{Error, Result};
use crate::registry::http::Framing;

/// Follows one body from its first byte to its last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoder {
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// So many bytes are still to come, unframed.
    Length(u64),
    /// Everything is body.
    UntilClose,
    /// In a chunk-size line: the size so far, its digits, the bytes of the line, what is allowed.
    Size { size: u64, digits: u8, line: u16, part: Part },
    /// Inside a chunk.
    Data(u64),
    /// After a chunk: CR, then LF.
    DataEnd { seen_cr: bool },
    /// After the last chunk: bytes of all trailers, bytes of this line, whether CR was seen.
    Trailer { total: u16, line: u16, seen_cr: bool },
    /// The last byte was seen.
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Digits,
    Extension,
    Lf,
}

/// What one call took and gave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the input that are dealt with.
    pub consumed: usize,
    /// Bytes of body now at the start of the output.
    pub produced: usize,
}

impl Decoder {
    /// A decoder at the first byte after the head.
    pub fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::None | Framing::Length(0) => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => SIZE_START,
            Framing::UntilClose => State::UntilClose,
        };
        Decoder { state }
    }

    /// Whether the last byte was seen; bytes after it belong to nobody.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// How many of the next bytes on the wire are body and nothing else, so that they may be
    /// received where they are wanted; report them with `received`.
    pub fn direct_size(&self) -> u64 {
        match self.state {
            State::Length(left) | State::Data(left) => left,
            State::UntilClose => u64::MAX,
            _ => 0,
        }
    }

    /// Counts `size` bytes that went straight to their place; at most `direct_size`.
    pub fn received(&mut self, size: u64) {
        assert!(size <= self.direct_size(), "more bytes received than were allowed");
        self.state = match self.state {
            State::Length(left) if left == size => State::Done,
            State::Length(left) => State::Length(left - size),
            State::Data(left) if left == size => State::DataEnd { seen_cr: false },
            State::Data(left) => State::Data(left - size),
            other => other,
        };
    }

    /// Moves body bytes from `input` to `output`; stops when either is used up or the body ends.
    pub fn decode(&mut self, input: &[u8], output: &mut [u8]) -> Result<Progress> {
        let mut done = Progress::default();
        while !self.is_done() && done.consumed < input.len() {
            let direct = self.direct_size();
            if direct == 0 {
                self.control(input[done.consumed])?;
                done.consumed += 1;
                continue;
            }
            let rest = &mut output[done.produced..];
            let available = rest.len().min(input.len() - done.consumed) as u64;
            let size = direct.min(available) as usize;
            if size == 0 {
                break;
            }
            rest[..size].copy_from_slice(&input[done.consumed..done.consumed + size]);
            self.received(size as u64);
            done.consumed += size;
            done.produced += size;
        }
        Ok(done)
    }

    /// The peer closed: the end of a body without framing, an error in any other.
    pub fn closed(&mut self) -> Result<()> {
        match self.state {
            State::Done => Ok(()),
            State::UntilClose => {
                self.state = State::Done;
                Ok(())
            }
            State::Length(left) => {
                Err(Error::unavailable(format!("the body ended {left} bytes early")))
            }
            _ => Err(Error::unavailable("the chunked body ended before its last chunk")),
        }
    }

    /// One byte that is framing, not body.
    fn control(&mut self, byte: u8) -> Result<()> {
        self.state = match self.state {
            State::Size { size, digits, line, part } => size_line(size, digits, line, part, byte)?,
            State::DataEnd { seen_cr: false } if byte == b'\r' => State::DataEnd { seen_cr: true },
            State::DataEnd { seen_cr: true } if byte == b'\n' => SIZE_START,
            State::DataEnd { .. } => return Err(broken("a chunk is longer than its size")),
            State::Trailer { total, line, seen_cr } => trailer(total, line, seen_cr, byte)?,
            State::Length(_) | State::UntilClose | State::Data(_) | State::Done => {
                unreachable!("these states take bytes directly")
            }
        };
        Ok(())
    }
}

const SIZE_START: State = State::Size { size: 0, digits: 0, line: 0, part: Part::Digits };

fn size_line(size: u64, digits: u8, line: u16, part: Part, byte: u8) -> Result<State> {
    if usize::from(line) >= limits::HTTP_CHUNK_LINE_SIZE_MAX {
        return Err(broken("a chunk-size line is too long"));
    }
    let next = |part| State::Size { size, digits, line: line + 1, part };
    match (part, byte) {
        (Part::Digits, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') if digits < 15 => {
            let digit = (byte as char).to_digit(16).map_or(0, u64::from);
            let size = size * 16 + digit;
            Ok(State::Size { size, digits: digits + 1, line: line + 1, part })
        }
        (_, b'\r') if digits > 0 && part != Part::Lf => Ok(next(Part::Lf)),
        (Part::Digits, b';' | b' ' | b'\t') if digits > 0 => Ok(next(Part::Extension)),
        (Part::Extension, b'\t' | b' '..=b'~' | 0x80..) => Ok(next(part)),
        (Part::Lf, b'\n') if size == 0 => Ok(State::Trailer { total: 0, line: 0, seen_cr: false }),
        (Part::Lf, b'\n') => Ok(State::Data(size)),
        _ => Err(broken("a chunk-size line is not hex digits and CR LF")),
    }
}

fn trailer(total: u16, line: u16, seen_cr: bool, byte: u8) -> Result<State> {
    if usize::from(total) >= limits::HTTP_TRAILER_SIZE_MAX {
        return Err(broken("the trailers are too long"));
    }
    let total = total + 1;
    match (seen_cr, byte) {
        (true, b'\n') if line == 0 => Ok(State::Done),
        (true, b'\n') => Ok(State::Trailer { total, line: 0, seen_cr: false }),
        (false, b'\r') => Ok(State::Trailer { total, line, seen_cr: true }),
        (false, b'\n') | (true, _) => Err(broken("a trailer line does not end in CR LF")),
        (false, _) => Ok(State::Trailer { total, line: line + 1, seen_cr: false }),
    }
}

fn broken(why: &str) -> Error {
    Error::unavailable(format!("a chunked body was refused: {why}"))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;

    use super::*;

    fn decode_all(framing: Framing, wire: &[u8], step: usize) -> Result<(Vec<u8>, usize)> {
        let mut decoder = Decoder::new(framing);
        let mut body = Vec::new();
        let mut at = 0;
        while !decoder.is_done() {
            let end = (at + step).min(wire.len());
            if at == end {
                decoder.closed()?;
                break;
            }
            let mut output = [0_u8; 7];
            let progress = decoder.decode(&wire[at..end], &mut output)?;
            body.extend_from_slice(&output[..progress.produced]);
            at += progress.consumed;
        }
        Ok((body, at))
    }

    #[test]
    fn chunked_bodies_decode_in_any_pieces() {
        let wire = b"5\r\nhello\r\n00A;x=\"y\"\r\n world 123\r\n0\r\nT: v\r\n\r\nNEXT";
        for step in 1..wire.len() {
            let (body, used) = decode_all(Framing::Chunked, wire, step).unwrap();
            assert_eq!(body, b"hello world 123");
            assert_eq!(&wire[used..], b"NEXT");
        }
    }

    #[test]
    fn damaged_chunked_bodies_are_refused() {
        let long_line = format!("5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(300));
        let long_trailer = format!("0\r\n{}\r\n\r\n", "t: v\r\n".repeat(1000));
        for wire in [
            "\r\n",
            "5\nhello\r\n0\r\n\r\n",
            "-5\r\nhello",
            "5\r\nhelloX\r\n",
            "5\r\nhello\n0\r\n",
            "0x5\r\nhello\r\n",
            "+5\r\nhello\r\n",
            "1234567890abcdef0\r\n",
            "5\r\r\nhello",
            "0\r\nT: v\n\r\n",
            "5\r\nhello\r\n",
            "5\r\nhel",
            "5",
            "0\r\n",
            "",
            &long_line,
            &long_trailer,
        ] {
            assert!(decode_all(Framing::Chunked, wire.as_bytes(), 3).is_err(), "{wire:?}");
        }
    }

    #[test]
    fn a_length_is_kept_exactly() {
        let (body, used) = decode_all(Framing::Length(3), b"abcdef", 6).unwrap();
        assert_eq!((body.as_slice(), used), (&b"abc"[..], 3));
        let error = decode_all(Framing::Length(9), b"abcdef", 6).unwrap_err();
        assert_eq!(error.to_string(), "the body ended 3 bytes early");
        assert!(Decoder::new(Framing::None).is_done());
        assert_eq!(decode_all(Framing::UntilClose, b"abc", 2).unwrap().0, b"abc");
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_break_the_decoder(wire in vec(0_u8.., 0..200), step in 1..50_usize) {
            for framing in [Framing::Chunked, Framing::Length(100), Framing::UntilClose] {
                if let Ok((body, used)) = decode_all(framing, &wire, step) {
                    proptest::prop_assert!(body.len() <= used && used <= wire.len());
                }
            }
        }

        #[test]
        fn what_is_chunked_comes_back(
            chunks in vec(vec(0_u8.., 1..40), 0..8),
            step in 1..50_usize,
        ) {
            let mut wire = Vec::new();
            for chunk in &chunks {
                wire.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                wire.extend_from_slice(chunk);
                wire.extend_from_slice(b"\r\n");
            }
            wire.extend_from_slice(b"0\r\n\r\n");
            let decoded = decode_all(Framing::Chunked, &wire, step).unwrap().0;
            proptest::prop_assert_eq!(decoded, chunks.concat());
        }
    }
}
