//! Origins (scheme, host, port) and locations (an origin and what to ask it for).
//!
//! Owns URL syntax: parsing of absolute `http://` and `https://` URLs and of the relative forms a
//! `Location` header may take. Hosts are compared in lower case. Pure: never resolves, never
//! connects. User names and fragments in URLs are refused, so that no secret travels in a URL.

use std::fmt;

use crate::error::{Error, Result};

/// How an origin is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// Plain TCP.
    Http,
    /// TLS.
    Https,
}

impl Scheme {
    /// The port a URL without one means.
    pub fn default_port(self) -> u16 {
        match self {
            Scheme::Http => 80,
            Scheme::Https => 443,
        }
    }

    /// `http` or `https`.
    pub fn as_str(self) -> &'static str {
        match self {
            Scheme::Http => "http",
            Scheme::Https => "https",
        }
    }
}

/// Whom a connection belongs to: credentials and connections are never shared between two.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    /// How it is spoken to.
    pub scheme: Scheme,
    /// Lower case; an IPv6 address stands without its brackets.
    pub host: String,
    /// The TCP port.
    pub port: u16,
}

impl Origin {
    /// Parses `HOST[:PORT]`; an IPv6 host needs its brackets.
    pub fn parse(scheme: Scheme, authority: &str) -> Result<Self> {
        let malformed = |why: &str| Error::Malformed(format!("host {authority:?}: {why}"));
        let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
            let (host, tail) = rest.split_once(']').ok_or_else(|| malformed("no closing ]"))?;
            if host.parse::<std::net::Ipv6Addr>().is_err() {
                return Err(malformed("not an IPv6 address"));
            }
            match tail {
                "" => (host, None),
                _ => (host, Some(tail.strip_prefix(':').ok_or_else(|| malformed("junk after ]"))?)),
            }
        } else {
            match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            }
        };
        let is_name = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
        if host.is_empty() || !(host.bytes().all(is_name) || authority.starts_with('[')) {
            return Err(malformed("not a host name; write HOST or HOST:PORT"));
        }
        let port = match port {
            None => scheme.default_port(),
            Some(text) if text.bytes().all(|b| b.is_ascii_digit()) => text
                .parse::<u16>()
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(|| malformed("port"))?,
            Some(_) => return Err(malformed("the port is not a number")),
        };
        Ok(Origin { scheme, host: host.to_ascii_lowercase(), port })
    }

    /// Whether the host is this machine, by name or address; plain text stays on it.
    pub fn is_loopback(&self) -> bool {
        match self.host.parse::<std::net::IpAddr>() {
            Ok(address) => address.is_loopback(),
            Err(_) => self.host == "localhost" || self.host.ends_with(".localhost"),
        }
    }

    /// `HOST:PORT` with the port always there: the form of a CONNECT request and of a host key.
    pub fn host_port(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }

    /// `HOST[:PORT]` as a Host header and Docker write it: a default port is left out.
    pub fn authority(&self) -> String {
        let full = self.host_port();
        match self.port == self.scheme.default_port() {
            true => full[..full.rfind(':').unwrap_or(full.len())].to_string(),
            false => full,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), self.authority())
    }
}

/// An origin and the path with query to ask it for.
///
/// Display leaves the query out: signed URLs carry their secret there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Location {
    /// Who is asked.
    pub origin: Origin,
    /// Begins with `/`; visible ASCII only.
    pub path: String,
}

impl Location {
    /// Parses an absolute URL; the fragment is cut off.
    pub fn parse(url: &str) -> Result<Self> {
        let (scheme, rest) = split_scheme(url)?;
        let rest = without_fragment(rest);
        let at = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(at);
        if authority.contains('@') {
            return Err(Error::Malformed(format!(
                "URL {}: a user name or password in a URL is refused",
                redacted(url)
            )));
        }
        let origin = Origin::parse(scheme, authority)?;
        Location::new(origin, &absolute_path(path))
    }

    /// A location at a known origin; `path` must begin with `/`.
    pub fn new(origin: Origin, path: &str) -> Result<Self> {
        if !path.starts_with('/') || !path.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Error::Malformed(format!(
                "URL path {:?} at {origin}: not visible ASCII beginning with /",
                redacted(path)
            )));
        }
        Ok(Location { origin, path: path.to_string() })
    }

    /// Resolves what a `Location` header says against this location (RFC 3986 section 5.3).
    pub fn join(&self, target: &str) -> Result<Self> {
        let target = target.trim();
        if target.is_empty() {
            return Err(Error::Malformed("an empty Location".to_string()));
        }
        if let Some(rest) = target.strip_prefix("//") {
            return Location::parse(&format!("{}://{rest}", self.origin.scheme.as_str()));
        }
        if has_scheme(target) {
            return Location::parse(target);
        }
        let target = without_fragment(target);
        let own_path = self.path.split('?').next().unwrap_or("/");
        let path = match target.as_bytes().first() {
            None => self.path.clone(),
            Some(b'/') => normal_path(target),
            Some(b'?') => format!("{own_path}{target}"),
            Some(_) => {
                let directory = &own_path[..own_path.rfind('/').map_or(0, |at| at + 1)];
                normal_path(&format!("{directory}{target}"))
            }
        };
        Location::new(self.origin.clone(), &path)
    }

    /// The value of a query parameter, still percent-encoded; names compare without case.
    pub fn query(&self, name: &str) -> Option<&str> {
        let (_, query) = self.path.split_once('?')?;
        query.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=')?;
            key.eq_ignore_ascii_case(name).then_some(value)
        })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.origin, redacted(&self.path))
    }
}

