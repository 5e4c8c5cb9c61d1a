//! Docker's configuration file: which password, token or helper belongs to which registry.
//!
//! Pure. Reads the text of `config.json` and the text a credential helper prints; who reads the
//! file and runs the helper is `vault`. Understands the spellings Docker itself has left behind:
//! `https://index.docker.io/v1/` for docker.io, URLs with scheme and path for other hosts.
//! Helpers go before stored entries, a host's helper before the general one, as in Docker.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::config as limits;
use crate::error::{Error, Result};
use crate::registry::reference::{self, DEFAULT_HOST};
use crate::registry::secret::Secret;

/// The key docker.io is filed under, for historical reasons.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";
/// The user name that marks a helper's secret as an identity token.
const TOKEN_USER: &str = "<token>";

/// How we show who we are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// base64 of `user:password`: the rest of a Basic header.
    Basic(Secret),
    /// Turned into an access token at the token server.
    IdentityToken(Secret),
    /// A bearer token for the registry itself.
    RegistryToken(Secret),
}

/// What the configuration says about one registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing: ask anonymously.
    Nothing,
    /// It is in the file.
    Known(Credential),
    /// `docker-credential-NAME get` knows, asked with `key`; `fallback` if it does not.
    Helper {
        /// The helper's name: letters, digits, `-`, `_` and `.`.
        name: String,
        /// What it is asked.
        key: String,
        /// What the file itself holds.
        fallback: Option<Credential>,
    },
}

/// A parsed `config.json`.
#[derive(Debug, Default)]
pub struct DockerConfig {
    raw: RawConfig,
}

impl DockerConfig {
    /// Parses the text of the file; keys that are not about credentials are passed over.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let raw = serde_json::from_slice(text).map_err(|error| {
            // serde's own text may quote the value, which may be a password.
            let (line, column) = (error.line(), error.column());
            Error::Malformed(format!("not a Docker configuration (line {line}, column {column})"))
        })?;
        Ok(DockerConfig { raw })
    }

    /// What is known about `host`, which is `docker.io` or `HOST[:PORT]`.
    pub fn find(&self, host: &str) -> Result<Answer> {
        let stored = self.stored(host)?;
        let listed = self.raw.cred_helpers.iter().find(|(key, _)| names_host(key, host));
        let helper = match listed {
            Some((_, helper)) => Some(helper),
            None => self.raw.creds_store.as_ref(),
        };
        match (helper.filter(|name| !name.is_empty()), stored) {
            (Some(name), fallback) => {
                let is_safe = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
                if !name.bytes().all(is_safe) {
                    return Err(Error::Malformed(format!(
                        "credential helper {name:?}: not a plain name"
                    )));
                }
                let key = if host == DEFAULT_HOST { DOCKER_HUB_KEY } else { host };
                Ok(Answer::Helper { name: name.clone(), key: key.to_string(), fallback })
            }
            (None, Some(credential)) => Ok(Answer::Known(credential)),
            (None, None) => Ok(Answer::Nothing),
        }
    }

    fn stored(&self, host: &str) -> Result<Option<Credential>> {
        let exact = self.raw.auths.get(host);
        let entry = match exact {
            Some(entry) => Some(entry),
            None => self.raw.auths.iter().find(|(key, _)| names_host(key, host)).map(|(_, e)| e),
        };
        match entry {
            Some(entry) => {
                entry.credential().map_err(|error| error.context(format!("auths of {host}")))
            }
            None => Ok(None),
        }
    }
}

/// Reads what `docker-credential-NAME get` printed.
pub fn parse_helper_output(output: &[u8]) -> Result<Credential> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Output {
        username: String,
        secret: String,
    }
    let output: Output = serde_json::from_slice(output)
        .map_err(|_| Error::Denied("its output is not Username and Secret in JSON".to_string()))?;
    match output.username == TOKEN_USER {
        true => Ok(Credential::IdentityToken(Secret::new(output.secret))),
        false => basic(&output.username, &output.secret),
    }
}

/// Whether a helper's refusal only means that it has nothing for this registry.
pub fn helper_has_nothing(output: &[u8]) -> bool {
    String::from_utf8_lossy(output).contains("credentials not found")
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawConfig {
    auths: BTreeMap<String, RawAuth>,
    #[serde(rename = "credHelpers")]
    cred_helpers: BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    creds_store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawAuth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

impl std::fmt::Debug for RawAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RawAuth(..)")
    }
}

