//! The daemon's log, as a value that is handed to whoever may have to say something.
//!
//! Writing a line never waits: it goes into a bounded queue, and one ordinary thread (started by
//! the daemon) takes lines out and writes them. When the queue is full the line is dropped and
//! counted. The last errors are also kept, for GET /api/v1/daemon/events. Lines are for operators:
//! each names the thing, the cause and what to do.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};

pub use crate::config::LogLevel as Level;
use crate::config::{
    JOURNAL_ERRORS_MAX, JOURNAL_ERRORS_MAX_BYTES, JOURNAL_LINES_MAX, JOURNAL_REPEAT_MS,
    JOURNAL_REPEATS_MAX,
};

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// How important it is.
    pub level: Level,
    /// One sentence, without a newline.
    pub text: String,
}

/// The log. Shared by `Arc`.
#[derive(Debug)]
pub struct Journal {
    level: AtomicU8,
    lines: Sender<Line>,
    dropped: AtomicU64,
    errors: Mutex<Errors>,
    /// What was said lately, oldest first: a bad chunk that everybody reads is one line a minute.
    said: Mutex<VecDeque<(Instant, String)>>,
}

/// The last errors, at most so many and so many bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Errors {
    /// The texts, oldest first.
    pub texts: VecDeque<String>,
    /// Their length in bytes.
    pub size_bytes: usize,
}

impl Journal {
    /// A journal and the end its lines come out of. Without a reader lines are dropped.
    pub fn new(level: Level) -> (Arc<Journal>, Receiver<Line>) {
        let (lines, receiver) = crossbeam_channel::bounded(JOURNAL_LINES_MAX);
        let journal = Journal {
            level: AtomicU8::new(level as u8),
            lines,
            dropped: AtomicU64::new(0),
            errors: Mutex::default(),
            said: Mutex::default(),
        };
        (Arc::new(journal), receiver)
    }

    /// Says that something failed. Kept for the events endpoint whatever the level. The very same
    /// text is not said again within [`JOURNAL_REPEAT_MS`].
    pub fn error(&self, text: impl Into<String>) {
        let text = text.into();
        if self.repeats(&text, Instant::now()) {
            return;
        }
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).push(text.clone());
        self.write(Level::Error, || text);
    }

    fn repeats(&self, text: &str, now: Instant) -> bool {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let repeat = Duration::from_millis(JOURNAL_REPEAT_MS);
        while said.front().is_some_and(|(when, _)| now.duration_since(*when) >= repeat) {
            said.pop_front();
        }
        if said.iter().any(|(_, earlier)| earlier == text) {
            return true;
        }
        if said.len() == JOURNAL_REPEATS_MAX {
            said.pop_front();
        }
        said.push_back((now, text.to_owned()));
        false
    }

    /// Writes a line if `level` is wanted; the text is made only then.
    pub fn write(&self, level: Level, text: impl FnOnce() -> String) {
        if level > self.level() || level == Level::Off {
            return;
        }
        if self.lines.try_send(Line { level, text: text() }).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How much is written now.
    pub fn level(&self) -> Level {
        LEVELS[usize::from(self.level.load(Ordering::Relaxed)) % LEVELS.len()].0
    }

    /// Writes more or less from now on.
    pub fn set_level(&self, level: Level) {
        self.level.store(level as u8, Ordering::Relaxed);
    }

    /// Lines lost since the start.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// The last errors.
    pub fn errors(&self) -> Errors {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

const LEVELS: [(Level, &str); 6] = [
    (Level::Off, "off"),
    (Level::Error, "error"),
    (Level::Warn, "warn"),
    (Level::Info, "info"),
    (Level::Debug, "debug"),
    (Level::Trace, "trace"),
];

/// The level called `name`, in nydusd's lower-case words.
pub fn level_named(name: &str) -> Option<Level> {
    LEVELS.into_iter().find(|entry| entry.1 == name).map(|entry| entry.0)
}

/// A level's word.
pub fn level_name(level: Level) -> &'static str {
    LEVELS[level as usize].1
}

impl Errors {
    fn push(&mut self, mut text: String) {
        let limit = JOURNAL_ERRORS_MAX_BYTES / 2;
        if text.len() > limit {
            text.truncate(text.floor_char_boundary(limit));
        }
        self.size_bytes += text.len();
        self.texts.push_back(text);
        while self.texts.len() > JOURNAL_ERRORS_MAX || self.size_bytes > JOURNAL_ERRORS_MAX_BYTES {
            let Some(oldest) = self.texts.pop_front() else { break };
            self.size_bytes -= oldest.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn level_decides_what_is_written_and_may_change() {
        let (journal, lines) = Journal::new(Level::Info);
        journal.write(Level::Debug, || unreachable!("text of an unwanted line"));
        journal.write(Level::Info, || "bound".into());
        journal.set_level(Level::Off);
        journal.error("gone");
        let written: Vec<_> = lines.try_iter().collect();
        assert_eq!(written, [Line { level: Level::Info, text: "bound".into() }]);
        assert_eq!(journal.errors().texts, ["gone"]);
    }

    #[test]
    fn a_full_journal_drops_and_counts_but_never_waits() {
        let (journal, _lines) = Journal::new(Level::Info);
        for _ in 0..JOURNAL_LINES_MAX + 7 {
            journal.write(Level::Info, String::new);
        }
        assert_eq!(journal.dropped(), 7);
    }

    #[test]
    fn last_errors_are_bounded_in_number_and_bytes() {
        let (journal, _lines) = Journal::new(Level::Off);
        for index in 0..JOURNAL_ERRORS_MAX + 3 {
            journal.error(format!("error {index}"));
        }
        let errors = journal.errors();
        assert_eq!(errors.texts.len(), JOURNAL_ERRORS_MAX);
        assert_eq!(errors.texts[0], "error 3");
        for _ in 0..10 {
            journal.error("ü".repeat(JOURNAL_ERRORS_MAX_BYTES));
        }
        let errors = journal.errors();
        assert!(errors.size_bytes <= JOURNAL_ERRORS_MAX_BYTES);
        assert_eq!(errors.size_bytes, errors.texts.iter().map(String::len).sum::<usize>());
    }

    #[test]
    fn an_error_that_repeats_is_said_once_in_a_while() {
        let (journal, lines) = Journal::new(Level::Error);
        for text in ["chunk 3", "chunk 3", "chunk 4", "chunk 3"] {
            journal.error(text);
        }
        let written: Vec<_> = lines.try_iter().map(|line| line.text).collect();
        assert_eq!(written, ["chunk 3", "chunk 4"]);
        let later = Instant::now() + Duration::from_millis(JOURNAL_REPEAT_MS);
        assert!(!journal.repeats("chunk 3", later));
        assert!(journal.repeats("chunk 3", later));
        for index in 0..JOURNAL_REPEATS_MAX {
            assert!(!journal.repeats(&format!("other {index}"), later));
        }
        assert_eq!(journal.said.lock().unwrap().len(), JOURNAL_REPEATS_MAX);
        assert!(!journal.repeats("chunk 3", later));
    }

    #[test]
    fn levels_have_the_names_nydusd_takes() {
        for name in ["off", "error", "warn", "info", "debug", "trace"] {
            assert_eq!(level_name(level_named(name).unwrap()), name);
        }
        assert_eq!(level_named("INFO"), None);
    }
}
