//! The control API's server: one thread for all connections, a crew for the calls.
//!
//! The thread never blocks on a client: sockets do not block, each client has deadlines, and what a
//! client sends or does not read is bounded. So a client that stalls holds only its own connection,
//! and when all connections are in use the longest idle one makes room. A call that finds no thread
//! is answered 503 after a while. Nothing a client sends ends the thread.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::api::{self, Request};
use super::connection::{Connection, Moved, Phase};
use super::control::ControlPlane;
use super::crew::{Answers, Claim, Crew, Ticket};
use super::reply;
use super::socket::ControlSocket;
use crate::config::{
    CONTROL_ACCEPT_PAUSE_MS, CONTROL_CONNECTIONS_MAX, CONTROL_QUEUE_WAIT_MS, CONTROL_STOP_WAIT_MS,
};
use crate::error::{Error, Result};

/// A running server.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    bell: Arc<EventFd>,
    thread: JoinHandle<()>,
}

impl Server {
    /// Starts to serve. The socket's file goes when the server stops.
    pub fn start(socket: ControlSocket, control: Arc<ControlPlane>) -> Result<Server> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let bell = EventFd::from_flags(flags)
            .map_err(|errno| Error::system(errno as i32, "cannot make an eventfd"))?;
        let bell = Arc::new(bell);
        let clients = Clients::new(socket, control, bell.clone())?;
        let stop = clients.stop.clone();
        let thread = std::thread::Builder::new().name("api".into());
        let thread = thread
            .spawn(move || clients.run())
            .map_err(|error| Error::io(&error, "cannot start a thread for the API"))?;
        Ok(Server { stop, bell, thread })
    }

    /// Takes no more requests, lets those under way be answered, and returns: at most
    /// [`CONTROL_STOP_WAIT_MS`] twice.
    pub fn stop(self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.bell.write(1);
        let _ = self.thread.join();
    }
}

struct Clients {
    socket: ControlSocket,
    control: Arc<ControlPlane>,
    crew: Crew,
    answers: Answers,
    /// At most CONTROL_CONNECTIONS_MAX.
    slots: Vec<Option<Client>>,
    next_number: u64,
    /// Accepting rests until then after an error of ours.
    accept_after: Instant,
    stop: Arc<AtomicBool>,
}

struct Client {
    connection: Connection,
    /// The call under way, and what is needed to take it back.
    pending: Option<(Ticket, Claim)>,
}

impl Clients {
    fn new(
        socket: ControlSocket,
        control: Arc<ControlPlane>,
        bell: Arc<EventFd>,
    ) -> Result<Clients> {
        let (crew, answers) = Crew::start(&control, bell)?;
        Ok(Clients {
            socket,
            control,
            crew,
            answers,
            slots: Vec::new(),
            next_number: 0,
            accept_after: Instant::now(),
            stop: Arc::default(),
        })
    }

    fn run(mut self) {
        while !self.stop.load(Ordering::Acquire) {
            self.turn(None);
        }
        let wait = Duration::from_millis(CONTROL_STOP_WAIT_MS);
        let end = Instant::now() + wait;
        for slot in 0..self.slots.len() {
            self.move_on(slot, |connection, _| connection.finish());
        }
        while self.slots.iter().any(Option::is_some) && Instant::now() < end {
            self.turn(Some(end));
        }
        if !self.crew.end(wait) {
            self.control.journal.error("a call of the control API did not end; it is left behind");
        }
    }

    /// Waits for something to happen and deals with it. With an `end`, nobody is let in.
    fn turn(&mut self, end: Option<Instant>) {
        let now = Instant::now();
        let accepting = end.is_none() && now >= self.accept_after;
        let mut polled = vec![PollFd::new(self.answers.bell.as_fd(), PollFlags::POLLIN)];
        if accepting {
            polled.push(PollFd::new(self.socket.listener().as_fd(), PollFlags::POLLIN));
        }
        let first_client = polled.len();
        let mut order = Vec::with_capacity(self.slots.len());
        for (slot, client) in self.slots.iter().enumerate() {
            if let Some(client) = client {
                order.push(slot);
                let (socket, interest) = (client.connection.socket(), client.connection.interest());
                polled.push(PollFd::new(socket, interest));
            }
        }
        // EINTR and ENOMEM alike: nothing is ready, look again.
        let _ = poll(&mut polled, self.patience(now, end));
        let is_ready = |entry: &PollFd| entry.revents().is_some_and(|flags| !flags.is_empty());
        let ready: Vec<bool> = polled.iter().map(is_ready).collect();
        let now = Instant::now();
        if ready[0] {
            let _ = self.answers.bell.read();
            self.take_answers(now);
        }
        for (slot, _) in order.iter().zip(&ready[first_client..]).filter(|entry| *entry.1) {
            self.move_on(*slot, |connection, now| connection.ready(now));
        }
        if accepting && ready[1] {
            self.accept(now);
        }
        self.expire(now);
    }

