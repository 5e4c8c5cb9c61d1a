//! Orders to misbehave: which requests, and how.
//!
//! `PUT /_registryd/faults` replaces the list of rules, `DELETE` empties it. A rule matches by what
//! it names and leaves open what it does not; the effects of all rules that match are joined, the
//! later rule wins where two say the same. Owns the rules, their counts and their dice.
//!
//! ```json
//! [{"blob": "87e1", "method": "GET", "nth": 2, "count": 1, "effect": {"reset": 1000}},
//!  {"repo": "library/app", "probability": 0.1, "seed": 7, "effect": {"latency_ms": 50}}]
//! ```

use crate::Door;
use crate::wire::Request;
use serde::{Deserialize, Serialize};
use std::sync::Mutex;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    /// The repository, exactly.
    repo: Option<String>,
    /// The beginning of a blob's digest, with or without `sha256:`; "" is every blob.
    blob: Option<String>,
    /// A part of the path.
    path: Option<String>,
    method: Option<String>,
    /// `registry` or `storage`.
    door: Option<String>,
    /// The first of the matching requests that is hit, counted from 1.
    #[serde(default = "first")]
    nth: u64,
    /// How many of them are hit from there on; all unless given.
    count: Option<u64>,
    /// The chance that such a request is hit; decided by `seed` alone, not by time.
    probability: Option<f64>,
    #[serde(default)]
    seed: u64,
    effect: Effect,
    #[serde(skip)]
    matched: u64,
}

/// What happens to a request that is hit. All bytes are bytes of the body.
#[derive(Clone, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Effect {
    /// From the end of the request's head to the first byte of the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<u64>,
    /// For the body of this answer alone, in pieces of up to 16 KiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_second: Option<u64>,
    /// The same for all answers together that are given it: they share one link.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_bytes_per_second: Option<u64>,
    /// The same in the smallest of pieces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slow_drip: Option<u64>,
    /// 401 with a challenge.
    #[serde(skip_serializing_if = "is_false")]
    pub unauthorized: bool,
    /// Every token given out so far is worthless from now on.
    #[serde(skip_serializing_if = "is_false")]
    pub expire_tokens: bool,
    /// 403.
    #[serde(skip_serializing_if = "is_false")]
    pub forbidden: bool,
    /// 307 to the storage port, which refuses requests that carry credentials.
    #[serde(skip_serializing_if = "is_false")]
    pub redirect: bool,
    /// 429 with this Retry-After, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub too_many: Option<u64>,
    /// This status, with a short body.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// RST after so many bytes; 0 is before the head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reset: Option<u64>,
    /// RST when so many bytes of the request's body have been taken; they are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut_body: Option<u64>,
    /// So many bytes less than Content-Length promises, then an orderly end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub truncate: Option<u64>,
    /// So many bytes more than were asked for; Content-Length counts them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlong: Option<u64>,
    /// So many bytes behind the end of the body, which Content-Length does not count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stray_bytes: Option<u64>,
    /// The right bytes, but Content-Range speaks of the place one byte further.
    #[serde(skip_serializing_if = "is_false")]
    pub wrong_content_range: bool,
    /// The whole blob with status 200, whatever range was asked for.
    #[serde(skip_serializing_if = "is_false")]
    pub full_200_for_range: bool,
    /// The lowest bit of the blob's byte at this offset is flipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flip_bit: Option<u64>,
    /// No answer; the connection stays open until the client ends it.
    #[serde(skip_serializing_if = "is_false")]
    pub hang: bool,
    /// An orderly end in place of an answer.
    #[serde(skip_serializing_if = "is_false")]
    pub close_before_response: bool,
    /// An orderly end after the answer, which did not announce it.
    #[serde(skip_serializing_if = "is_false")]
    pub close_after_response: bool,
    /// Something that is not HTTP.
    #[serde(skip_serializing_if = "is_false")]
    pub garbage_head: bool,
    /// A head with a header of so many bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_head: Option<usize>,
    /// The body in chunks, without Content-Length.
    #[serde(skip_serializing_if = "is_false")]
    pub chunked: bool,
}

