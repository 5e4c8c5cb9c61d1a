//! How far away the origin seems: delay to the first byte, the rate of its one link, and which
//! requests go wrong.
//!
//! All connections share the link. Which requests are slow or fail follows from their number
//! alone, so that two runs that make the same requests meet the same trouble.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;

/// What the operator asks for.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct Profile {
    /// Milliseconds from a request to the first byte of its answer.
    #[arg(long, default_value_t = 0)]
    pub first_byte_ms: u64,
    /// Megabits per second of all connections together; 0 is as fast as it goes.
    #[arg(long, default_value_t = 0)]
    pub mbit_per_s: u64,
    /// So many of a hundred requests are answered late.
    #[arg(long, default_value_t = 0)]
    pub slow_percent: u64,
    /// How much later than the others.
    #[arg(long, default_value_t = 500)]
    pub slow_ms: u64,
    /// So many of a hundred requests fail: in turn with 503 and by a body that breaks off.
    #[arg(long, default_value_t = 0)]
    pub fail_percent: u64,
}

/// What becomes of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Answered as it should be.
    Served,
    /// 503.
    Refused,
    /// Half of the body, then the end of the connection.
    BrokenOff,
}

/// The link that all connections share.
pub struct Link {
    profile: RwLock<Profile>,
    free_at: Mutex<Instant>,
    /// What was asked for and sent.
    pub counters: Counters,
}

/// What was asked for and sent since the start, or since `/-/forget`.
#[derive(Debug, Default)]
pub struct Counters {
    requests: AtomicU64,
    bytes: AtomicU64,
    connections: AtomicU64,
    slow: AtomicU64,
    failed: AtomicU64,
}

impl Link {
    /// A link that nobody uses yet.
    pub fn new(profile: Profile) -> Self {
        Link {
            profile: RwLock::new(profile),
            free_at: Mutex::new(Instant::now()),
            counters: Counters::default(),
        }
    }

    /// The profile in force.
    pub fn profile(&self) -> Profile {
        *self.profile.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another profile from now on: `first_byte_ms=20&mbit_per_s=200`, what is not named is 0.
    /// False, and no change, when a name or a number is wrong.
    pub fn change(&self, query: &str) -> bool {
        let mut profile = Profile { slow_ms: self.profile().slow_ms, ..Profile::default() };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let Ok(value) = value.parse() else { return false };
            match name {
                "first_byte_ms" => profile.first_byte_ms = value,
                "mbit_per_s" => profile.mbit_per_s = value,
                "slow_percent" => profile.slow_percent = value,
                "slow_ms" => profile.slow_ms = value,
                "fail_percent" => profile.fail_percent = value,
                _ => return false,
            }
        }
        *self.profile.write().unwrap_or_else(PoisonError::into_inner) = profile;
        true
    }

    /// Counts a request, waits until its first byte is due, and says what becomes of it.
    pub fn admit(&self, asked_at: Instant) -> Fate {
        let profile = self.profile();
        let number = self.counters.requests.fetch_add(1, Ordering::Relaxed);
        // Two draws that do not depend on each other (splitmix64).
        let draw = |salt: u64| mixed(number ^ salt << 32) % 100;
        let mut delay_ms = profile.first_byte_ms;
        if draw(1) < profile.slow_percent {
            self.counters.slow.fetch_add(1, Ordering::Relaxed);
            delay_ms += profile.slow_ms;
        }
        if delay_ms > 0 {
            wait_until(asked_at + Duration::from_millis(delay_ms));
        }
        if draw(2) >= profile.fail_percent {
            return Fate::Served;
        }
        let failed_before = self.counters.failed.fetch_add(1, Ordering::Relaxed);
        if failed_before.is_multiple_of(2) { Fate::Refused } else { Fate::BrokenOff }
    }

    /// How many bytes may leave in one piece.
    pub fn piece_bytes(&self) -> usize {
        if self.profile().mbit_per_s == 0 { usize::MAX } else { 16 << 10 }
    }

    /// Counts bytes, before they leave: whoever has them finds them counted.
    pub fn count(&self, bytes: u64) {
        self.counters.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Waits until the link has carried so many bytes.
    pub fn carry(&self, bytes: usize) {
        let mbit_per_s = self.profile().mbit_per_s;
        if mbit_per_s == 0 {
            return;
        }
        let taken = Duration::from_nanos(bytes as u64 * 8 * 1000 / mbit_per_s);
        let until = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            *free_at = (*free_at).max(Instant::now()) + taken;
            *free_at
        };
        wait_until(until);
    }
}

impl Counters {
    /// Somebody has connected.
    pub fn connected(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// As JSON.
    pub fn document(&self) -> serde_json::Value {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        serde_json::json!({
            "requests": value(&self.requests),
            "bytes": value(&self.bytes),
            "connections": value(&self.connections),
            "slow": value(&self.slow),
            "failed": value(&self.failed),
        })
    }

    /// Starts from nothing.
    pub fn forget(&self) {
        let all = [&self.requests, &self.bytes, &self.connections, &self.slow, &self.failed];
        all.iter().for_each(|counter| counter.store(0, Ordering::Relaxed));
    }
}

fn mixed(number: u64) -> u64 {
    let mut state = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    state = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ state >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ state >> 31
}

fn wait_until(when: Instant) {
    thread::sleep(when.saturating_duration_since(Instant::now()));
}