    /// How long nothing needs to be done unless a socket says so.
    fn patience(&self, now: Instant, end: Option<Instant>) -> PollTimeout {
        let resting = (self.accept_after > now).then_some(self.accept_after);
        let deadlines = self.slots.iter().flatten().filter_map(Client::deadline);
        match deadlines.chain(end).chain(resting).min() {
            None => PollTimeout::NONE,
            Some(next) => {
                let wait_ms = next.saturating_duration_since(now).as_millis() + 1;
                PollTimeout::try_from(wait_ms).unwrap_or(PollTimeout::MAX)
            }
        }
    }

    /// Lets one client in; the others are still there at the next turn.
    fn accept(&mut self, now: Instant) {
        let stream = match self.socket.listener().accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) {
                    self.accept_after = now + Duration::from_millis(CONTROL_ACCEPT_PAUSE_MS);
                    self.control.journal.error(format!("control socket: cannot accept: {error}"));
                }
                return;
            }
        };
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        let connection = Connection::new(stream, now);
        if let Some(slot) = self.free_slot() {
            self.slots[slot] = Some(Client { connection, pending: None });
        } else {
            let mut connection = connection;
            connection.finish();
            // The little answer fits an empty socket; what does not is not worth a wait.
            let _ = connection.respond(&reply::busy("too many connections"), now);
        }
    }

    /// An empty slot, a new one, or that of the longest idle client.
    fn free_slot(&mut self) -> Option<usize> {
        if let Some(slot) = self.slots.iter().position(Option::is_none) {
            return Some(slot);
        }
        if self.slots.len() < CONTROL_CONNECTIONS_MAX {
            self.slots.push(None);
            return Some(self.slots.len() - 1);
        }
        let clients = self.slots.iter().enumerate();
        let idle = clients.filter_map(|(slot, client)| {
            let connection = &client.as_ref()?.connection;
            (connection.phase() == Phase::Idle).then(|| (connection.since(), slot))
        });
        let (_, slot) = idle.min()?;
        self.slots[slot] = None;
        Some(slot)
    }

    fn take_answers(&mut self, now: Instant) {
        while let Ok((ticket, response)) = self.answers.receiver.try_recv() {
            let Some(Some(client)) = self.slots.get_mut(ticket.slot) else { continue };
            if client.pending.as_ref().is_some_and(|(pending, _)| *pending == ticket) {
                client.pending = None;
                let stopping = self.stop.load(Ordering::Acquire);
                if stopping {
                    client.connection.finish();
                }
                let moved = client.connection.respond(&response, now);
                self.settle(ticket.slot, moved, now);
            }
        }
    }

    /// Gives up clients that are too slow and calls that no thread took.
    fn expire(&mut self, now: Instant) {
        for slot in 0..self.slots.len() {
            let Some(client) = &mut self.slots[slot] else { continue };
            if client.deadline().is_none_or(|deadline| deadline > now) {
                continue;
            }
            match client.pending.take() {
                None => self.slots[slot] = None,
                Some((_, claim)) if claim.take() => {
                    let response = reply::busy("all threads for such calls are busy; try again");
                    let moved = client.connection.respond(&response, now);
                    self.settle(slot, moved, now);
                }
                // A thread has begun it: from now on there is no deadline.
                Some((ticket, claim)) => client.pending = Some((ticket, claim)),
            }
        }
    }

    fn move_on(&mut self, slot: usize, act: impl FnOnce(&mut Connection, Instant) -> Moved) {
        let now = Instant::now();
        if let Some(Some(client)) = self.slots.get_mut(slot) {
            let moved = act(&mut client.connection, now);
            self.settle(slot, moved, now);
        }
    }

    /// Does what came of moving a connection on; a client that sent several requests at once is
    /// answered here until one of them needs a thread.
    fn settle(&mut self, slot: usize, mut moved: Moved, now: Instant) {
        loop {
            let Some(Some(client)) = self.slots.get_mut(slot) else { return };
            match moved {
                Moved::Stays => return,
                Moved::Ends => {
                    self.slots[slot] = None;
                    return;
                }
                Moved::Asks(request) => {
                    let ticket = Ticket { slot, number: self.next_number };
                    self.next_number += 1;
                    match begin(&self.crew, ticket, &request) {
                        Ok(claim) => {
                            client.pending = Some((ticket, claim));
                            return;
                        }
                        Err(response) => moved = client.connection.respond(&response, now),
                    }
                }
            }
        }
    }
}

impl Client {
    fn deadline(&self) -> Option<Instant> {
        let queued = || self.connection.since() + Duration::from_millis(CONTROL_QUEUE_WAIT_MS);
        match &self.pending {
            Some((_, claim)) if !claim.is_taken() => Some(queued()),
            Some(_) => None,
            None => self.connection.deadline(),
        }
    }
}

