//! Images that are known to come: registered before a restart, and not yet again.
//!
//! The door serves while a restart goes on, so the kernel may ask for a cookie whose image has not
//! been read back. Such a question waits; and what somebody waits for is read back first.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How many images of each domain are still to come. Any thread may ask.
#[derive(Debug, Default)]
pub struct Awaited {
    domains: Mutex<HashMap<String, Due>>,
    /// The sum over all domains: after the restart a question costs one load.
    count: AtomicUsize,
    news: Condvar,
}

#[derive(Debug, Default)]
struct Due {
    images: usize,
    is_urgent: bool,
}

impl Awaited {
    /// One more image of a domain is to come.
    pub fn expect(&self, domain_id: &str) {
        self.lock().entry(domain_id.to_owned()).or_default().images += 1;
        self.count.fetch_add(1, Ordering::Release);
    }

    /// An image that was expected has come, or will not.
    pub fn settle(&self, domain_id: &str) {
        let mut domains = self.lock();
        if let Some(due) = domains.get_mut(domain_id) {
            due.images -= 1;
            if due.images == 0 {
                domains.remove(domain_id);
            }
            self.count.fetch_sub(1, Ordering::Release);
        }
        drop(domains);
        self.news.notify_all();
    }

    /// Whether images of a domain are to come; the domain then goes first.
    pub fn is_due(&self, domain_id: &str) -> bool {
        // Acquire pairs with settle(): whoever sees that all have come finds them registered.
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let mut domains = self.lock();
        let due = domains.get_mut(domain_id);
        due.map(|due| due.is_urgent = true).is_some()
    }

    /// A domain that somebody waits for.
    pub fn urgent(&self) -> Option<String> {
        let domains = self.lock();
        domains.iter().find(|(_, due)| due.is_urgent).map(|(domain, _)| domain.clone())
    }

    /// Waits until no image of a domain is to come, at most so long.
    pub fn wait(&self, domain_id: &str, patience: Duration) {
        if self.is_due(domain_id) {
            let is_due = |domains: &mut HashMap<String, Due>| domains.contains_key(domain_id);
            let _ = self.news.wait_timeout_while(self.lock(), patience, is_due);
        }
    }

    /// Nothing in here panics half-way through a change.
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Due>> {
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_domain_is_due_until_its_last_image_has_settled() {
        let awaited = Awaited::default();
        assert!(!awaited.is_due("a"));
        for domain in ["a", "a", "b"] {
            awaited.expect(domain);
        }
        assert_eq!(awaited.urgent(), None);
        assert!(awaited.is_due("a") && !awaited.is_due("c"));
        assert_eq!(awaited.urgent().as_deref(), Some("a"));
        awaited.settle("a");
        assert!(awaited.is_due("a"));
        awaited.settle("a");
        assert!(!awaited.is_due("a") && awaited.is_due("b"));
        awaited.settle("b");
        awaited.settle("b");
        assert!(!awaited.is_due("b"));
    }

    #[test]
    fn waiting_ends_with_the_last_image_or_with_patience() {
        let awaited = Arc::new(Awaited::default());
        awaited.wait("a", Duration::from_secs(60));
        awaited.expect("a");
        awaited.wait("a", Duration::from_millis(1));
        let other = Arc::clone(&awaited);
        let waiting = std::thread::spawn(move || other.wait("a", Duration::from_secs(60)));
        awaited.settle("a");
        waiting.join().unwrap();
    }
}