#[derive(Default)]
pub struct Faults {
    rules: Mutex<Vec<Rule>>,
}

impl Faults {
    /// Takes the rules of `body` in place of all others; counts start anew.
    pub fn replace(&self, body: &[u8]) -> Result<(), serde_json::Error> {
        let rules: Vec<Rule> = serde_json::from_slice(body)?;
        *self.lock() = rules;
        Ok(())
    }

    pub fn clear(&self) {
        self.lock().clear();
    }

    /// Everything that shall happen to `request`.
    pub fn effect(&self, door: Door, request: &Request) -> Effect {
        let mut effect = Effect::default();
        for rule in self.lock().iter_mut() {
            if rule.hits(door, request) {
                effect.join(&rule.effect);
            }
        }
        effect
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Rule>> {
        self.rules.lock().expect("nothing panics while it holds the rules")
    }
}

impl Rule {
    /// Whether this request is one to be hit. Counts it when it matches.
    fn hits(&mut self, door: Door, request: &Request) -> bool {
        let path = &request.path;
        let door_name = if door == Door::Storage { "storage" } else { "registry" };
        let blob = path.split_once("/blobs/sha256:").map(|(_, hex)| hex);
        let matches = self.repo.as_ref().is_none_or(|repo| path.contains(&format!("/v2/{repo}/")))
            && self.method.as_ref().is_none_or(|method| *method == request.method)
            && self.door.as_ref().is_none_or(|door| door == door_name)
            && self.path.as_ref().is_none_or(|part| path.contains(part.as_str()))
            && self.blob.as_ref().is_none_or(|digest| {
                let digest = digest.trim_start_matches("sha256:");
                blob.is_some_and(|hex| hex.starts_with(digest))
            });
        if !matches {
            return false;
        }
        self.matched += 1;
        let since = self.matched.checked_sub(self.nth);
        since.is_some_and(|since| self.count.is_none_or(|count| since < count))
            && self.probability.is_none_or(|chance| dice(self.seed, self.matched) < chance)
    }
}

impl Effect {
    /// The names of what happens, for the journal.
    pub fn names(&self) -> Vec<String> {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::Object(fields)) => fields.into_iter().map(|(k, _)| k).collect(),
            _ => Vec::new(),
        }
    }

    fn join(&mut self, later: &Effect) {
        self.latency_ms = later.latency_ms.or(self.latency_ms);
        self.bandwidth_bytes_per_second =
            later.bandwidth_bytes_per_second.or(self.bandwidth_bytes_per_second);
        self.link_bytes_per_second = later.link_bytes_per_second.or(self.link_bytes_per_second);
        self.slow_drip = later.slow_drip.or(self.slow_drip);
        self.too_many = later.too_many.or(self.too_many);
        self.status = later.status.or(self.status);
        self.reset = later.reset.or(self.reset);
        self.cut_body = later.cut_body.or(self.cut_body);
        self.truncate = later.truncate.or(self.truncate);
        self.overlong = later.overlong.or(self.overlong);
        self.stray_bytes = later.stray_bytes.or(self.stray_bytes);
        self.flip_bit = later.flip_bit.or(self.flip_bit);
        self.huge_head = later.huge_head.or(self.huge_head);
        self.unauthorized |= later.unauthorized;
        self.expire_tokens |= later.expire_tokens;
        self.forbidden |= later.forbidden;
        self.redirect |= later.redirect;
        self.wrong_content_range |= later.wrong_content_range;
        self.full_200_for_range |= later.full_200_for_range;
        self.hang |= later.hang;
        self.close_before_response |= later.close_before_response;
        self.close_after_response |= later.close_after_response;
        self.garbage_head |= later.garbage_head;
        self.chunked |= later.chunked;
    }
}

fn first() -> u64 {
    1
}

fn is_false(value: &bool) -> bool {
    !value
}

/// A number from 0 to 1 that depends on its arguments alone (SplitMix64).
fn dice(seed: u64, count: u64) -> f64 {
    let mut z = seed.wrapping_add(count.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}
