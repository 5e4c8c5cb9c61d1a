//! Raw deflate on zlib-rs through its C interface: the safe one cannot be primed with left-over
//! bits, which a stream entered in its middle needs.
//!
//! The only file of this room with `unsafe`. Owns one inflate state; every pointer handed to the
//! library is made from a slice that outlives the call, and none is kept behind it. Knows nothing
//! of gzip headers: see [`super::codec`].

#![allow(unsafe_code)]

use crate::config::DEFLATE_DICTIONARY_MAX_BYTES;
use crate::error::Result;
use libz_rs_sys as z;
use std::ffi::c_int;

/// Negative window bits ask for raw deflate; 15 is the largest window.
const RAW_WINDOW_BITS: c_int = -15;

/// What one call moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes taken from the input.
    pub consumed: usize,
    /// Bytes written to the output.
    pub produced: usize,
    /// The stream's last block has ended.
    pub ended: bool,
}

/// A reusable raw inflate state. Allocates when made, and never again.
pub struct Inflater {
    /// Boxed: the library may keep the stream's address in its state.
    stream: Box<z::z_stream>,
}

// SAFETY: the state behind the stream is owned by it alone, reached through `&mut self` only, and
// has no tie to the thread that made it.
unsafe impl Send for Inflater {}

impl Inflater {
    /// Makes a state ready for the start of a stream.
    pub fn new() -> Self {
        let mut stream = Box::new(z::z_stream::default());
        let size = size_of::<z::z_stream>() as c_int;
        // SAFETY: the stream is a valid default one, exclusively ours; the version string and the
        // size are the library's own.
        let code =
            unsafe { z::inflateInit2_(&mut *stream, RAW_WINDOW_BITS, z::zlibVersion(), size) };
        assert_eq!(code, z::Z_OK, "invariant: the arguments are constants; only memory can lack");
        Inflater { stream }
    }

    /// Forgets everything: the next input is the start of a stream with an empty window.
    pub fn restart(&mut self) {
        // SAFETY: the stream was initialised in `new` and is ended in `drop` only.
        let code = unsafe { z::inflateReset(&mut *self.stream) };
        assert_eq!(code, z::Z_OK, "invariant: the stream is initialised");
    }

    /// Puts the `bits` (at most 7) low bits of `value` in front of the input. Right behind a
    /// restart only.
    pub fn prime(&mut self, bits: u8, value: u8) -> Result<()> {
        // SAFETY: as in `restart`; the library checks the arguments.
        let code = unsafe { z::inflatePrime(&mut *self.stream, bits.into(), value.into()) };
        outcome(code)
    }

    /// Fills the window with `dictionary` (at most 32 KiB). Right behind a restart only.
    pub fn set_dictionary(&mut self, dictionary: &[u8]) -> Result<()> {
        let length = length_u32(dictionary.len())?;
        // SAFETY: as in `restart`; pointer and length are one live slice, copied by the callee.
        let code =
            unsafe { z::inflateSetDictionary(&mut *self.stream, dictionary.as_ptr(), length) };
        outcome(code)
    }

    /// Inflates until the input is used up, the output is full or the stream ends.
    pub fn inflate(&mut self, input: &[u8], output: &mut [u8]) -> Result<Progress> {
        self.step(input, output, z::Z_NO_FLUSH)
    }

    /// As `inflate`, and stops where a block of the stream begins. Answers there how many bits of
    /// the last byte taken belong to that block, 0 to 7: inflating can be entered at this place.
    pub fn inflate_block(
        &mut self,
        input: &[u8],
        output: &mut [u8],
    ) -> Result<(Progress, Option<u8>)> {
        let progress = self.step(input, output, z::Z_BLOCK)?;
        // 128: at the end of a block or header; 64: in the last block, behind which nothing comes.
        let state = self.stream.data_type;
        let at_block = state & 128 != 0 && state & 64 == 0 && !progress.ended;
        Ok((progress, at_block.then_some((state & 7) as u8)))
    }

