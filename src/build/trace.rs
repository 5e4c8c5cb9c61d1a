//! A recorded start: which bytes of which files were touched, in which order.
//!
//! Pure. One JSON object per line, `{"path": "/usr/bin/app", "offset": 0, "length": 4096,
//! "t_ms": 12}`; other fields are for others. Lines are put in the order of their times.

use std::io::{BufRead, Read};

use serde::Deserialize;

use crate::config as limits;
use crate::error::{Error, Result};

/// Bytes of a file that were read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Touch {
    /// From the root, without a leading `/`.
    pub path: Vec<u8>,
    /// The first byte.
    pub offset: u64,
    /// How many.
    pub length: u64,
}

#[derive(Deserialize)]
struct Line {
    path: String,
    offset: u64,
    length: u64,
    t_ms: f64,
}

/// Reads a trace.
///
/// # Errors
/// `Malformed` names the line.
pub fn parse(mut trace: impl BufRead) -> Result<Vec<Touch>> {
    let mut touches = Vec::new();
    let mut text = Vec::new();
    for number in 1.. {
        text.clear();
        let size = (&mut trace)
            .take(limits::TRACE_LINE_MAX_BYTES + 1)
            .read_until(b'\n', &mut text)
            .map_err(|error| Error::io(&error, "the trace cannot be read"))?;
        if size == 0 {
            break;
        }
        if size as u64 > limits::TRACE_LINE_MAX_BYTES {
            return Err(malformed!("line {number} of the trace is too long"));
        }
        if text.trim_ascii().is_empty() {
            continue;
        }
        if touches.len() >= limits::TRACE_LINES_MAX {
            return Err(unsupported!("a trace of more than {} lines", limits::TRACE_LINES_MAX));
        }
        let line: Line = serde_json::from_slice(&text)
            .map_err(|error| malformed!("line {number} of the trace: {error}"))?;
        let path = line.path.trim_start_matches('/').as_bytes().to_vec();
        touches.push((line.t_ms, Touch { path, offset: line.offset, length: line.length }));
    }
    touches.sort_by(|(one, _), (other, _)| one.total_cmp(other));
    Ok(touches.into_iter().map(|(_, touch)| touch).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touches_come_in_the_order_of_their_times() {
        let text = concat!(
            r#"{"path":"/b","offset":4096,"length":1,"t_ms":7.5,"pid":1}"#,
            "\n\n",
            r#"{"path":"a/c","offset":0,"length":0,"t_ms":2}"#,
        );
        let touch = |path: &str, offset, length| Touch { path: path.into(), offset, length };
        let found = parse(text.as_bytes()).unwrap();
        assert_eq!(found, [touch("a/c", 0, 0), touch("b", 4096, 1)]);
        assert!(parse(&b""[..]).unwrap().is_empty());
    }

    #[test]
    fn a_bad_line_is_named() {
        let good = r#"{"path":"a","offset":0,"length":1,"t_ms":0}"#;
        for bad in ["{}", "x", r#"{"path":"a","offset":-1,"length":1,"t_ms":0}"#, "\u{0}"] {
            let error = parse(format!("{good}\n{bad}").as_bytes()).unwrap_err();
            assert!(error.to_string().contains("line 2"), "{error}");
        }
        let long = vec![b' '; limits::TRACE_LINE_MAX_BYTES as usize + 1];
        assert!(parse(&long[..]).is_err());
    }
}