impl RawAuth {
    fn credential(&self) -> Result<Option<Credential>> {
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(token) = given(&self.identitytoken) {
            return Ok(Some(Credential::IdentityToken(Secret::new(token))));
        }
        if let Some(token) = given(&self.registrytoken) {
            return Ok(Some(Credential::RegistryToken(Secret::new(token))));
        }
        if let Some(auth) = given(&self.auth) {
            let decoded = STANDARD.decode(auth.trim()).unwrap_or_default();
            let decoded = String::from_utf8(decoded).unwrap_or_default();
            // Docker pads old entries with NUL.
            let Some((user, password)) = decoded.trim_end_matches('\0').split_once(':') else {
                return Err(Error::Malformed("auth is not base64 of user:password".to_string()));
            };
            return basic(user, password).map(Some);
        }
        match (given(&self.username), given(&self.password)) {
            (Some(user), Some(password)) => basic(&user, &password).map(Some),
            _ => Ok(None),
        }
    }
}

fn basic(user: &str, password: &str) -> Result<Credential> {
    let encoded = STANDARD.encode(format!("{user}:{password}"));
    match encoded.len() <= limits::TOKEN_SIZE_MAX {
        true => Ok(Credential::Basic(Secret::new(encoded))),
        false => Err(Error::Malformed("user and password are longer than 8 KiB".to_string())),
    }
}

/// Whether a key of the file means `host`, with or without scheme and path.
fn names_host(key: &str, host: &str) -> bool {
    let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
    let named = rest.split('/').next().unwrap_or(rest);
    reference::normal_host(&named.to_ascii_lowercase()) == host
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(config: &str, host: &str) -> Answer {
        DockerConfig::parse(config.as_bytes()).unwrap().find(host).unwrap()
    }

    fn user(text: &str) -> Answer {
        Answer::Known(Credential::Basic(Secret::new(STANDARD.encode(text))))
    }

    #[test]
    fn each_way_to_write_an_entry_is_understood() {
        let config = r#"{"auths":{
            "https://index.docker.io/v1/":{"auth":"dTpw"},
            "r.example:5000":{"username":"a","password":"b:c"},
            "https://old.example/v2/":{"auth":"dTpwAAA="},
            "id.example":{"auth":"dTpw","identitytoken":"tok"},
            "reg.example":{"registrytoken":"rt"},
            "none.example":{}},"HttpHeaders":{"X":"y"},"detachKeys":"a"}"#;
        assert_eq!(known(config, "docker.io"), user("u:p"));
        assert_eq!(known(config, "r.example:5000"), user("a:b:c"));
        assert_eq!(known(config, "r.example"), Answer::Nothing);
        assert_eq!(known(config, "old.example"), user("u:p"));
        let token = Answer::Known(Credential::IdentityToken(Secret::new("tok")));
        assert_eq!(known(config, "id.example"), token);
        let token = Answer::Known(Credential::RegistryToken(Secret::new("rt")));
        assert_eq!(known(config, "reg.example"), token);
        assert_eq!(known(config, "none.example"), Answer::Nothing);
        assert_eq!(known("{}", "docker.io"), Answer::Nothing);
    }

    #[test]
    fn a_hosts_own_helper_goes_before_the_general_one() {
        let config = r#"{"auths":{"a.example":{"auth":"dTpw"}},
            "credHelpers":{"a.example":"one"},"credsStore":"two"}"#;
        let Answer::Helper { name, key, fallback } = known(config, "a.example") else { panic!() };
        assert_eq!((name.as_str(), key.as_str()), ("one", "a.example"));
        assert!(fallback.is_some());
        let Answer::Helper { name, key, fallback } = known(config, "docker.io") else { panic!() };
        assert_eq!((name.as_str(), key.as_str()), ("two", DOCKER_HUB_KEY));
        assert_eq!(fallback, None);
    }

    #[test]
    fn damaged_entries_are_refused_without_being_printed() {
        for (config, host) in [
            (r#"{"auths":{"h":{"auth":"c2VjcmV0"}}}"#, "h"),
            (r#"{"auths":{"h":{"auth":"%%secret"}}}"#, "h"),
            (r#"{"credsStore":"../../bin/sh"}"#, "h"),
            (r#"{"credsStore":"a b"}"#, "h"),
        ] {
            let error = DockerConfig::parse(config.as_bytes()).unwrap().find(host).unwrap_err();
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        for text in ["", r#"{"auths":{"h":{"password":{"secret":1}}}}"#, r#"{"auths":"secret"}"#] {
            let error = DockerConfig::parse(text.as_bytes()).unwrap_err();
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn helper_output_is_a_password_or_an_identity_token() {
        let output = br#"{"ServerURL":"h","Username":"u","Secret":"p"}"#;
        assert_eq!(
            parse_helper_output(output).unwrap(),
            Credential::Basic(Secret::new(STANDARD.encode("u:p")))
        );
        let output = br#"{"Username":"<token>","Secret":"t"}"#;
        assert_eq!(
            parse_helper_output(output).unwrap(),
            Credential::IdentityToken(Secret::new("t"))
        );
        assert!(parse_helper_output(b"credentials not found in native keychain\n").is_err());
        assert!(helper_has_nothing(b"credentials not found in native keychain\n"));
    }
}
