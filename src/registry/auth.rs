//! What a registry demands (WWW-Authenticate) and what a token server gives.
//!
//! Pure. Reads challenges, builds the URL a token is asked at, reads the token. Its rules: a
//! password goes only over TLS, unless the registry itself is plain or the realm is this machine; a
//! token counts as old at four fifths of its life, so that nobody meets the fifth; a token without
//! an end lives a minute. Times are passed in.

use serde::Deserialize;

use crate::config as limits;
use crate::error::{Error, Result};
use crate::registry::origin::{Location, Origin, Scheme};
use crate::registry::secret::Secret;
use crate::registry::timestamp;

/// One way a registry accepts us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Challenge {
    /// User and password with each request.
    Basic,
    /// A token from somewhere else.
    Bearer(Bearer),
}

/// Where a token is had and for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bearer {
    /// The token server's URL, not yet checked.
    pub realm: String,
    /// Whom the token is for; may be empty.
    pub service: String,
    /// What it allows; several are separated by spaces; may be empty.
    pub scope: String,
}

/// A token and how long to use it, in the engine's time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// `Bearer ...`.
    pub authorization: Secret,
    /// From here on somebody should fetch the next one.
    pub refresh_at_ns: u64,
    /// From here on it is of no use.
    pub expires_at_ns: u64,
}

/// Reads the challenges of one header value; schemes we do not speak are passed over.
///
/// Where the text stops making sense, reading stops: what was understood before counts.
pub fn parse_challenges(text: &str) -> Vec<Challenge> {
    let mut cursor = Cursor { rest: text };
    let mut found: Vec<Challenge> = Vec::new();
    let mut current: Option<(String, Bearer)> = None;
    while found.len() < limits::AUTH_CHALLENGE_COUNT_MAX {
        cursor.skip(b" \t,");
        let word = cursor.token();
        if word.is_empty() {
            break;
        }
        cursor.skip(b" \t");
        if !cursor.rest.starts_with('=') {
            found.extend(current.take().and_then(finish));
            let empty =
                Bearer { realm: String::new(), service: String::new(), scope: String::new() };
            current = Some((word.to_ascii_lowercase(), empty));
            continue;
        }
        cursor.skip(b"=");
        cursor.skip(b" \t");
        let Some(value) = cursor.value() else { break };
        if let Some((_, bearer)) = &mut current {
            match word.to_ascii_lowercase().as_str() {
                "realm" => bearer.realm = value,
                "service" => bearer.service = value,
                "scope" => bearer.scope = value,
                _ => {}
            }
        }
    }
    found.extend(current.take().and_then(finish));
    found.truncate(limits::AUTH_CHALLENGE_COUNT_MAX);
    found
}

/// The challenge to answer: a token when one is offered, else the password.
pub fn choose(challenges: &[Challenge]) -> Option<&Challenge> {
    let is_bearer = |challenge: &&Challenge| matches!(challenge, Challenge::Bearer(_));
    challenges.iter().find(is_bearer).or_else(|| challenges.first())
}

impl Bearer {
    /// The token server, if its URL may be trusted with a password for `registry`.
    pub fn realm(&self, registry: &Origin) -> Result<Location> {
        let realm = Location::parse(&self.realm)
            .map_err(|error| error.context(format!("the token server {registry} names")))?;
        let plain_is_fine = registry.scheme == Scheme::Http || realm.origin.is_loopback();
        match realm.origin.scheme == Scheme::Https || plain_is_fine {
            true => Ok(realm),
            false => Err(Error::Denied(format!(
                "{registry} names the token server {}, which is not https; nothing was sent to it",
                realm.origin
            ))),
        }
    }

    /// The URL for a GET of the token; `default_scope` stands in for a missing one.
    pub fn token_location(&self, realm: &Location, default_scope: &str) -> Result<Location> {
        let mut path = realm.path.clone();
        let mut glue = if path.contains('?') { '&' } else { '?' };
        let mut add = |name: &str, value: &str| {
            path.push(glue);
            path.push_str(name);
            path.push('=');
            percent_encode(value, &mut path);
            glue = '&';
        };
        if !self.service.is_empty() {
            add("service", &self.service);
        }
        for scope in self.scopes(default_scope).split_ascii_whitespace() {
            add("scope", scope);
        }
        Location::new(realm.origin.clone(), &path)
    }