    /// Copies the window (the plain bytes before the current place, of this stream only) to the
    /// front of `window` and answers its length.
    pub fn window(&mut self, window: &mut [u8; DEFLATE_DICTIONARY_MAX_BYTES]) -> Result<usize> {
        let mut length = 0;
        // SAFETY: as in `restart`; the window is at most 32 KiB long, the format's largest, and
        // that is what the pointer has room for.
        let code =
            unsafe { z::inflateGetDictionary(&*self.stream, window.as_mut_ptr(), &mut length) };
        outcome(code).map(|()| length as usize)
    }

    fn step(&mut self, input: &[u8], output: &mut [u8], flush: c_int) -> Result<Progress> {
        let (input_length, output_length) = (length_u32(input.len())?, length_u32(output.len())?);
        let stream = &mut *self.stream;
        stream.next_in = input.as_ptr().cast_mut();
        stream.avail_in = input_length;
        stream.next_out = output.as_mut_ptr();
        stream.avail_out = output_length;
        // SAFETY: the stream is initialised; next_in/avail_in and next_out/avail_out describe two
        // live slices that do not overlap (one is borrowed mutably). The input is only read.
        let code = unsafe { z::inflate(stream, flush) };
        let progress = Progress {
            consumed: (input_length - stream.avail_in) as usize,
            produced: (output_length - stream.avail_out) as usize,
            ended: code == z::Z_STREAM_END,
        };
        // No pointer outlives the borrow it was made from.
        stream.next_in = std::ptr::null_mut();
        stream.avail_in = 0;
        stream.next_out = std::ptr::null_mut();
        stream.avail_out = 0;
        match code {
            // Z_BUF_ERROR: nothing could be moved, which `progress` says as well.
            z::Z_OK | z::Z_STREAM_END | z::Z_BUF_ERROR => Ok(progress),
            code => outcome(code).map(|()| progress),
        }
    }
}

impl Default for Inflater {
    fn default() -> Self {
        Inflater::new()
    }
}

impl Drop for Inflater {
    fn drop(&mut self) {
        // SAFETY: initialised in `new`, ended nowhere else.
        unsafe { z::inflateEnd(&mut *self.stream) };
    }
}

impl std::fmt::Debug for Inflater {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Inflater")
    }
}

fn outcome(code: c_int) -> Result<()> {
    match code {
        z::Z_OK => Ok(()),
        code => Err(malformed!("the deflate stream is broken (zlib code {code})")),
    }
}

fn length_u32(length: usize) -> Result<u32> {
    u32::try_from(length).map_err(|_| malformed!("{length} bytes at once for inflate"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn deflate(plain: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), Default::default());
        encoder.write_all(plain).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn state_is_reusable_after_success_and_after_garbage() {
        let packed = deflate(b"hello hello hello");
        let mut inflater = Inflater::new();
        for _ in 0..3 {
            let mut output = [0; 17];
            inflater.restart();
            let progress = inflater.inflate(&packed, &mut output).unwrap();
            assert_eq!((progress.produced, progress.ended), (17, true));
            assert_eq!(&output, b"hello hello hello");
            inflater.restart();
            assert!(inflater.inflate(&[0xff; 9], &mut output).is_err());
        }
    }

    #[test]
    fn output_is_never_overrun_and_short_input_is_reported() {
        let packed = deflate(&[7; 100_000]);
        let mut inflater = Inflater::new();
        let mut output = [0; 10];
        let progress = inflater.inflate(&packed, &mut output).unwrap();
        assert_eq!((progress.produced, progress.ended), (10, false));
        inflater.restart();
        let progress = inflater.inflate(&packed[..3], &mut [0; 100_000]).unwrap();
        assert!(!progress.ended && progress.produced < 100_000);
        assert_eq!(inflater.inflate(&[], &mut []).unwrap().consumed, 0);
    }

    #[test]
    fn a_dictionary_too_long_for_the_window_uses_its_end() {
        let mut inflater = Inflater::new();
        inflater.set_dictionary(&[1; 32 * 1024]).unwrap();
        inflater.restart();
        inflater.set_dictionary(&[]).unwrap();
    }
}