/// What may be printed of a URL: nothing after the `?`, nothing before an `@`.
fn redacted(url: &str) -> &str {
    let end = url.find('?').unwrap_or(url.len());
    match url[..end].rfind('@') {
        Some(at) => &url[at + 1..end],
        None => &url[..end],
    }
}

fn has_scheme(target: &str) -> bool {
    let Some((scheme, _)) = target.split_once(':') else { return false };
    scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
}

fn split_scheme(url: &str) -> Result<(Scheme, &str)> {
    let known = [("http://", Scheme::Http), ("https://", Scheme::Https)];
    for (prefix, scheme) in known {
        if url.get(..prefix.len()).is_some_and(|head| head.eq_ignore_ascii_case(prefix)) {
            return Ok((scheme, &url[prefix.len()..]));
        }
    }
    Err(Error::Malformed(format!("URL {:?}: neither http:// nor https://", redacted(url))))
}

fn without_fragment(text: &str) -> &str {
    text.split('#').next().unwrap_or(text)
}

fn absolute_path(path: &str) -> String {
    match path.starts_with('/') {
        true => path.to_string(),
        false => format!("/{path}"),
    }
}

/// Removes `.` and `..` segments of the path, not of the query.
fn normal_path(target: &str) -> String {
    let (path, query) = match target.find('?') {
        Some(at) => target.split_at(at),
        None => (target, ""),
    };
    let mut kept: Vec<&str> = Vec::new();
    let segments: Vec<&str> = path.split('/').skip(1).collect();
    for (index, segment) in segments.iter().enumerate() {
        let is_last = index + 1 == segments.len();
        match *segment {
            ".." => {
                kept.pop();
                if is_last {
                    kept.push("");
                }
            }
            "." if is_last => kept.push(""),
            "." => {}
            other => kept.push(other),
        }
    }
    format!("/{}{query}", kept.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(url: &str) -> Location {
        Location::parse(url).unwrap()
    }

    #[test]
    fn urls_parse_to_their_parts() {
        let plain = at("http://Registry.Example:5000/v2/?a=1#frag");
        assert_eq!(plain.origin.host, "registry.example");
        assert_eq!((plain.origin.port, plain.path.as_str()), (5000, "/v2/?a=1"));
        assert_eq!(at("https://h").path, "/");
        assert_eq!(at("https://h?x=y").path, "/?x=y");
        assert_eq!(at("HTTPS://h:443/p").origin.authority(), "h");
        assert_eq!(at("http://[::1]:80/").origin.authority(), "[::1]");
        assert_eq!(at("http://[::1]:81/").origin.host_port(), "[::1]:81");
    }

    #[test]
    fn hostile_urls_are_refused() {
        for url in [
            "",
            "ftp://h/",
            "http://",
            "http:///p",
            "http://h:0/",
            "http://h:99999/",
            "http://h:+1/",
            "http://h:1x/",
            "http://u:p@h/",
            "http://h/a b",
            "http://h/a\r\nX: y",
            "http://[::1/",
            "http://[zz]/",
            "http://[::1]x/",
            "http://h\u{e9}/",
            "//h/p",
            "http://h,evil/",
        ] {
            assert!(Location::parse(url).is_err(), "{url:?} was accepted");
        }
    }

    #[test]
    fn errors_and_display_hide_queries_and_users() {
        let error = Location::parse("http://user:secret@h/p?sig=secret").unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
        assert_eq!(at("https://h/p?sig=secret").to_string(), "https://h/p");
    }

    #[test]
    fn a_location_header_resolves_like_a_browser() {
        let base = at("https://h:8443/v2/r/blobs/x?old=1");
        for (target, expected) in [
            ("http://o/p?q", "http://o/p?q"),
            ("//o/p", "https://o/p"),
            ("/abs?q=1", "https://h:8443/abs?q=1"),
            ("rel", "https://h:8443/v2/r/blobs/rel"),
            ("../up/./y", "https://h:8443/v2/r/up/y"),
            ("/../../etc", "https://h:8443/etc"),
            ("?only=query", "https://h:8443/v2/r/blobs/x?only=query"),
            ("a/..", "https://h:8443/v2/r/blobs/"),
        ] {
            assert_eq!(base.join(target).unwrap(), at(expected), "{target}");
        }
        assert!(base.join("").is_err());
        assert!(base.join("javascript:x").is_err());
    }

    #[test]
    fn query_parameters_are_found_without_case() {
        let signed = at("https://h/p?X-Amz-Expires=900&X-Amz-Date=20240101T000000Z");
        assert_eq!(signed.query("x-amz-expires"), Some("900"));
        assert_eq!(signed.query("Expires"), None);
    }

    #[test]
    fn loopback_is_recognised_by_name_and_address() {
        for (host, expected) in
            [("127.0.0.9", true), ("localhost", true), ("[::1]", true), ("127.0.0.1.evil", false)]
        {
            assert_eq!(Origin::parse(Scheme::Http, host).unwrap().is_loopback(), expected);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_breaks_parse_or_join(text in ".{0,80}", base in "/[a-z/.?]{0,20}") {
            let _ = Location::parse(&text);
            let base = Location::new(Origin::parse(Scheme::Http, "h").unwrap(), &base).unwrap();
            if let Ok(joined) = base.join(&text) {
                proptest::prop_assert!(joined.path.starts_with('/'));
                let url = format!("{}{}", joined.origin, joined.path);
                proptest::prop_assert_eq!(Location::parse(&url).unwrap(), joined);
            }
        }
    }
}
