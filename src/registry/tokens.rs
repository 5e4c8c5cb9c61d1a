//! One authorization shared by all cores, and who fetches the next one.
//!
//! A slot holds what to put into the Authorization header, the challenge it answered, and whether
//! some core is fetching a new one. Cores keep a copy and compare a version number per request; the
//! lock is taken only when it changed. A failed fetch is remembered for a moment, so that waiting
//! cores do not repeat it one after the other. Knows nothing of the network.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::config as limits;
use crate::error::Error;
use crate::registry::auth::{Challenge, Token};

/// What proves who we are to one registry, for one repository.
#[derive(Debug, Default)]
pub struct TokenSlot {
    /// Pairs with the lock: stored before unlocking, so that a reader who sees it finds the rest.
    version: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    current: Option<Token>,
    challenge: Option<Challenge>,
    is_fetching: bool,
    failure: Option<(u64, Error)>,
}

/// A core's copy.
#[derive(Clone, Debug, Default)]
pub struct TokenCopy {
    /// Which of the slot's values this is.
    pub version: u64,
    /// The token, if there is one.
    pub token: Option<Token>,
}

/// What a core that needs a new token should do.
pub enum Turn<'a> {
    /// Fetch it.
    Fetch(Fetching<'a>),
    /// Somebody has fetched it already: look again.
    Have,
    /// Somebody is fetching it: wait a little.
    Wait,
    /// Somebody has just failed.
    Failed(Error),
}

/// The right to fetch; gives it back when dropped.
pub struct Fetching<'a> {
    slot: &'a TokenSlot,
}

impl TokenSlot {
    /// A slot with a token from the start.
    pub fn holding(token: Token) -> Self {
        let slot = TokenSlot::default();
        slot.lock().current = Some(token);
        slot.version.store(1, Ordering::Release);
        slot
    }

    /// Brings a core's copy up to date; costs one load when nothing changed.
    pub fn refresh(&self, copy: &mut TokenCopy) {
        if self.version.load(Ordering::Acquire) != copy.version {
            let state = self.lock();
            copy.version = self.version.load(Ordering::Relaxed);
            copy.token = state.current.clone();
        }
    }

    /// The challenge that was answered last.
    pub fn challenge(&self) -> Option<Challenge> {
        self.lock().challenge.clone()
    }

    /// Asks for the right to replace the value of version `refused`.
    pub fn turn(&self, refused: u64, now_ns: u64) -> Turn<'_> {
        let mut state = self.lock();
        if self.version.load(Ordering::Relaxed) != refused {
            return Turn::Have;
        }
        if state.is_fetching {
            return Turn::Wait;
        }
        match &state.failure {
            Some((until_ns, error)) if *until_ns > now_ns => return Turn::Failed(error.clone()),
            _ => state.failure = None,
        }
        state.is_fetching = true;
        Turn::Fetch(Fetching { slot: self })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fetching<'_> {
    /// Shares what was fetched.
    pub fn publish(self, token: Token, challenge: Challenge) {
        let mut state = self.slot.lock();
        state.current = Some(token);
        state.challenge = Some(challenge);
        self.slot.version.fetch_add(1, Ordering::Release);
    }

    /// Tells those who wait that it failed; an old token stays as it is.
    pub fn fail(self, error: &Error, now_ns: u64) {
        let until_ns = now_ns + limits::TOKEN_FAILURE_LIFE_NS;
        self.slot.lock().failure = Some((until_ns, error.clone()));
    }
}

impl Drop for Fetching<'_> {
    fn drop(&mut self) {
        self.slot.lock().is_fetching = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::secret::Secret;

    fn token(text: &str) -> Token {
        Token { authorization: Secret::new(text), refresh_at_ns: 1, expires_at_ns: 2 }
    }

    #[test]
    fn one_core_fetches_and_all_cores_see_the_token() {
        let slot = TokenSlot::default();
        let (mut mine, mut theirs) = (TokenCopy::default(), TokenCopy::default());
        let Turn::Fetch(fetching) = slot.turn(0, 0) else { panic!("the first may fetch") };
        assert!(matches!(slot.turn(0, 0), Turn::Wait));
        fetching.publish(token("a"), Challenge::Basic);
        assert!(matches!(slot.turn(0, 0), Turn::Have));
        slot.refresh(&mut mine);
        slot.refresh(&mut theirs);
        assert_eq!((mine.version, mine.token), (1, Some(token("a"))));
        assert_eq!(theirs.version, 1);
        assert!(matches!(slot.turn(1, 0), Turn::Fetch(_)));
    }

    #[test]
    fn a_failure_is_shared_for_a_moment_only() {
        let slot = TokenSlot::holding(token("old"));
        let Turn::Fetch(fetching) = slot.turn(1, 0) else { panic!() };
        fetching.fail(&Error::Denied("no".into()), 0);
        assert!(matches!(slot.turn(1, 1), Turn::Failed(Error::Denied(_))));
        assert!(matches!(slot.turn(1, limits::TOKEN_FAILURE_LIFE_NS), Turn::Fetch(_)));
        let mut copy = TokenCopy::default();
        slot.refresh(&mut copy);
        assert_eq!(copy.token, Some(token("old")));
    }

    #[test]
    fn a_fetch_that_is_given_up_frees_the_right() {
        let slot = TokenSlot::default();
        drop(slot.turn(0, 0));
        assert!(matches!(slot.turn(0, 0), Turn::Fetch(_)));
    }
}
