//! The daemon's life: INIT, READY, RUNNING, STOPPED, as nydusd has it.
//!
//! A transition is decided first, then its work is done with no lock held, then the new state is
//! shown. While the work runs every other event is refused, so a start cannot overtake a takeover.

use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// Where the daemon is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Waits for a takeover: another daemon has the device, or had it when it died.
    Init,
    /// Has what it needs, serves nobody.
    Ready,
    /// Serves.
    Running,
    /// Going down.
    Stopped,
}

/// What may happen to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The device was opened at start-up.
    Mount,
    /// Begin to serve.
    Start,
    /// Take device and registrations from the supervisor.
    Takeover,
    /// Stop serving, keep what was registered.
    Stop,
    /// Go down.
    Exit,
}

/// Why an event did nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It has no meaning in this state.
    Unexpected(Event),
    /// Another transition is under way.
    Busy,
    /// Its work failed; the state is what it was.
    Failed(Error),
}

/// The one place that knows the state.
#[derive(Debug)]
pub struct StateMachine {
    inner: Mutex<Inner>,
}

#[derive(Clone, Copy, Debug)]
struct Inner {
    state: State,
    moving: bool,
}

impl State {
    /// As the API shows it.
    pub fn name(self) -> &'static str {
        match self {
            State::Init => "INIT",
            State::Ready => "READY",
            State::Running => "RUNNING",
            State::Stopped => "STOPPED",
        }
    }

    /// The state `event` leads to, if it has a meaning here.
    pub fn next(self, event: Event) -> Option<State> {
        match (self, event) {
            (State::Init, Event::Mount | Event::Takeover) => Some(State::Ready),
            (State::Ready, Event::Start) => Some(State::Running),
            (State::Running, Event::Stop) => Some(State::Ready),
            (State::Init | State::Ready, Event::Stop) => Some(State::Stopped),
            (State::Init | State::Ready | State::Running, Event::Exit) => Some(State::Stopped),
            _ => None,
        }
    }
}

impl StateMachine {
    /// Begins in INIT.
    pub fn new() -> Self {
        Self { inner: Mutex::new(Inner { state: State::Init, moving: false }) }
    }

    /// The state as last shown.
    pub fn state(&self) -> State {
        self.lock().state
    }

    /// Lets `event` happen: `work` runs with no lock held, and the state changes if it succeeds.
    pub fn apply(
        &self,
        event: Event,
        work: impl FnOnce() -> Result<()>,
    ) -> std::result::Result<(), Refused> {
        let next = {
            let mut inner = self.lock();
            let next = inner.state.next(event).ok_or(Refused::Unexpected(event))?;
            if inner.moving {
                return Err(Refused::Busy);
            }
            inner.moving = true;
            next
        };
        let outcome = work();
        let mut inner = self.lock();
        inner.moving = false;
        match outcome {
            Ok(()) => {
                inner.state = next;
                Ok(())
            }
            Err(error) => Err(Refused::Failed(error)),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for StateMachine {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Event::*;
    use State::*;

    #[test]
    fn only_the_listed_transitions_exist() {
        let listed = [
            (Init, Mount, Ready),
            (Init, Takeover, Ready),
            (Init, Stop, Stopped),
            (Init, Exit, Stopped),
            (Ready, Start, Running),
            (Ready, Stop, Stopped),
            (Ready, Exit, Stopped),
            (Running, Stop, Ready),
            (Running, Exit, Stopped),
        ];
        for state in [Init, Ready, Running, Stopped] {
            for event in [Mount, Start, Takeover, Stop, Exit] {
                let expected = listed.iter().find(|it| it.0 == state && it.1 == event);
                assert_eq!(state.next(event), expected.map(|it| it.2), "{state:?} {event:?}");
            }
        }
    }

    #[test]
    fn failed_work_leaves_the_state() {
        let machine = StateMachine::new();
        let refused = machine.apply(Takeover, || Err(Error::Shutdown));
        assert_eq!(refused, Err(Refused::Failed(Error::Shutdown)));
        assert_eq!(machine.state(), Init);
        machine.apply(Takeover, || Ok(())).unwrap();
        assert_eq!(machine.state(), Ready);
    }

    #[test]
    fn a_transition_under_way_refuses_others_and_shows_the_old_state() {
        let machine = StateMachine::new();
        machine
            .apply(Mount, || {
                assert_eq!(machine.apply(Exit, || Ok(())), Err(Refused::Busy));
                assert_eq!(machine.apply(Start, || Ok(())), Err(Refused::Unexpected(Start)));
                assert_eq!(machine.state(), Init);
                Ok(())
            })
            .unwrap();
        assert_eq!(machine.state(), Ready);
    }
}
