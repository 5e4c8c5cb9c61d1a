//! The start of a lazily loaded image: what to do when the daemon or the registry fails there, how
//! it went, and how often it went how.
//!
//! Every start is told to the daemon, whose statistics show them all. A daemon that cannot be told
//! hears of it with the next start, so one that was away learns what it missed.

use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// What to do when the daemon or the registry fails at the start of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Try again until it works or the time is over.
    #[default]
    Wait,
    /// Refuse at once.
    Fail,
    /// Try again, and then bring all of the image to this node before anybody uses it: what failed
    /// once may fail again under a running container.
    Full,
}

/// How an image came to be usable, or did not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// At the first try.
    Lazy,
    /// Later; why it took longer.
    Waited(String),
    /// Later, and all of it is here now; why.
    Full(String),
    /// Not yet; why.
    Failed(String, Instant),
}

/// Tells the daemon how many starts went how.
pub type Tell = dyn Fn(&Value) -> Result<()> + Send + Sync;

/// Counts starts and tells the daemon.
pub struct Starts {
    counts: Mutex<Counts>,
    tell: Box<Tell>,
}

/// In the order of [`OUTCOMES`].
#[derive(Default)]
struct Counts {
    all: [u64; OUTCOMES.len()],
    told: [u64; OUTCOMES.len()],
    /// Somebody does, and will tell all that is new when it is done.
    is_telling: bool,
}

/// What the daemon calls them.
const OUTCOMES: [&str; 4] = ["lazy", "waited", "full", "failed"];

impl FromStr for Policy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "wait" => Ok(Policy::Wait),
            "fail" => Ok(Policy::Fail),
            "full" => Ok(Policy::Full),
            _ => Err(Error::Malformed(format!("policy {text:?}: write wait, fail or full"))),
        }
    }
}

impl std::fmt::Display for Start {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Start::Lazy => f.write_str("lazy"),
            Start::Waited(why) => write!(f, "lazy, after waiting: {why}"),
            Start::Full(why) => write!(f, "full: {why}"),
            Start::Failed(why, _) => write!(f, "failed: {why}"),
        }
    }
}

impl Start {
    fn outcome(&self) -> usize {
        match self {
            Start::Lazy => 0,
            Start::Waited(_) => 1,
            Start::Full(_) => 2,
            Start::Failed(..) => 3,
        }
    }
}

impl Starts {
    /// None yet.
    pub fn new(tell: Box<Tell>) -> Starts {
        Starts { counts: Mutex::default(), tell }
    }

    /// Counts one and tells the daemon of all it does not know, unless somebody is at it. Blocks as
    /// long as it takes to answer, which holds up nobody else; a daemon that does not is told next
    /// time.
    pub fn note(&self, start: &Start) {
        let mut counts = self.lock();
        counts.all[start.outcome()] += 1;
        // Two at once would tell the same twice.
        if std::mem::replace(&mut counts.is_telling, true) {
            return;
        }
        while counts.all != counts.told {
            let (all, news) = (counts.all, counts.news());
            drop(counts);
            let told = (self.tell)(&news);
            counts = self.lock();
            match told {
                Ok(()) => counts.told = all,
                Err(_) => break,
            }
        }
        counts.is_telling = false;
    }

    /// All of them since this process began, for people.
    pub fn summary(&self) -> String {
        let all = self.lock().all;
        let parts = OUTCOMES.iter().zip(all).map(|(name, count)| format!("{count} {name}"));
        parts.collect::<Vec<_>>().join(", ")
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counts {
    fn news(&self) -> Value {
        let counts = OUTCOMES.iter().zip(self.all.iter().zip(self.told));
        let news = counts.filter(|(_, (all, told))| *all > told);
        let news: Map<String, Value> =
            news.map(|(name, (all, told))| ((*name).to_owned(), (all - told).into())).collect();
        Value::Object(news)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_daemon_that_was_away_hears_what_it_missed() {
        let heard: Arc<Mutex<Vec<Value>>> = Arc::default();
        let (ear, away) = (heard.clone(), Arc::new(Mutex::new(true)));
        let is_away = away.clone();
        let starts = Starts::new(Box::new(move |news| match *is_away.lock().unwrap() {
            true => Err(Error::unavailable("no daemon")),
            false => {
                ear.lock().unwrap().push(news.clone());
                Ok(())
            }
        }));
        let failed = Start::Failed("no daemon".to_owned(), Instant::now());
        starts.note(&failed);
        starts.note(&failed);
        *away.lock().unwrap() = false;
        starts.note(&Start::Waited("no daemon".to_owned()));
        starts.note(&Start::Lazy);
        let heard = heard.lock().unwrap();
        assert_eq!(heard[0], serde_json::json!({"failed": 2, "waited": 1}));
        assert_eq!(heard[1], serde_json::json!({"lazy": 1}));
        assert_eq!(starts.summary(), "1 lazy, 1 waited, 0 full, 2 failed");
    }

    #[test]
    fn a_daemon_that_does_not_answer_holds_up_one_start_and_no_other() {
        use std::sync::mpsc::channel;
        let ((said, heard), (answer, answers)) = (channel(), channel::<()>());
        let answers = Mutex::new(answers);
        let starts = Arc::new(Starts::new(Box::new(move |news| {
            said.send(news.clone()).unwrap();
            answers.lock().unwrap().recv().map_err(|_| Error::unavailable("no daemon"))
        })));
        let first = starts.clone();
        let first = std::thread::spawn(move || first.note(&Start::Lazy));
        assert_eq!(heard.recv().unwrap(), serde_json::json!({"lazy": 1}));
        let (second, (done, is_done)) = (starts.clone(), channel());
        let second = std::thread::spawn(move || {
            second.note(&Start::Waited("no daemon".to_owned()));
            done.send(second.summary()).unwrap();
        });
        let patience = std::time::Duration::from_secs(10);
        let summary = is_done.recv_timeout(patience).expect("it did not wait for the first");
        assert_eq!(summary, "1 lazy, 1 waited, 0 full, 0 failed");
        answer.send(()).unwrap();
        assert_eq!(heard.recv().unwrap(), serde_json::json!({"waited": 1}), "and none is lost");
        answer.send(()).unwrap();
        first.join().unwrap();
        second.join().unwrap();
    }
}
