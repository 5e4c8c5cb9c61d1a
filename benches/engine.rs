//! The engine: what one operation costs, over the ring and between tasks.
//!
//! `cargo bench --bench engine`. The ring's figures include the kernel's part of a no-op: a timer
//! that is due already, and a read of zero bytes.

use criterion::{Criterion, criterion_group, criterion_main};
use sluice::engine::arena::Arena;
use sluice::engine::mesh::mailbox;
use sluice::engine::sync::Queue;
use sluice::engine::{Class, Core, Fd, block_on};
use std::future::Future;
use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// Runs `step` so many times on a core and gives the time it took.
fn timed<F>(times: u64, step: impl Fn(Core) -> F + 'static) -> Duration
where
    F: Future<Output = ()>,
{
    block_on(move |core| async move {
        let start = Instant::now();
        for _ in 0..times {
            step(core.clone()).await;
        }
        start.elapsed()
    })
    .expect("a ring can be made")
}

fn operations(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("engine");
    group.bench_function("yield to the loop", |bench| {
        bench.iter_custom(|times| timed(times, |core| async move { core.yield_now().await }));
    });
    group.bench_function("timer that is due", |bench| {
        bench.iter_custom(|times| {
            timed(times, |core| async move {
                let _ = black_box(core.sleep_until(0).await);
            })
        });
    });
    let null = std::fs::File::open("/dev/null").expect("there is one");
    let fd = Fd(null.as_raw_fd());
    group.bench_function("read of nothing through the ring", |bench| {
        bench.iter_custom(|times| {
            timed(times, move |core| async move {
                let lease = core.lease(Class::Wire).await;
                let (lease, got) = core.read_at(fd, lease, 0..512, 0).await;
                black_box((lease.len(), got.is_ok()));
            })
        });
    });
    group.bench_function("mail to oneself", |bench| {
        bench.iter_custom(|times| {
            block_on(move |core| async move {
                let (sender, receiver) = mailbox::<u64>(core.wake(), 16);
                let start = Instant::now();
                for number in 0..times {
                    sender.send(number).expect("the box is empty");
                    black_box(receiver.receive(&core).await);
                }
                start.elapsed()
            })
            .expect("a ring can be made")
        });
    });
    group.bench_function("queue between tasks", |bench| {
        bench.iter_custom(|times| {
            block_on(move |core| async move {
                let queue = Queue::new(16);
                let start = Instant::now();
                for number in 0..times {
                    queue.push(&core, number).expect("the queue is empty");
                    black_box(queue.pop(&core, |_| true).await);
                }
                start.elapsed()
            })
            .expect("a ring can be made")
        });
    });
    group.finish();
}

fn leases(criterion: &mut Criterion) {
    let arena = Arena::new().expect("address space");
    criterion.bench_function("lease and return a buffer", |bench| {
        bench.iter(|| black_box(arena.lease(Class::Range).is_some()));
    });
}

criterion_group!(benches, operations, leases);
criterion_main!(benches);
