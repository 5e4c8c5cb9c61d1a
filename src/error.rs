//! The one error type, and the one table from an error to the errno an application sees.
//!
//! A variant exists because some code matches on it: to retry, to answer with a status, to choose
//! an errno. The text names the thing, the cause and, where there is one, the next action; it is
//! written once, at the edge where all three are known.

use std::fmt;

/// [`Error::Malformed`] with a text.
macro_rules! malformed {
    ($($text:tt)*) => { $crate::error::Error::Malformed(format!($($text)*)) };
}

/// [`Error::Unsupported`] with a text.
macro_rules! unsupported {
    ($($text:tt)*) => { $crate::error::Error::Unsupported(format!($($text)*)) };
}

/// What went wrong, by what can be done about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// Hostile or damaged input: an image, a message, a header, a request body.
    Malformed(String),
    /// Well-formed input that this program refuses to serve.
    Unsupported(String),
    /// The named thing does not exist.
    NotFound(String),
    /// The named thing is there already.
    Exists(String),
    /// The named thing is in use.
    Busy(String),
    /// Bytes arrived and are not what the bootstrap's digest says. Never shown to a reader.
    Digest(String),
    /// The registry knows us and says no (401, 403), or the credentials cannot be had.
    Denied(String),
    /// Another try may succeed: refused, reset, 429, 5xx, short body.
    Unavailable {
        /// The thing, the cause, the next action.
        what: String,
        /// What the other side asked for with Retry-After.
        retry_after_ms: Option<u64>,
    },
    /// The time allowed has passed.
    Deadline(String),
    /// The daemon is going down.
    Shutdown,
    /// A system call failed.
    System {
        /// The kernel's number.
        errno: i32,
        /// What was being done to what.
        what: String,
    },
}

/// The result of everything fallible in this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A transient failure without a requested delay.
    pub fn unavailable(what: impl Into<String>) -> Self {
        Error::Unavailable { what: what.into(), retry_after_ms: None }
    }

    /// A failed system call; `what` says what was being done to what.
    pub fn system(errno: i32, what: impl Into<String>) -> Self {
        Error::System { errno, what: what.into() }
    }

    /// A failed `std::io` call; `what` says what was being done to what.
    pub fn io(error: &std::io::Error, what: impl Into<String>) -> Self {
        match error.raw_os_error() {
            Some(errno) => Error::system(errno, what),
            None => Error::Malformed(format!("{}: {error}", what.into())),
        }
    }

    /// Puts `context: ` in front of the text, keeping the kind.
    #[must_use]
    pub fn context(self, context: impl fmt::Display) -> Self {
        let add = |text: String| format!("{context}: {text}");
        match self {
            Error::Malformed(text) => Error::Malformed(add(text)),
            Error::Unsupported(text) => Error::Unsupported(add(text)),
            Error::NotFound(text) => Error::NotFound(add(text)),
            Error::Exists(text) => Error::Exists(add(text)),
            Error::Busy(text) => Error::Busy(add(text)),
            Error::Digest(text) => Error::Digest(add(text)),
            Error::Denied(text) => Error::Denied(add(text)),
            Error::Unavailable { what, retry_after_ms } => {
                Error::Unavailable { what: add(what), retry_after_ms }
            }
            Error::Deadline(text) => Error::Deadline(add(text)),
            Error::Shutdown => Error::Shutdown,
            Error::System { errno, what } => Error::System { errno, what: add(what) },
        }
    }

    /// Whether the same request may succeed when it is made again, here or at a mirror.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Error::Unavailable { .. } | Error::Deadline(_) | Error::Digest(_) | Error::Malformed(_)
        )
    }

    /// The number a kernel interface is answered with.
    pub fn errno(&self) -> i32 {
        match self {
            Error::NotFound(_) => libc::ENOENT,
            Error::Exists(_) => libc::EEXIST,
            Error::Busy(_) => libc::EBUSY,
            Error::Denied(_) => libc::EACCES,
            Error::Unsupported(_) => libc::EOPNOTSUPP,
            Error::System { errno, .. } => *errno,
            Error::Malformed(_)
            | Error::Digest(_)
            | Error::Unavailable { .. }
            | Error::Deadline(_)
            | Error::Shutdown => libc::EIO,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Malformed(text)
            | Error::Unsupported(text)
            | Error::NotFound(text)
            | Error::Exists(text)
            | Error::Busy(text)
            | Error::Digest(text)
            | Error::Denied(text)
            | Error::Unavailable { what: text, .. }
            | Error::Deadline(text) => f.write_str(text),
            Error::Shutdown => f.write_str("the daemon is shutting down"),
            Error::System { errno, what } => {
                write!(f, "{what}: {}", std::io::Error::from_raw_os_error(*errno))
            }
        }
    }
}

impl std::error::Error for Error {}
