//! A layer's bytes on their way into the builder: checked against their digest at the end.
//!
//! Whoever reads to the end and gets no error has read the right bytes. The error that ended a
//! stream is kept as it was, since `std::io::Error` forgets what kind it is.

use std::io::Read;

use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};
use crate::image::Digest;
use crate::image::manifest::Descriptor;

/// A stream of a layer's bytes.
pub struct LayerStream {
    source: Box<dyn Read + Send>,
    check: Option<Check>,
    name: String,
    failure: Option<Error>,
}

struct Check {
    hasher: Sha256,
    size: u64,
    expected: Digest,
    expected_size: Option<u64>,
}

impl LayerStream {
    /// Bytes that are what a descriptor says, or the stream fails.
    pub fn checked(source: impl Read + Send + 'static, descriptor: &Descriptor) -> Self {
        Self::with(source, descriptor.digest, Some(descriptor.size))
    }

    /// Bytes that have a digest, however many there are.
    pub fn hashed(source: impl Read + Send + 'static, expected: Digest) -> Self {
        Self::with(source, expected, None)
    }

    /// Bytes that their source has checked, or that nobody can check.
    pub fn plain(source: impl Read + Send + 'static, name: String) -> Self {
        LayerStream { source: Box::new(source), check: None, name, failure: None }
    }

    fn with(
        source: impl Read + Send + 'static,
        expected: Digest,
        expected_size: Option<u64>,
    ) -> Self {
        let check = Check { hasher: Sha256::new(), size: 0, expected, expected_size };
        LayerStream {
            source: Box::new(source),
            check: Some(check),
            name: format!("layer sha256:{expected}"),
            failure: None,
        }
    }

    /// Why the stream ended, if it did so by an error of its own.
    pub fn failure(&mut self) -> Option<Error> {
        self.failure.take()
    }

    fn fail(&mut self, error: Error) -> std::io::Error {
        let error = error.context(&self.name);
        self.failure = Some(error.clone());
        std::io::Error::other(error)
    }
}

impl Read for LayerStream {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let size = match self.source.read(buffer) {
            Ok(size) => size,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => return Err(error),
            Err(error) => {
                let own = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()).cloned();
                let own = own.unwrap_or_else(|| Error::io(&error, "cannot be read"));
                return Err(self.fail(own));
            }
        };
        let Some(check) = &mut self.check else { return Ok(size) };
        match check.take(&buffer[..size], buffer.is_empty()) {
            Ok(()) => Ok(size),
            Err(error) => Err(self.fail(error)),
        }
    }
}

impl Check {
    fn take(&mut self, bytes: &[u8], asked_for_none: bool) -> Result<()> {
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        let at_most = self.expected_size.unwrap_or(u64::MAX);
        if self.size > at_most {
            return Err(Error::Digest(format!("longer than the {at_most} bytes announced")));
        }
        if !bytes.is_empty() || asked_for_none {
            return Ok(());
        }
        if self.expected_size.is_some_and(|expected| expected != self.size) {
            return Err(Error::Digest(format!("it ends after {} of {at_most} bytes", self.size)));
        }
        let found = Digest(self.hasher.clone().finalize().into());
        match found == self.expected {
            true => Ok(()),
            false => Err(Error::Digest(format!("its bytes have the digest sha256:{found}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::documents::{LAYER_TAR, describe};

    fn read(bytes: &'static [u8], descriptor: &Descriptor) -> (Option<Vec<u8>>, Option<Error>) {
        let mut stream = LayerStream::checked(bytes, descriptor);
        let mut all = Vec::new();
        let read = stream.read_to_end(&mut all).ok().map(|_| all);
        (read, stream.failure())
    }

    #[test]
    fn only_the_right_bytes_come_to_an_end() {
        let right = describe(LAYER_TAR, b"layer");
        assert_eq!(read(b"layer", &right), (Some(b"layer".to_vec()), None));
        for wrong in [&b"laye"[..], b"layer!", b"lazer", b""] {
            let (bytes, failure) = read(wrong, &right);
            assert!(bytes.is_none() && matches!(failure, Some(Error::Digest(_))), "{failure:?}");
        }
    }

    #[test]
    fn the_sources_own_error_keeps_its_kind() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
                Err(std::io::Error::other(Error::Denied("no".to_owned())))
            }
        }
        let mut stream = LayerStream::plain(Broken, "layer x".to_owned());
        assert!(stream.read(&mut [0]).is_err());
        assert_eq!(stream.failure(), Some(Error::Denied("layer x: no".to_owned())));
    }
}