    /// The form for a POST that turns an identity token into an access token (OAuth2).
    pub fn refresh_form(&self, identity_token: &Secret, default_scope: &str) -> String {
        let mut form = String::from("grant_type=refresh_token&client_id=sluice&service=");
        percent_encode(&self.service, &mut form);
        form.push_str("&scope=");
        percent_encode(self.scopes(default_scope), &mut form);
        form.push_str("&refresh_token=");
        percent_encode(identity_token.reveal(), &mut form);
        form
    }

    fn scopes<'a>(&'a self, default_scope: &'a str) -> &'a str {
        match self.scope.trim().is_empty() {
            true => default_scope,
            false => &self.scope,
        }
    }
}

/// The scope of a pull from a repository.
pub fn pull_scope(repo: &str) -> String {
    format!("repository:{repo}:pull")
}

/// The scope of reading and writing a repository.
pub fn push_scope(repo: &str) -> String {
    format!("repository:{repo}:pull,push")
}

/// Adds scopes to those that challenges ask for, so that one token serves a whole push.
pub fn widen(challenges: &mut [Challenge], scopes: &[String]) {
    for challenge in challenges {
        let Challenge::Bearer(bearer) = challenge else { continue };
        for scope in scopes {
            if bearer.scope.split_ascii_whitespace().any(|known| known == scope) {
                continue;
            }
            bearer.scope.push(' ');
            bearer.scope.push_str(scope);
        }
    }
}

/// Reads a token server's answer; `unix_now_s` only serves to see an `issued_at` in the past.
pub fn parse_token(json: &[u8], now_ns: u64, unix_now_s: u64) -> Result<Token> {
    let bad =
        |why: &str| Error::unavailable(format!("the token server's answer is unusable: {why}"));
    let raw: RawToken = serde_json::from_slice(json)
        .map_err(|error| bad(&format!("not JSON of a token ({})", kind_of(&error))))?;
    let token = [raw.token, raw.access_token].into_iter().flatten().find(|text| !text.is_empty());
    let token = token.ok_or_else(|| bad("it holds neither token nor access_token"))?;
    if token.len() > limits::TOKEN_SIZE_MAX || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(bad("the token is longer than 8 KiB or not visible ASCII"));
    }
    let life_s = match raw.expires_in.unwrap_or(0.0) {
        life if life >= 1.0 => (life as u64).min(limits::TOKEN_LIFE_S_MAX),
        _ => limits::TOKEN_LIFE_DEFAULT_S,
    };
    let issued_s = raw.issued_at.as_deref().and_then(timestamp::parse_rfc3339);
    let age_s = issued_s.map_or(0, |issued| unix_now_s.saturating_sub(issued));
    // A token server in front of a cache hands out used tokens; a wrong clock must not turn a fresh
    // token into a dead one, so an age beyond the life is not believed.
    let left_s = if age_s < life_s { life_s - age_s } else { life_s };
    let left_ns = left_s * limits::SECOND_NS;
    Ok(Token {
        authorization: Secret::new(format!("Bearer {token}")),
        refresh_at_ns: now_ns.saturating_add(left_ns / 5 * 4),
        expires_at_ns: now_ns.saturating_add(left_ns),
    })
}

#[derive(Deserialize)]
struct RawToken {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<f64>,
    issued_at: Option<String>,
}

/// The kind of a JSON error without the text around it, which may be a token.
fn kind_of(error: &serde_json::Error) -> &'static str {
    match error.classify() {
        serde_json::error::Category::Io => "input",
        serde_json::error::Category::Syntax => "syntax",
        serde_json::error::Category::Data => "types",
        serde_json::error::Category::Eof => "cut short",
    }
}

