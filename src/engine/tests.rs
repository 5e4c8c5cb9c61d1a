//! The engine over both drivers: order, cancellation, deadlines, leases, determinism.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::rc::Rc;
use std::sync::Arc;

use super::mesh::{Wake, mailbox};
use super::simulated::{
    SimulatedCalls, SimulatedDriver, SimulatedEvent, SimulatedOperation, SimulatedPort,
};
use super::sync::{Gate, Notify, Permits, Queue};
use super::*;
use crate::config::{ASKER_QUEUE, ASKER_THREADS, MILLISECOND_NS};
use crate::error::Error;

#[test]
fn bytes_cross_a_real_socket_and_the_lease_comes_home() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = [0; 5];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
    });
    block_on(move |core| async move {
        let fd = core.socket(&address).unwrap();
        core.connect(fd, address).by(core.now() + 1000 * MILLISECOND_NS).await.unwrap();
        let mut lease = core.lease(Class::Wire).await;
        lease[..5].copy_from_slice(b"hello");
        let (lease, sent) = core.send(fd, lease, 0..5).await;
        assert_eq!(sent, Ok(5));
        let (lease, received) = core.recv(fd, lease, 100..200).await;
        assert_eq!(received, Ok(5));
        assert_eq!(&lease[100..105], b"hello");
        let (lease, closed) = core.recv(fd, lease, 0..100).await;
        assert_eq!(closed, Ok(0));
        core.close(fd);
        drop(lease);
        assert!(core.arena().is_whole());
    })
    .unwrap();
    server.join().unwrap();
}

#[test]
fn deadline_cancels_and_gives_the_lease_back() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    block_on(move |core| async move {
        let fd = core.socket(&address).unwrap();
        core.connect(fd, address).await.unwrap();
        let lease = core.lease(Class::Wire).await;
        let deadline_ns = core.now() + 5 * MILLISECOND_NS;
        let (lease, result) = core.recv(fd, lease, 0..10).by(deadline_ns).await;
        assert!(matches!(result, Err(Error::Deadline(_))), "{result:?}");
        assert!(core.now() >= deadline_ns);
        drop(lease);
        assert!(core.arena().is_whole());
        core.close(fd);
    })
    .unwrap();
    drop(listener);
}

#[test]
fn questions_without_an_answer_are_refused_in_the_end_and_hold_up_no_work() {
    let (hold, held) = crossbeam_channel::bounded::<()>(0);
    block_on(|core| async move {
        let ask = |_| {
            let held = held.clone();
            core.ask(move || held.recv().is_ok()).is_ok()
        };
        let waiting = (0..2 * ASKER_QUEUE).map(ask).take_while(|is_taken| *is_taken).count();
        assert!((ASKER_QUEUE..=ASKER_QUEUE + ASKER_THREADS).contains(&waiting), "{waiting}");
        assert_eq!(core.offload(|| 6 * 7).await, 42);
    })
    .unwrap();
    // The engine is gone; they still wait.
    drop(hold);
}

#[test]
fn mail_wakes_a_sleeping_core_and_offloaded_work_returns() {
    block_on(|core| async move {
        let (sender, receiver) = mailbox::<u32>(core.wake(), 8);
        let thread = std::thread::spawn(move || {
            (0..100).for_each(|n| {
                while sender.send(n).is_err() {
                    std::thread::yield_now();
                }
            })
        });
        for expected in 0..100 {
            assert_eq!(receiver.receive(&core).await, Some(expected));
        }
        assert_eq!(receiver.receive(&core).await, None);
        thread.join().unwrap();
        assert_eq!(core.offload(|| 6 * 7).await, 42);
    })
    .unwrap();
}

#[test]
fn permits_go_round_in_order_and_survive_a_dropped_waiter() {
    block_on(|core| async move {
        let permits = Rc::new(Permits::new(1));
        let order = Rc::new(RefCell::new(Vec::new()));
        let queue = Rc::new(Queue::new(4));
        let held = permits.acquire(&core).await;
        for name in 0..3 {
            let (permits, order, queue, own) =
                (permits.clone(), order.clone(), queue.clone(), core.clone());
            core.spawn(Lane::Demand, async move {
                let _permit = permits.acquire(&own).await;
                order.borrow_mut().push(name);
                queue.push(&own, name).unwrap();
            });
        }
        core.yield_now().await;
        drop(held);
        for _ in 0..3 {
            queue.pop(&core, |_| true).await;
        }
        assert_eq!(*order.borrow(), [0, 1, 2]);
        assert_eq!(permits.free_count(), 1);
    })
    .unwrap();
}

