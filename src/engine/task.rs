//! Tasks: the table of futures a core runs, and the two queues of those that are ready.
//!
//! A task is identified by its place in the table. Scheduling a task that is queued already, or
//! that waits for something else, is harmless: leaves look again when they are polled.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;

use crate::config::BACKGROUND_SHARE;

/// Who a task works for: a reader that waits, or nobody yet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Lane {
    /// Somebody waits for it.
    Demand,
    /// Read-ahead, prefetch, housekeeping.
    Background,
}

/// A task's place in the table of its core.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TaskId(u32);

type Body = Pin<Box<dyn Future<Output = ()>>>;

struct Entry {
    /// Absent while the task is being polled and after it has ended.
    body: Option<Body>,
    lane: Lane,
    is_queued: bool,
}

/// The tasks of one core.
#[derive(Default)]
pub struct Tasks {
    entries: Vec<Entry>,
    demand: VecDeque<TaskId>,
    background: VecDeque<TaskId>,
    current: Option<TaskId>,
    live_count: usize,
    demand_streak: usize,
}

impl Tasks {
    /// Adds a task and makes it ready. Queues grow here, never later.
    pub fn spawn(&mut self, lane: Lane, body: Body) -> TaskId {
        let id = TaskId(self.entries.len() as u32);
        self.entries.push(Entry { body: Some(body), lane, is_queued: false });
        self.live_count += 1;
        let room = self.entries.len();
        self.demand.reserve(room.saturating_sub(self.demand.len()));
        self.background.reserve(room.saturating_sub(self.background.len()));
        self.schedule(id);
        id
    }

    /// Makes a task ready.
    pub fn schedule(&mut self, id: TaskId) {
        let entry = &mut self.entries[id.0 as usize];
        if entry.is_queued {
            return;
        }
        entry.is_queued = true;
        match entry.lane {
            Lane::Demand => self.demand.push_back(id),
            Lane::Background => self.background.push_back(id),
        }
    }

    /// Takes the next ready task out for polling; demand first, background one time in eight.
    pub fn next(&mut self) -> Option<(TaskId, Body)> {
        loop {
            let starved = self.demand_streak >= BACKGROUND_SHARE && !self.background.is_empty();
            let id = match (starved, self.demand.pop_front()) {
                (false, Some(id)) => {
                    self.demand_streak += 1;
                    id
                }
                (_, demand) => {
                    if let Some(id) = demand {
                        self.demand.push_front(id);
                    }
                    self.demand_streak = 0;
                    self.background.pop_front()?
                }
            };
            let entry = &mut self.entries[id.0 as usize];
            entry.is_queued = false;
            if let Some(body) = entry.body.take() {
                self.current = Some(id);
                return Some((id, body));
            }
        }
    }

    /// Puts a polled task back, or ends it with `None`.
    pub fn put_back(&mut self, id: TaskId, body: Option<Body>) {
        self.current = None;
        if body.is_none() {
            self.live_count -= 1;
        }
        self.entries[id.0 as usize].body = body;
    }

    /// The task being polled. Leaves may only be polled by a task.
    pub fn current(&self) -> TaskId {
        self.current.expect("a leaf is polled inside a task")
    }

    /// Whether a task is ready.
    pub fn is_ready(&self) -> bool {
        !self.demand.is_empty() || !self.background.is_empty()
    }

    /// Tasks that have not ended.
    pub fn live_count(&self) -> usize {
        self.live_count
    }

    /// Takes all bodies out, so that they can be dropped while the core is still whole.
    pub fn take_bodies(&mut self) -> Vec<Body> {
        self.live_count = 0;
        self.entries.iter_mut().filter_map(|entry| entry.body.take()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn polled(tasks: &mut Tasks, count: usize) -> Vec<TaskId> {
        (0..count)
            .map(|_| {
                let (id, body) = tasks.next().unwrap();
                tasks.put_back(id, Some(body));
                tasks.schedule(id);
                id
            })
            .collect()
    }

    #[test]
    fn background_gets_one_turn_in_nine_when_demand_is_busy() {
        let mut tasks = Tasks::default();
        let demand = tasks.spawn(Lane::Demand, Box::pin(async {}));
        let background = tasks.spawn(Lane::Background, Box::pin(async {}));
        let order = polled(&mut tasks, 18);
        assert_eq!(order.iter().filter(|&&id| id == background).count(), 2);
        assert_eq!(order.iter().filter(|&&id| id == demand).count(), 16);
    }

    #[test]
    fn scheduling_twice_queues_once() {
        let mut tasks = Tasks::default();
        let id = tasks.spawn(Lane::Demand, Box::pin(async {}));
        tasks.schedule(id);
        assert!(tasks.next().is_some());
        assert!(tasks.next().is_none());
    }
}
