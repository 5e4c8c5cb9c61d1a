//! Names to addresses, asked of the system's resolver on a helper thread and remembered.
//!
//! Owns the process-wide cache: a minute for answers, a second for failures, bounded in names. An
//! answer that could not be renewed is used on: an address that worked is better than none.

use std::collections::HashMap;
use std::future::Future;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use crate::config as limits;
use crate::engine::Core;
use crate::error::{Error, Result};

/// What is known about names.
#[derive(Debug, Default)]
pub struct Names {
    known: Mutex<HashMap<String, Known>>,
}

#[derive(Clone, Debug)]
struct Known {
    addresses: Vec<IpAddr>,
    until_ns: u64,
    failure: Option<Error>,
}

impl Names {
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
        let now_ns = core.now();
        let known = self.lock().get(host).cloned();
        let known = match known {
            Some(known) if known.until_ns > now_ns => known,
            _ => self.ask(core, host, deadline_ns).await?,
        };
        match known.failure {
            Some(error) if known.addresses.is_empty() => Err(error),
            _ => Ok(known.addresses.iter().map(|ip| SocketAddr::new(*ip, port)).collect()),
        }
    }

    async fn ask(self: &Arc<Self>, core: &Core, host: &str, deadline_ns: u64) -> Result<Known> {
        let deadline_ns = deadline_ns.min(core.now() + limits::RESOLVE_TIMEOUT_NS);
        let name = host.to_string();
        let answer = within(core, deadline_ns, core.offload(move || ask_system(&name))).await;
        let answer = match answer {
            Some(answer) => answer,
            None => Err(Error::unavailable(format!("no answer from the resolver for {host}"))),
        };
        let now_ns = core.now();
        let mut names = self.lock();
        if names.len() >= limits::RESOLVE_NAME_COUNT_MAX && !names.contains_key(host) {
            names.clear();
        }
        let known = match answer {
            Ok(addresses) => {
                Known { addresses, until_ns: now_ns + limits::RESOLVE_LIFE_NS, failure: None }
            }
            Err(error) => Known {
                addresses: names.remove(host).map(|old| old.addresses).unwrap_or_default(),
                until_ns: now_ns + limits::RESOLVE_FAILURE_LIFE_NS,
                failure: Some(error),
            },
        };
        names.insert(host.to_string(), known.clone());
        Ok(known)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for work on a helper thread until a deadline; the work itself goes on to its end.
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