#[test]
fn one_who_took_an_item_unbidden_is_not_woken_for_another_while_busy() {
    block_on(|core| async move {
        let (queue, news, hold) =
            (Rc::new(Queue::new(4)), Rc::new(Notify::default()), Rc::new(Notify::default()));
        let taken = Rc::new(RefCell::new(Vec::new()));
        // They wait in this order; the second is still on the list of news that came too late.
        for name in 0..3 {
            let (queue, news, hold) = (queue.clone(), news.clone(), hold.clone());
            let (taken, own) = (taken.clone(), core.clone());
            core.spawn(Lane::Demand, async move {
                if name == 1 {
                    assert!(!news.wait(&own).by(own.now()).await);
                }
                let item = queue.pop(&own, |_| true).await;
                taken.borrow_mut().push(item);
                hold.wait(&own).await;
            });
            core.sleep(MILLISECOND_NS).await.unwrap();
        }
        news.wake_all(&core);
        for item in 0..3 {
            queue.push(&core, item).unwrap();
            core.sleep(MILLISECOND_NS).await.unwrap();
        }
        assert_eq!(*taken.borrow(), [0, 1, 2]);
        hold.wake_all(&core);
    })
    .unwrap();
}

#[test]
fn closed_gate_lets_nobody_in_and_waits_for_those_inside() {
    block_on(|core| async move {
        let gate = Rc::new(Gate::default());
        let visit = gate.enter(&core).unwrap();
        assert!(!gate.close(&core, core.now() + MILLISECOND_NS).await);
        assert!(gate.enter(&core).is_none());
        drop(visit);
        assert!(gate.close(&core, core.now() + MILLISECOND_NS).await);
    })
    .unwrap();
}

/// Two cores in one thread under a seeded world that reorders, fails, delays and shortens.
struct TwoCores {
    port: Rc<RefCell<SimulatedPort>>,
    cores: Vec<Core>,
    pending: Vec<(CoreId, Token, SimulatedOperation)>,
    trace: Vec<String>,
    state: u64,
}

impl TwoCores {
    fn new(seed: u64) -> Self {
        let port = Rc::new(RefCell::new(SimulatedPort::default()));
        let calls: SimulatedCalls = Rc::new(RefCell::new(|_, _: Call<'_>| Ok(7)));
        let cores = (0..2).map(|index| {
            let id = CoreId(index);
            let driver = SimulatedDriver::new(id, port.clone(), calls.clone());
            let parts = Parts {
                driver: Driver::Simulated(driver),
                wake: Wake::new().unwrap(),
                helpers: None,
                seed,
                spin_ns: 0,
            };
            Core::new(id, parts).unwrap()
        });
        let cores = cores.collect();
        TwoCores { port, cores, pending: Vec::new(), trace: Vec::new(), state: seed | 1 }
    }

    fn random(&mut self, below: usize) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state % below as u64) as usize
    }

    /// One step: some core runs, or some operation completes, or time passes.
    fn step(&mut self) {
        let core = self.random(2);
        self.cores[core].turn();
        let mut events = std::mem::take(&mut self.port.borrow_mut().events);
        while let Some(event) = events.pop_front() {
            self.trace.push(format!("{event:?}"));
            match event {
                SimulatedEvent::Submitted(core, token, operation) => {
                    self.pending.push((core, token, operation));
                }
                SimulatedEvent::Cancelled(core, token) => self.cancel(core, token),
            }
        }
        if !self.pending.is_empty() && self.random(3) == 0 {
            let chosen = self.random(self.pending.len());
            let (core, token, operation) = self.pending.swap_remove(chosen);
            let outcome = self.random(4);
            let (result, bytes) = answer(&operation, outcome);
            self.port.borrow_mut().complete(core, token, result, bytes);
        }
        self.port.borrow_mut().now_ns += self.state % MILLISECOND_NS;
    }