/// Hands a request over to the crew, or answers it at once.
fn begin(
    crew: &Crew,
    ticket: Ticket,
    request: &Request,
) -> std::result::Result<Claim, reply::Response> {
    let call = api::route(request)?;
    crew.give(ticket, call).ok_or_else(|| reply::busy("too many calls are waiting; try again"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{
        CONTROL_IDLE_MS, CONTROL_REQUEST_WAIT_MS, CONTROL_RESPONSE_WAIT_MS, CONTROL_SLOW_THREADS,
    };
    use crate::daemon::control::Hooks;
    use crate::daemon::control_tests::{control, entry, fixture};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    /// A server whose turns and whose time the test makes.
    fn clients(hooks: Hooks, directory: &Path) -> Clients {
        let socket = ControlSocket::bind(&directory.join("api.sock")).unwrap();
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let bell = Arc::new(EventFd::from_flags(flags).unwrap());
        Clients::new(socket, Arc::new(control(hooks)), bell).unwrap()
    }

    fn connect(clients: &mut Clients, request: &str) -> UnixStream {
        let mut stream = UnixStream::connect(clients.socket.path()).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        // One turn lets it in, the next reads it.
        clients.turn(Some(Instant::now()));
        clients.accept(Instant::now());
        clients.turn(Some(Instant::now()));
        stream
    }

    fn in_ms(later_ms: u64) -> Instant {
        Instant::now() + Duration::from_millis(later_ms)
    }

    fn open(clients: &Clients) -> usize {
        clients.slots.iter().flatten().count()
    }

    #[test]
    fn a_call_that_no_thread_takes_is_answered_503_and_a_running_one_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let (report, reports) = crossbeam_channel::unbounded();
        let (release, wait) = crossbeam_channel::unbounded::<()>();
        let registered: crate::daemon::control::Registered = Box::new(move |_, _| {
            report.send(()).unwrap();
            let _ = wait.recv();
            Ok(())
        });
        let mut clients = clients(Hooks { registered, ..Hooks::idle() }, directory.path());
        let put = |clients: &mut Clients, id: usize| {
            let id = format!("i{id}");
            let body = entry("d", &id, &fixture("zran"), directory.path()).to_string();
            let head = format!("PUT /api/v2/blobs HTTP/1.1\r\nContent-Length: {}", body.len());
            connect(clients, &format!("{head}\r\n\r\n{body}"))
        };
        let running: Vec<_> = (0..CONTROL_SLOW_THREADS).map(|id| put(&mut clients, id)).collect();
        for _ in &running {
            reports.recv().unwrap();
        }
        let mut queued = put(&mut clients, CONTROL_SLOW_THREADS);
        clients.expire(in_ms(CONTROL_QUEUE_WAIT_MS - 1000));
        queued.set_nonblocking(true).unwrap();
        assert!(queued.read(&mut [0]).is_err());
        clients.expire(in_ms(CONTROL_QUEUE_WAIT_MS + 1000));
        let mut start = [0; 12];
        queued.read_exact(&mut start).unwrap();
        assert_eq!(&start, b"HTTP/1.1 503");
        assert_eq!(open(&clients), CONTROL_SLOW_THREADS + 1);
        drop(release);
        // Taken back means never done.
        assert!(clients.crew.end(Duration::from_secs(60)));
        assert_eq!(clients.control.catalog.images().len(), CONTROL_SLOW_THREADS);
    }

    #[test]
    fn clients_are_given_up_in_every_phase() {
        let directory = tempfile::tempdir().unwrap();
        let mut clients = clients(Hooks::idle(), directory.path());
        let _sending = connect(&mut clients, "GET /api");
        clients.expire(in_ms(CONTROL_REQUEST_WAIT_MS - 1000));
        assert_eq!(open(&clients), 1);
        clients.expire(in_ms(CONTROL_REQUEST_WAIT_MS + 1000));
        assert_eq!(open(&clients), 0);

        let _idle = connect(&mut clients, "");
        clients.expire(in_ms(CONTROL_IDLE_MS - 1000));
        assert_eq!(open(&clients), 1);
        clients.expire(in_ms(CONTROL_IDLE_MS + 1000));
        assert_eq!(open(&clients), 0);

        // Answers that nobody reads fill the socket.
        let mut taking = connect(&mut clients, "");
        taking.set_nonblocking(true).unwrap();
        let is_taking = |clients: &Clients| {
            clients.slots.iter().flatten().any(|it| it.connection.phase() == Phase::Taking)
        };
        while !is_taking(&clients) {
            let _ = taking.write("GET /nothing HTTP/1.1\r\n\r\n".repeat(50).as_bytes());
            clients.turn(Some(Instant::now()));
        }
        clients.expire(in_ms(CONTROL_RESPONSE_WAIT_MS + 1000));
        assert_eq!(open(&clients), 0);
    }
}
