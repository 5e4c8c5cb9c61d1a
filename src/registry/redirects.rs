//! Where a registry sent us for a blob, remembered until it expires.
//!
//! Pure; one per core, bounded. Signed URLs say how long they hold; we believe four fifths of it,
//! so that no request is sent with a signature about to end. A location that was refused (401, 403)
//! or failed is forgotten by its user. Never holds an error.

use std::rc::Rc;

use crate::config as limits;
use crate::registry::origin::Location;

/// The remembered locations of one core; `T` is what the core keeps beside each.
#[derive(Debug)]
pub struct Redirects<T> {
    entries: Vec<Entry<T>>,
}

#[derive(Debug)]
struct Entry<T> {
    route: u64,
    source: usize,
    blob: String,
    expires_at_ns: u64,
    target: Rc<T>,
}

impl<T> Default for Redirects<T> {
    fn default() -> Self {
        Redirects { entries: Vec::with_capacity(limits::REGISTRY_REDIRECT_CACHE_COUNT_MAX) }
    }
}

impl<T> Redirects<T> {
    /// The location for a blob of a route's source, while it holds.
    pub fn find(&self, route: u64, source: usize, blob: &str, now_ns: u64) -> Option<Rc<T>> {
        let entry = self.entries.iter().find(|entry| entry.is(route, source, blob))?;
        (entry.expires_at_ns > now_ns).then(|| entry.target.clone())
    }

    /// Remembers a location; past the limit, the one that ends first makes room.
    pub fn remember(
        &mut self,
        (route, source, blob): (u64, usize, &str),
        target: Rc<T>,
        expires_at_ns: u64,
    ) {
        self.forget(route, source, blob);
        if self.entries.len() == limits::REGISTRY_REDIRECT_CACHE_COUNT_MAX {
            let first = (0..self.entries.len()).min_by_key(|at| self.entries[*at].expires_at_ns);
            first.map(|at| self.entries.swap_remove(at));
        }
        let blob = blob.to_string();
        self.entries.push(Entry { route, source, blob, expires_at_ns, target });
    }

    /// Forgets a blob's location.
    pub fn forget(&mut self, route: u64, source: usize, blob: &str) {
        self.entries.retain(|entry| !entry.is(route, source, blob));
    }
}

impl<T> Entry<T> {
    fn is(&self, route: u64, source: usize, blob: &str) -> bool {
        self.route == route && self.source == source && self.blob == blob
    }
}

/// How long a location may be used, by its query: `X-Amz-Expires` and its kin in seconds from now,
/// `Expires` as a moment, `se` (Azure) as a date; a minute if it says nothing.
pub fn life_ns(location: &Location, unix_now_s: u64) -> u64 {
    let relative = ["X-Amz-Expires", "X-Goog-Expires", "X-Expires"]
        .iter()
        .find_map(|name| location.query(name)?.parse::<u64>().ok());
    let until = |moment: u64| moment.saturating_sub(unix_now_s);
    let absolute = || location.query("Expires")?.parse::<u64>().ok().map(until);
    let dated = || {
        let date = location.query("se")?.replace("%3A", ":").replace("%3a", ":");
        crate::registry::timestamp::parse_rfc3339(&date).map(until)
    };
    match relative.or_else(absolute).or_else(dated) {
        Some(life_s) => {
            let life_ns = life_s.saturating_mul(limits::SECOND_NS) / 5 * 4;
            life_ns.min(limits::REGISTRY_REDIRECT_LIFE_NS_MAX)
        }
        None => limits::REGISTRY_REDIRECT_LIFE_DEFAULT_NS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_found_until_it_expires_or_is_forgotten() {
        let mut redirects = Redirects::default();
        redirects.remember((1, 0, "a"), Rc::new(7), 100);
        assert_eq!(redirects.find(1, 0, "a", 99).as_deref(), Some(&7));
        assert_eq!(redirects.find(1, 0, "a", 100), None);
        assert_eq!(redirects.find(1, 1, "a", 0), None);
        assert_eq!(redirects.find(2, 0, "a", 0), None);
        assert_eq!(redirects.find(1, 0, "b", 0), None);
        redirects.remember((1, 0, "a"), Rc::new(8), 200);
        assert_eq!(redirects.find(1, 0, "a", 150).as_deref(), Some(&8));
        redirects.forget(1, 0, "a");
        assert_eq!(redirects.find(1, 0, "a", 0), None);
    }

    #[test]
    fn the_cache_is_bounded_and_drops_what_ends_first() {
        let mut redirects = Redirects::default();
        let count = limits::REGISTRY_REDIRECT_CACHE_COUNT_MAX as u64;
        for n in 0..=count {
            redirects.remember((n, 0, "a"), Rc::new(n), 1000 + n);
        }
        assert_eq!(redirects.entries.len() as u64, count);
        assert_eq!(redirects.find(0, 0, "a", 0), None);
        assert!(redirects.find(count, 0, "a", 0).is_some());
    }

    #[test]
    fn the_query_says_how_long() {
        let second = limits::SECOND_NS;
        for (query, life_s) in [
            ("?X-Amz-Expires=100&Expires=5", 80),
            ("?x-goog-expires=50", 40),
            ("?Expires=1100&Signature=x", 80),
            ("?Expires=900", 0),
            ("?se=1970-01-01T00%3A18%3A20Z&sig=x", 80),
            ("?X-Amz-Expires=99999999999999999999", 60),
            ("?X-Amz-Expires=9999999999", 3600),
            ("", 60),
        ] {
            let location = Location::parse(&format!("https://h/p{query}")).unwrap();
            assert_eq!(life_ns(&location, 1000), life_s * second, "{query}");
        }
    }
}
