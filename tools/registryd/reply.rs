//! An answer before it is sent: status, headers and where its body comes from.
//!
//! Pure but for reading the body's file. Content-Length and the connection's fate are the sender's
//! business, not the reply's.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

pub struct Reply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Body,
    /// Only the head is wanted; the body still says how long it would be.
    pub head_only: bool,
}

pub enum Body {
    Bytes(Vec<u8>),
    /// `length` bytes of a file from `offset` on.
    File {
        file: File,
        offset: u64,
        length: u64,
    },
}

impl Reply {
    pub fn new(status: u16) -> Self {
        Reply { status, headers: Vec::new(), body: Body::Bytes(Vec::new()), head_only: false }
    }

    /// A refusal in the registry's own form.
    pub fn error(status: u16, code: &str, message: &str) -> Self {
        let error = serde_json::json!({ "errors": [{ "code": code, "message": message }] });
        Reply::json(status, &error)
    }

    pub fn json(status: u16, value: &serde_json::Value) -> Self {
        let body = Body::Bytes(value.to_string().into_bytes());
        Reply { body, ..Reply::new(status) }.with("Content-Type", "application/json")
    }

    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub fn reason(&self) -> &'static str {
        match self.status {
            200 => "OK",
            201 => "Created",
            202 => "Accepted",
            204 => "No Content",
            206 => "Partial Content",
            307 => "Temporary Redirect",
            401 => "Unauthorized",
            403 => "Forbidden",
            404 => "Not Found",
            416 => "Range Not Satisfiable",
            429 => "Too Many Requests",
            500 => "Internal Server Error",
            503 => "Service Unavailable",
            _ => "Other",
        }
    }
}

impl Body {
    pub fn length(&self) -> u64 {
        match self {
            Body::Bytes(bytes) => bytes.len() as u64,
            Body::File { length, .. } => *length,
        }
    }

    /// Where the body begins in its blob.
    pub fn offset(&self) -> u64 {
        match self {
            Body::Bytes(_) => 0,
            Body::File { offset, .. } => *offset,
        }
    }

    /// Fills `buffer` with the bytes from `at` on; beyond the body's end with zeros.
    pub fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        let count = self.length().saturating_sub(at).min(buffer.len() as u64) as usize;
        let (inside, beyond) = buffer.split_at_mut(count);
        beyond.fill(0);
        match self {
            Body::Bytes(_) if count == 0 => {}
            Body::Bytes(bytes) => inside.copy_from_slice(&bytes[at as usize..at as usize + count]),
            Body::File { file, offset, .. } => file.read_exact_at(inside, offset + at)?,
        }
        Ok(())
    }
}
