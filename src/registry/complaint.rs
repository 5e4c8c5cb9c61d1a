//! What a registry says when it refuses: the first entry of its `errors`, fit for one line.
//!
//! Pure. The text comes from the other side: it is cut, and only what can be printed is kept.

use serde::Deserialize;

use crate::config as limits;

#[derive(Deserialize)]
struct Body {
    errors: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// The code and message of an error body, if it has one in the form registries agreed on.
pub fn parse(body: &[u8]) -> Option<String> {
    let body: Body = serde_json::from_slice(body).ok()?;
    let first = body.errors.into_iter().next()?;
    let text = match (first.code.is_empty(), first.message.is_empty()) {
        (true, true) => return None,
        (false, false) => format!("{}: {}", first.code, first.message),
        _ => first.code + &first.message,
    };
    let printable = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    Some(printable.take(limits::COMPLAINT_CHARS_MAX).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_is_one_short_line() {
        let body = br#"{"errors":[{"code":"DENIED","message":"no\r\nway","detail":{}},{}]}"#;
        assert_eq!(parse(body).as_deref(), Some("DENIED: no  way"));
        assert_eq!(parse(br#"{"errors":[{"message":"full"}]}"#).as_deref(), Some("full"));
        let long = format!(r#"{{"errors":[{{"code":"{}"}}]}}"#, "x".repeat(10_000));
        assert_eq!(parse(long.as_bytes()).map(|t| t.len()), Some(limits::COMPLAINT_CHARS_MAX));
    }

    #[test]
    fn what_is_no_error_body_says_nothing() {
        for body in [&b""[..], b"<html>", b"{}", br#"{"errors":[]}"#, br#"{"errors":[{}]}"#] {
            assert_eq!(parse(body), None);
        }
    }
}
