//! Who may do what: nobody is asked, a name and password with every request, or tokens.
//!
//! Owns the tokens given out. A token is a random word, good for the scopes it was asked for until
//! its time is over or all are expired on command.

use crate::reply::Reply;
use crate::wire::{Request, form};
use crate::{AuthMode, Serve};
use base64::Engine;
use std::collections::{HashMap, hash_map::RandomState};
use std::hash::BuildHasher;
use std::io;
use std::sync::Mutex;
use std::time::{Duration, Instant};

const TOKENS_MAX: usize = 1 << 16;

pub struct Auth {
    mode: AuthMode,
    name: String,
    password: String,
    lifetime: Duration,
    anonymous_pull: bool,
    tokens: Mutex<HashMap<String, Token>>,
    /// Seeded by the kernel: the source of unguessable words.
    words: RandomState,
}

struct Token {
    /// `repository:NAME:pull,push` and the like.
    scopes: Vec<String>,
    dies_at: Instant,
}

impl Auth {
    pub fn new(options: &Serve) -> io::Result<Self> {
        let account = options.user.split_once(':');
        let (name, password) = account.ok_or_else(|| io::Error::other("--user NAME:PASSWORD"))?;
        Ok(Auth {
            mode: options.auth,
            name: name.to_owned(),
            password: password.to_owned(),
            lifetime: Duration::from_secs(options.token_lifetime_s),
            anonymous_pull: options.anonymous_pull,
            tokens: Mutex::default(),
            words: RandomState::new(),
        })
    }

    /// Whether `request` may do its work on `repo` (`None`: it asks only whether we are there).
    pub fn allows(&self, request: &Request, repo: Option<&str>) -> bool {
        let header = request.header("authorization").unwrap_or("");
        match self.mode {
            AuthMode::None => true,
            AuthMode::Basic => self.is_account(header),
            AuthMode::Bearer => {
                let Some(word) = header.strip_prefix("Bearer ") else { return false };
                let tokens = self.lock();
                let Some(token) = tokens.get(word) else { return false };
                let grants = |repo: &str| {
                    let granted = |scope: &String| covers(scope, repo, action(request));
                    token.scopes.iter().any(granted)
                };
                token.dies_at > Instant::now() && repo.is_none_or(grants)
            }
        }
    }

    /// 401, saying what to show and where to get it.
    pub fn challenge(&self, request: &Request, repo: Option<&str>, registry_url: &str) -> Reply {
        let challenge = match self.mode {
            AuthMode::None | AuthMode::Basic => "Basic realm=\"registryd\"".to_owned(),
            AuthMode::Bearer => {
                let actions = if action(request) == "pull" { "pull" } else { "pull,push" };
                let scope = repo.map(|repo| format!(",scope=\"repository:{repo}:{actions}\""));
                let scope = scope.unwrap_or_default();
                format!("Bearer realm=\"{registry_url}/token\",service=\"registryd\"{scope}")
            }
        };
        let message = "show the credentials the challenge asks for";
        Reply::error(401, "UNAUTHORIZED", message).with("WWW-Authenticate", challenge)
    }

    /// The token endpoint: GET with a query, or POST with a form.
    pub fn token(&self, request: &Request, body: &[u8]) -> Reply {
        let fields = form(&String::from_utf8_lossy(body));
        let field = |name: &str| fields.iter().find(|(key, _)| key == name).map(|(_, v)| v);
        let by_form =
            field("username") == Some(&self.name) && field("password") == Some(&self.password);
        let known = by_form || self.is_account(request.header("authorization").unwrap_or(""));
        let named = request.query.iter().chain(&fields).filter(|(key, _)| key == "scope");
        let scopes: Vec<String> =
            named.flat_map(|(_, value)| value.split(' ').map(str::to_owned)).collect();
        let pulls_only = scopes.iter().all(|scope| scope.ends_with(":pull"));
        let granted = known || (self.anonymous_pull && pulls_only);
        if !granted {
            return Reply::error(401, "UNAUTHORIZED", "the name or the password is wrong")
                .with("WWW-Authenticate", "Basic realm=\"registryd\"");
        }
        let mut tokens = self.lock();
        let now = Instant::now();
        tokens.retain(|_, token| token.dies_at > now);
        if tokens.len() >= TOKENS_MAX {
            return Reply::error(429, "TOOMANYREQUESTS", "too many tokens are out");
        }
        let word = format!("{:016x}{:016x}", self.words.hash_one(now), tokens.len());
        tokens.insert(word.clone(), Token { scopes, dies_at: now + self.lifetime });
        let lifetime_s = self.lifetime.as_secs();
        let answer = serde_json::json!({
            "token": word, "access_token": word, "expires_in": lifetime_s
        });
        Reply::json(200, &answer)
    }

    /// Makes every token given out so far worthless.
    pub fn expire_tokens(&self) {
        self.lock().clear();
    }

    fn is_account(&self, header: &str) -> bool {
        let engine = base64::engine::general_purpose::STANDARD;
        let Some(Ok(shown)) = header.strip_prefix("Basic ").map(|word| engine.decode(word)) else {
            return false;
        };
        shown == format!("{}:{}", self.name, self.password).into_bytes()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Token>> {
        self.tokens.lock().expect("nothing panics while it holds the tokens")
    }
}

fn action(request: &Request) -> &'static str {
    if matches!(request.method.as_str(), "GET" | "HEAD") { "pull" } else { "push" }
}

fn covers(scope: &str, repo: &str, action: &str) -> bool {
    let Some(rest) = scope.strip_prefix("repository:") else { return false };
    let Some((name, actions)) = rest.rsplit_once(':') else { return false };
    name == repo && actions.split(',').any(|granted| granted == action || granted == "*")
}
