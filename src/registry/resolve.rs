//! Names to addresses, asked of the system's resolver on a thread for such and remembered.
//!
//! Owns the process-wide cache: a minute for answers, a second for failures, bounded in names. A
//! name is asked for once at a time, however many need it and however long it takes. Old addresses
//! are used on while they are renewed, and when they could not be: an address that worked is better
//! than none.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use crate::config as limits;
use crate::engine::Core;
use crate::error::{Error, Result};

/// Who knows the addresses of a name; may block for as long as it likes.
pub type Resolver = dyn Fn(&str) -> Result<Vec<IpAddr>> + Send + Sync;

/// What is known about names.
pub struct Names {
    known: Mutex<HashMap<String, Known>>,
    resolver: Box<Resolver>,
}

/// What is known about a name.
#[derive(Default)]
struct Known {
    addresses: Vec<IpAddr>,
    until_ns: u64,
    failure: Option<Error>,
    /// Since when it is being asked for.
    asked_ns: Option<u64>,
}

/// What somebody who needs addresses should do.
enum Turn {
    Use(Vec<IpAddr>),
    Fail(Error),
    /// Ask, and wait for the answer until then.
    Ask(u64),
    /// Somebody has asked.
    Wait,
}

impl Names {
    /// Asks the system.
    pub fn of_system() -> Arc<Names> {
        Names::of(Box::new(ask_system))
    }

    /// Asks this one.
    pub fn of(resolver: Box<Resolver>) -> Arc<Names> {
        Arc::new(Names { known: Mutex::default(), resolver })
    }

    /// The addresses of `host`, at most RESOLVE_ADDRESS_COUNT_MAX, at least one.
    pub async fn resolve(
        self: &Arc<Self>,
        core: &Core,
        host: &str,
        port: u16,
        deadline_ns: u64,
    ) -> Result<Vec<SocketAddr>> {
        if let Ok(address) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        let deadline_ns = deadline_ns.min(core.now() + limits::RESOLVE_TIMEOUT_NS);
        loop {
            match self.turn(host, core.now()) {
                Turn::Use(addresses) => {
                    return Ok(addresses.iter().map(|ip| SocketAddr::new(*ip, port)).collect());
                }
                Turn::Fail(error) => return Err(error),
                Turn::Ask(until_ns) => self.ask(core, host, until_ns.min(deadline_ns)).await,
                Turn::Wait if core.now() >= deadline_ns => {
                    let text = format!("no answer from the resolver for {host}");
                    return Err(Error::unavailable(text));
                }
                Turn::Wait => {
                    // The sleep ends by its own deadline, which is its purpose.
                    let _ = core.sleep(limits::RESOLVE_WAIT_STEP_NS).await;
                }
            }
        }
    }

    fn turn(&self, host: &str, now_ns: u64) -> Turn {
        let mut names = self.lock();
        if names.len() >= limits::RESOLVE_NAME_COUNT_MAX && !names.contains_key(host) {
            names.retain(|_, known| known.asked_ns.is_some());
        }
        let known = names.entry(host.to_string()).or_default();
        match (&known.failure, known.asked_ns) {
            (Some(error), _) if known.until_ns > now_ns && known.addresses.is_empty() => {
                Turn::Fail(error.clone())
            }
            _ if known.until_ns > now_ns => Turn::Use(known.addresses.clone()),
            (_, None) => {
                known.asked_ns = Some(now_ns);
                match known.addresses.is_empty() {
                    true => Turn::Ask(u64::MAX),
                    false => Turn::Ask(now_ns + limits::RESOLVE_RENEWAL_WAIT_NS),
                }
            }
            (_, Some(asked_ns)) => {
                let has_waited = now_ns >= asked_ns + limits::RESOLVE_RENEWAL_WAIT_NS;
                match has_waited && !known.addresses.is_empty() {
                    true => Turn::Use(known.addresses.clone()),
                    false => Turn::Wait,
                }
            }
        }
    }

    /// Has the resolver asked. Its answer counts whenever it comes, waited for or not.
    async fn ask(self: &Arc<Self>, core: &Core, host: &str, until_ns: u64) {
        let (names, name) = (Arc::clone(self), host.to_string());
        let (asked_ns, clock) = (core.now(), core.clock());
        let asked = core.ask(move || {
            let answer = (names.resolver)(&name);
            names.learn(&name, answer, clock().max(asked_ns));
        });
        match asked {
            Ok(asked) => {
                // What was learned is looked up.
                let _ = within(core, until_ns, asked).await;
            }
            Err(error) => self.learn(host, Err(error), asked_ns),
        }
    }