fn finish((scheme, bearer): (String, Bearer)) -> Option<Challenge> {
    match scheme.as_str() {
        "basic" => Some(Challenge::Basic),
        "bearer" if !bearer.realm.is_empty() => Some(Challenge::Bearer(bearer)),
        _ => None,
    }
}

fn percent_encode(text: &str, into: &mut String) {
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b':' | b'/' => {
                into.push(byte as char);
            }
            other => {
                into.push('%');
                for nibble in [other >> 4, other & 15] {
                    into.push(
                        char::from_digit(u32::from(nibble), 16)
                            .map_or('0', |c| c.to_ascii_uppercase()),
                    );
                }
            }
        }
    }
}

struct Cursor<'a> {
    rest: &'a str,
}

impl<'a> Cursor<'a> {
    fn skip(&mut self, bytes: &[u8]) {
        self.rest =
            self.rest.trim_start_matches(|c: char| c.is_ascii() && bytes.contains(&(c as u8)));
    }

    fn token(&mut self) -> &'a str {
        let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~/".contains(&b);
        let end = self.rest.bytes().position(|b| !is_token(b)).unwrap_or(self.rest.len());
        let (token, rest) = self.rest.split_at(end);
        self.rest = rest;
        token
    }

    /// A token or a quoted string; `None` when the quote never ends.
    fn value(&mut self) -> Option<String> {
        let Some(quoted) = self.rest.strip_prefix('"') else {
            let end = self.rest.find([',', ' ', '\t']).unwrap_or(self.rest.len());
            let (value, rest) = self.rest.split_at(end);
            self.rest = rest;
            return Some(value.to_string());
        };
        let mut value = String::new();
        let mut escaped = false;
        for (at, letter) in quoted.char_indices() {
            match letter {
                _ if escaped => {
                    value.push(letter);
                    escaped = false;
                }
                '\\' => escaped = true,
                '"' => {
                    self.rest = &quoted[at + 1..];
                    return Some(value);
                }
                other => value.push(other),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry(url: &str) -> Origin {
        Location::parse(url).unwrap().origin
    }

    fn bearer(realm: &str) -> Bearer {
        Bearer { realm: realm.into(), service: "reg".into(), scope: String::new() }
    }

    #[test]
    fn challenges_are_read_in_every_form_seen() {
        let full = concat!(
            r#"Bearer realm="https://auth.example/token",service="a, b=\"c\"","#,
            r#"scope="repository:x/y:pull,push""#
        );
        let [Challenge::Bearer(found)] = &parse_challenges(full)[..] else { panic!("one bearer") };
        assert_eq!(found.realm, "https://auth.example/token");
        assert_eq!(found.service, "a, b=\"c\"");
        assert_eq!(found.scope, "repository:x/y:pull,push");
        let several = r#"Negotiate, Basic realm="x", bearer REALM=https://a/t , service=s"#;
        let found = parse_challenges(several);
        assert_eq!(found.len(), 2);
        let Some(Challenge::Bearer(chosen)) = choose(&found) else { panic!("bearer first") };
        assert_eq!((chosen.realm.as_str(), chosen.service.as_str()), ("https://a/t", "s"));
        assert_eq!(parse_challenges("Basic"), [Challenge::Basic]);
    }

    #[test]
    fn nonsense_challenges_yield_nothing() {
        for text in
            ["", ",,,", "=", "Bearer", "Bearer scope=x", "Bearer realm=\"open", "Digest a=b"]
        {
            assert_eq!(parse_challenges(text), [], "{text:?}");
        }
        assert_eq!(parse_challenges(&"Basic,".repeat(100)).len(), limits::AUTH_CHALLENGE_COUNT_MAX);
    }

    #[test]
    fn passwords_are_not_sent_to_a_plain_token_server_of_a_tls_registry() {
        let secure = registry("https://r.example/");
        assert!(bearer("http://auth.example/t").realm(&secure).is_err());
        assert!(bearer("ftp://auth.example/t").realm(&secure).is_err());
        assert!(bearer("http://127.0.0.1:1/t").realm(&secure).is_ok());
        assert!(bearer("https://auth.example/t").realm(&secure).is_ok());
        assert!(bearer("http://auth.example/t").realm(&registry("http://r.example/")).is_ok());
    }

    #[test]
    fn the_token_url_holds_service_and_each_scope() {
        let mut asked = bearer("https://a/t?x=1");
        asked.service = "r e&g".into();
        asked.scope = "repository:a/b:pull repository:c:pull,push".into();
        let realm = asked.realm(&registry("https://r/")).unwrap();
        assert_eq!(
            asked.token_location(&realm, "unused").unwrap().path,
            "/t?x=1&service=r%20e%26g&scope=repository:a/b:pull&scope=repository:c:pull%2Cpush"
        );
        let plain = bearer("https://a/t");
        let url = plain.token_location(&realm, &pull_scope("x/y")).unwrap();
        assert!(url.path.ends_with("&scope=repository:x/y:pull"), "{}", url.path);
    }

    #[test]
    fn a_widened_challenge_asks_for_everything_once() {
        let mut offered = parse_challenges("Bearer realm=\"https://a/t\",scope=\"x y\", Basic");
        widen(&mut offered, &["y".to_string(), push_scope("r")]);
        let Challenge::Bearer(bearer) = &offered[0] else { panic!("a bearer first") };
        assert_eq!(bearer.scope, "x y repository:r:pull,push");
        assert_eq!(offered[1], Challenge::Basic);
    }

    #[test]
    fn tokens_live_as_long_as_they_say_or_a_minute() {
        let second = limits::SECOND_NS;
        let read = |json: &str| parse_token(json.as_bytes(), 10 * second, 1_000_000_100).unwrap();
        let plain = read(r#"{"token":"abc"}"#);
        assert_eq!(plain.authorization.reveal(), "Bearer abc");
        assert_eq!((plain.refresh_at_ns, plain.expires_at_ns), (58 * second, 70 * second));
        let told = read(r#"{"access_token":"x","expires_in":300,"other":{}}"#);
        assert_eq!((told.refresh_at_ns, told.expires_at_ns), (250 * second, 310 * second));
        let used = read(r#"{"token":"x","expires_in":300,"issued_at":"2001-09-09T01:46:40Z"}"#);
        assert_eq!(used.expires_at_ns, 210 * second);
        let wrong_clock =
            read(r#"{"token":"x","expires_in":300,"issued_at":"1999-01-01T00:00:00Z"}"#);
        assert_eq!(wrong_clock.expires_at_ns, 310 * second);
        assert_eq!(read(r#"{"token":"x","expires_in":-5}"#).expires_at_ns, 70 * second);
        assert_eq!(read(r#"{"token":"x","expires_in":1e300}"#).expires_at_ns, 86_410 * second);
    }

    #[test]
    fn unusable_tokens_are_refused_without_being_printed() {
        for json in [
            "",
            "[]",
            "{}",
            r#"{"token":""}"#,
            r#"{"token":"a\r\nb"}"#,
            r#"{"token":"sec ret"}"#,
            r#"{"token":"secret"#,
        ] {
            let error = parse_token(json.as_bytes(), 0, 0).unwrap_err();
            assert!(!error.to_string().contains("sec"), "{error}");
        }
        let long = format!(r#"{{"token":"{}"}}"#, "a".repeat(limits::TOKEN_SIZE_MAX + 1));
        assert!(parse_token(long.as_bytes(), 0, 0).is_err());
        let token = parse_token(br#"{"token":"secret"}"#, 0, 0).unwrap();
        assert!(!format!("{token:?}").contains("secret"));
    }

    proptest::proptest! {
        #[test]
        fn no_text_breaks_the_challenge_parser(
            text in "(Bearer |Basic |realm=|\"|,|=|\\\\|.){0,30}",
        ) {
            let found = parse_challenges(&text);
            proptest::prop_assert!(found.len() <= limits::AUTH_CHALLENGE_COUNT_MAX);
        }
    }
}