    fn cancel(&mut self, core: CoreId, token: Token) {
        let place = self.pending.iter().position(|&(at, which, _)| (at, which) == (core, token));
        if let Some(place) = place {
            self.pending.swap_remove(place);
            self.port.borrow_mut().complete(core, token, -libc::ECANCELED, Vec::new());
        }
    }
}

fn answer(operation: &SimulatedOperation, outcome: usize) -> (i32, Vec<u8>) {
    match (operation, outcome) {
        (_, 0) => (-libc::ECONNRESET, Vec::new()),
        (SimulatedOperation::Receive(_, size), 1) => (1, vec![9; 1.min(*size)]),
        (SimulatedOperation::Receive(_, size), _) => (*size as i32, vec![9; *size]),
        (SimulatedOperation::Send(_, bytes), _) => (bytes.len() as i32, Vec::new()),
        _ => (0, Vec::new()),
    }
}

/// A worker that sends, receives with a deadline, and passes a token to its sibling.
async fn worker(core: Core, mail: mesh::Receiver<u32>, sibling: mesh::Sender<u32>) {
    for round in 0..50 {
        let lease = core.lease(Class::Range).await;
        let (lease, sent) = core.send(Fd(3), lease, 0..64).await;
        let deadline_ns = core.now() + 2 * MILLISECOND_NS;
        let (lease, received) = core.recv(Fd(3), lease, 0..64).by(deadline_ns).await;
        if let (Ok(_), Ok(count)) = (sent, received) {
            assert!(lease[..count].iter().all(|&byte| byte == 9));
        }
        // Dropping an operation in flight: its lease must still come home.
        let mut dropped = Some(core.recv(Fd(4), lease, 0..8));
        std::future::poll_fn(|context| {
            let operation = dropped.as_mut().expect("polled once");
            let _ = Pin::new(operation).poll(context);
            Poll::Ready(())
        })
        .await;
        drop(dropped);
        let _ = sibling.send(round);
        while mail.try_receive().is_some() {}
        core.sleep(core.random() % MILLISECOND_NS).await.unwrap();
    }
}

fn run_two_cores(seed: u64) -> Vec<String> {
    let mut world = TwoCores::new(seed);
    let (first, second) = (world.cores[0].clone(), world.cores[1].clone());
    let (to_first, at_first) = mailbox(first.wake(), 256);
    let (to_second, at_second) = mailbox(second.wake(), 256);
    first.spawn(Lane::Demand, worker(first.clone(), at_first, to_second));
    second.spawn(Lane::Background, worker(second.clone(), at_second, to_first));
    let mut steps = 0;
    while first.task_count() + second.task_count() > 0 {
        world.step();
        steps += 1;
        assert!(steps < 1_000_000, "seed {seed}: a task hangs");
    }
    while first.busy_count() + second.busy_count() > 0 {
        world.step();
    }
    assert!(first.arena().is_whole() && second.arena().is_whole(), "seed {seed}: a lease leaks");
    world.trace
}

#[test]
fn two_cores_leak_no_lease_whatever_completes_when() {
    for seed in 1..=100 {
        run_two_cores(seed);
    }
}

#[test]
fn same_seed_gives_the_same_trace() {
    let (first, again, other) = (run_two_cores(42), run_two_cores(42), run_two_cores(44));
    assert!(first.len() > 100);
    assert_eq!(first, again);
    assert_ne!(first, other);
}

#[test]
fn shutdown_with_operations_in_flight_reaps_them_all() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let arena = block_on(move |core| async move {
        let fds: VecDeque<Fd> = (0..4).map(|_| core.socket(&address).unwrap()).collect();
        for &fd in &fds {
            core.connect(fd, address).await.unwrap();
            let own = core.clone();
            core.spawn(Lane::Background, async move {
                let lease = own.lease(Class::Wire).await;
                let (_lease, _) = own.recv(fd, lease, 0..8).await;
            });
        }
        for _ in 0..8 {
            core.yield_now().await;
        }
        Arc::clone(core.arena())
    })
    .unwrap();
    assert!(arena.is_whole());
}