    fn learn(&self, host: &str, answer: Result<Vec<IpAddr>>, now_ns: u64) {
        let mut names = self.lock();
        let known = names.entry(host.to_string()).or_default();
        known.asked_ns = None;
        match answer {
            Ok(addresses) => {
                (known.addresses, known.failure) = (addresses, None);
                known.until_ns = now_ns + limits::RESOLVE_LIFE_NS;
            }
            Err(error) => {
                known.failure = Some(error);
                known.until_ns = now_ns + limits::RESOLVE_FAILURE_LIFE_NS;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Names").finish_non_exhaustive()
    }
}

/// Waits for work on another thread until a deadline; the work itself goes on to its end.
pub async fn within<T>(core: &Core, deadline_ns: u64, work: impl Future<Output = T>) -> Option<T> {
    let mut work = pin!(work);
    let mut timer = pin!(core.sleep_until(deadline_ns));
    let mut is_late = false;
    std::future::poll_fn(move |context| {
        if let Poll::Ready(value) = work.as_mut().poll(context) {
            return Poll::Ready(Some(value));
        }
        is_late = is_late || timer.as_mut().poll(context).is_ready();
        if is_late { Poll::Ready(None) } else { Poll::Pending }
    })
    .await
}

fn ask_system(name: &str) -> Result<Vec<IpAddr>> {
    let found = (name, 0).to_socket_addrs().map_err(|error| {
        Error::unavailable(format!("cannot resolve {name}: {error}; check the name and DNS"))
    })?;
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in found.map(|address| address.ip()) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses.truncate(limits::RESOLVE_ADDRESS_COUNT_MAX);
    match addresses.is_empty() {
        true => Err(Error::unavailable(format!("{name} has no address"))),
        false => Ok(addresses),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::config::SECOND_NS;
    use crate::engine::{Lane, block_on};

    const OLD: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    /// Knows the first name it is asked for; then says nothing while the sender lives.
    fn hanging() -> (crossbeam_channel::Sender<()>, Arc<AtomicUsize>, Arc<Names>) {
        let (hold, held) = crossbeam_channel::bounded::<()>(0);
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let names = Names::of(Box::new(move |name| match count.fetch_add(1, Ordering::SeqCst) {
            0 if name == "known" => Ok(vec![OLD]),
            _ => {
                let _ = held.recv();
                Err(Error::unavailable("late"))
            }
        }));
        (hold, asked, names)
    }

    #[test]
    fn a_resolver_that_hangs_is_asked_once_for_a_name_and_holds_up_no_other_work() {
        let (hold, asked, names) = hanging();
        block_on(|core| async move {
            let (deadline_ns, failed) = (core.now() + SECOND_NS / 10, Rc::new(Cell::new(0)));
            for number in 0..32 {
                let (own, names, failed) = (core.clone(), Arc::clone(&names), Rc::clone(&failed));
                core.spawn(Lane::Demand, async move {
                    let host = ["one", "two"][number % 2];
                    let error = names.resolve(&own, host, 1, deadline_ns).await.unwrap_err();
                    assert!(error.to_string().contains("no answer"), "{error}");
                    failed.set(failed.get() + 1);
                });
            }
            while failed.get() < 32 {
                core.yield_now().await;
            }
            let worked = within(&core, core.now() + 10 * SECOND_NS, core.offload(|| 6 * 7)).await;
            assert_eq!(worked, Some(42));
        })
        .unwrap();
        assert_eq!(asked.load(Ordering::SeqCst), 2);
        drop(hold);
    }

    #[test]
    fn old_addresses_are_used_while_the_resolver_says_nothing() {
        let (hold, asked, names) = hanging();
        block_on(|core| async move {
            let old = Ok(vec![SocketAddr::new(OLD, 1)]);
            let resolve = || names.resolve(&core, "known", 1, core.now() + 10 * SECOND_NS);
            assert_eq!(resolve().await, old);
            assert_eq!(resolve().await, old);
            names.lock().get_mut("known").unwrap().until_ns = 0;
            for _ in 0..3 {
                assert_eq!(resolve().await, old);
            }
            names.learn("known", Err(Error::unavailable("no")), core.now());
            assert_eq!(resolve().await, old, "nor when it says no");
        })
        .unwrap();
        assert_eq!(asked.load(Ordering::SeqCst), 2);
        drop(hold);
    }

    #[test]
    fn a_failure_is_remembered_for_a_moment() {
        let names = Names::of_system();
        assert!(matches!(names.turn("name", 5), Turn::Ask(u64::MAX)));
        assert!(matches!(names.turn("name", 5), Turn::Wait));
        names.learn("name", Err(Error::unavailable("no")), 5);
        assert!(matches!(names.turn("name", 6), Turn::Fail(_)));
        assert!(matches!(names.turn("name", 5 + limits::RESOLVE_FAILURE_LIFE_NS), Turn::Ask(_)));
    }
}
