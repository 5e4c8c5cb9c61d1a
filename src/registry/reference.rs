//! Image references, `HOST/REPO:TAG` and `HOST/REPO@sha256:...`, as Docker users write them.
//!
//! Pure. Knows which first components are hosts, that docker.io is served elsewhere, and that
//! `ubuntu` there means `library/ubuntu`. What it accepts can be put into a URL path as it is.

use std::fmt;

use crate::error::{Error, Result};

/// The host a reference without one means.
pub const DEFAULT_HOST: &str = "docker.io";
/// Who answers the registry API for docker.io.
pub const DEFAULT_API_HOST: &str = "registry-1.docker.io";

const REPO_SIZE_MAX: usize = 255;
const TAG_SIZE_MAX: usize = 128;

/// A parsed image reference.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    /// `HOST[:PORT]`; docker.io in every one of its spellings is `docker.io`.
    pub host: String,
    /// The repository, with `library/` where Docker adds it.
    pub repo: String,
    /// The tag; `latest` when neither tag nor digest was written.
    pub tag: Option<String>,
    /// `sha256:` and 64 hex digits.
    pub digest: Option<String>,
}

impl Reference {
    /// Parses a reference as a user types it.
    pub fn parse(text: &str) -> Result<Self> {
        let refuse = |why: &str| {
            Error::Malformed(format!("image reference {text:?}: {why}; write HOST/REPO:TAG"))
        };
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(digest)),
            None => (text, None),
        };
        if digest.is_some_and(|digest| !is_digest(digest)) {
            return Err(refuse("the digest is not sha256: and 64 hex digits"));
        }
        let (name, tag) = match name.rfind(':') {
            Some(at) if !name[at..].contains('/') => (&name[..at], Some(&name[at + 1..])),
            _ => (name, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(refuse("the tag is not 1 to 128 of A-Z a-z 0-9 _ . -"));
        }
        let (host, repo) = match name.split_once('/') {
            Some((first, rest)) if is_host(first) => (first, rest),
            _ => (DEFAULT_HOST, name),
        };
        let repo = normal_repo(host, repo);
        check_repo(&repo).map_err(|error| error.context(format!("image reference {text:?}")))?;
        let tag = match (tag, digest) {
            (None, None) => Some("latest"),
            (tag, _) => tag,
        };
        Ok(Reference {
            host: normal_host(host).to_string(),
            repo,
            tag: tag.map(str::to_string),
            digest: digest.map(str::to_string),
        })
    }

    /// What the manifest is asked for by: the digest when there is one, else the tag.
    pub fn manifest(&self) -> &str {
        self.digest.as_deref().or(self.tag.as_deref()).unwrap_or("latest")
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repo)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

/// `docker.io` for each spelling Docker itself understands; other hosts unchanged.
pub fn normal_host(host: &str) -> &str {
    match host {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => DEFAULT_HOST,
        other => other,
    }
}

/// Adds `library/` to a one-component repository of docker.io.
pub fn normal_repo(host: &str, repo: &str) -> String {
    match normal_host(host) == DEFAULT_HOST && !repo.contains('/') && !repo.is_empty() {
        true => format!("library/{repo}"),
        false => repo.to_string(),
    }
}

/// Refuses a repository that is not made of Docker's path components.
pub fn check_repo(repo: &str) -> Result<()> {
    let is_good = |part: &str| {
        let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = part.as_bytes();
        edge(bytes.first())
            && edge(bytes.last())
            && bytes
                .iter()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(b))
    };
    match repo.len() <= REPO_SIZE_MAX && repo.split('/').all(is_good) {
        true => Ok(()),
        false => Err(Error::Malformed(format!(
            "repository {repo:?}: not lower-case names of a-z 0-9 . _ - joined by /"
        ))),
    }
}

/// Whether the text is `sha256:` and 64 lower-case hex digits.
pub fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:").is_some_and(is_blob_id)
}

/// Whether the text is 64 lower-case hex digits.
pub fn is_blob_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Whether the text may name a tag.
pub fn is_tag(text: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.len() <= TAG_SIZE_MAX
        && text.bytes().next().is_some_and(is_word)
        && text.bytes().all(|b| is_word(b) || b == b'.' || b == b'-')
}

/// Docker's rule: a first component is a host when a repository name could not look like it.
fn is_host(first: &str) -> bool {
    first == "localhost"
        || first.contains(['.', ':'])
        || first.bytes().any(|b| b.is_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_mean_what_docker_means() {
        let digest = format!("sha256:{}", "0123456789abcdef".repeat(4));
        for (text, host, repo, manifest) in [
            ("ubuntu", "docker.io", "library/ubuntu", "latest"),
            ("ubuntu:22.04", "docker.io", "library/ubuntu", "22.04"),
            ("user/app", "docker.io", "user/app", "latest"),
            ("docker.io/ubuntu", "docker.io", "library/ubuntu", "latest"),
            ("index.docker.io/a/b:c", "docker.io", "a/b", "c"),
            ("localhost/app", "localhost", "app", "latest"),
            ("localhost:5000/app:v1", "localhost:5000", "app", "v1"),
            ("reg.example/a/b/c", "reg.example", "a/b/c", "latest"),
            ("UPPER/app", "UPPER", "app", "latest"),
            (&format!("reg.example/a@{digest}"), "reg.example", "a", digest.as_str()),
            (&format!("reg.example/a:v@{digest}"), "reg.example", "a", digest.as_str()),
        ] {
            let parsed = Reference::parse(text).unwrap();
            assert_eq!(
                (parsed.host.as_str(), parsed.repo.as_str(), parsed.manifest()),
                (host, repo, manifest),
                "{text}"
            );
            assert_eq!(Reference::parse(&parsed.to_string()).unwrap(), parsed);
        }
    }

    #[test]
    fn malformed_references_are_refused() {
        for text in [
            "",
            "/",
            "a//b",
            "A",
            "a:",
            "a@sha256:1",
            "a@md5:00",
            "h.x/",
            "h.x/..",
            "h.x/a/../b",
            "h.x/a b",
            "h.x/a?b",
            "h.x/a#b",
            "h.x/a%2f",
            "a:t/",
            "-a",
            "a-",
            "h.x/a:.t",
            "a\r\nb",
        ] {
            assert!(Reference::parse(text).is_err(), "{text:?} was accepted");
        }
        assert!(Reference::parse(&format!("a:{}", "t".repeat(129))).is_err());
        assert!(Reference::parse(&"a".repeat(256)).is_err());
    }

    proptest::proptest! {
        #[test]
        fn what_is_accepted_is_safe_in_a_path(text in "[a-zA-Z0-9./:@_?#% -]{0,60}") {
            if let Ok(reference) = Reference::parse(&text) {
                let path = format!("{}{}", reference.repo, reference.manifest());
                proptest::prop_assert!(!path.contains(['?', '#', '%', ' ', '@']));
                proptest::prop_assert!(!reference.repo.split('/').any(|part| part == ".."));
            }
        }
    }
}
