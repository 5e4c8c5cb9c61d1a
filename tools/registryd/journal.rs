//! What was asked and what was answered, so that a test can prove what did not happen.
//!
//! Owns the list. An entry stands in it before the first byte of its answer leaves, and its `bytes`
//! are counted before they are sent: who has the whole answer finds it whole in the journal.
//! Orders (`/_registryd/`) are never listed. The list is bounded; what does not fit is counted.

use serde::Serialize;
use std::sync::Mutex;
use std::time::Instant;

const ENTRIES_MAX: usize = 1 << 20;

/// One request and its answer. Times are microseconds since the process started.
#[derive(Clone, Default, Serialize)]
pub struct Entry {
    /// `registry` or `storage`.
    pub door: &'static str,
    pub method: String,
    pub path: String,
    /// The `Range` header as it was sent.
    pub range: Option<String>,
    /// Whether the request carried credentials.
    pub authorization: bool,
    /// 0 when nothing was answered.
    pub status: u16,
    /// Bytes of the body handed to the socket.
    pub bytes: u64,
    /// The names of the effects of the fault rules that matched.
    pub faults: Vec<String>,
    pub connection: u64,
    pub start_us: u64,
    pub end_us: Option<u64>,
}

pub struct Journal {
    started: Instant,
    state: Mutex<State>,
}

/// Names an entry; stays unique when the journal is emptied.
#[derive(Clone, Copy)]
pub struct EntryId(usize);

#[derive(Default)]
struct State {
    entries: Vec<Entry>,
    /// The id of the first entry of `entries`.
    first: usize,
    dropped: usize,
    connections: u64,
}

impl Default for Journal {
    fn default() -> Self {
        Journal { started: Instant::now(), state: Mutex::default() }
    }
}

impl Journal {
    pub fn next_connection(&self) -> u64 {
        let mut state = self.lock();
        state.connections += 1;
        state.connections
    }

    pub fn begin(&self, mut entry: Entry) -> EntryId {
        entry.start_us = self.now_us();
        let mut state = self.lock();
        if state.entries.len() == ENTRIES_MAX {
            state.dropped += 1;
            return EntryId(usize::MAX);
        }
        state.entries.push(entry);
        EntryId(state.first + state.entries.len() - 1)
    }

    /// `None`, here and below, is a request that is not listed.
    pub fn answered(&self, id: Option<EntryId>, status: u16) {
        self.with(id, |entry| entry.status = status);
    }

    pub fn sent(&self, id: Option<EntryId>, bytes: usize) {
        self.with(id, |entry| entry.bytes += bytes as u64);
    }

    pub fn end(&self, id: Option<EntryId>) {
        let now_us = self.now_us();
        self.with(id, |entry| entry.end_us = Some(now_us));
    }

    pub fn clear(&self) {
        let mut state = self.lock();
        state.first += state.entries.len();
        state.dropped = 0;
        state.entries.clear();
    }

    pub fn json(&self) -> serde_json::Value {
        let state = self.lock();
        serde_json::json!({ "requests": state.entries, "dropped": state.dropped })
    }

    fn with(&self, id: Option<EntryId>, change: impl FnOnce(&mut Entry)) {
        let Some(id) = id else { return };
        let mut state = self.lock();
        let index = id.0.checked_sub(state.first);
        if let Some(entry) = index.and_then(|index| state.entries.get_mut(index)) {
            change(entry);
        }
    }

    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the journal")
    }
}
