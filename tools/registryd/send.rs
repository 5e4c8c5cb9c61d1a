//! Sends a reply, as well or as badly as the fault rules want it.
//!
//! Owns the bytes of the head, the pace of the body and the end of the connection. Without faults
//! the head and up to a mebibyte of body leave in one write. Says whether the connection lives on.

use crate::faults::Effect;
use crate::journal::{EntryId, Journal};
use crate::link::Link;
use crate::reply::Reply;
use crate::wire::Connection;
use std::time::{Duration, Instant};
use std::{io, thread};

const PIECE_BYTES_MAX: u64 = 1 << 20;
const PACED_PIECE_BYTES_MAX: u64 = 16 << 10;
/// A drip is a fiftieth of a second long.
const DRIPS_PER_SECOND: u64 = 50;

/// A reply on its way.
pub struct Sender<'a> {
    pub journal: &'a Journal,
    pub link: &'a Link,
    pub entry: Option<EntryId>,
    pub effect: &'a Effect,
    /// When the request's head was complete.
    pub asked_at: Instant,
    /// Lives as long as the connection: the body is read into it, behind the head.
    pub buffer: &'a mut Vec<u8>,
}

impl Sender<'_> {
    /// Sends `reply`; gives the connection back when it may serve another request.
    pub fn send(
        mut self,
        mut connection: Connection,
        reply: &Reply,
        keep_alive: bool,
    ) -> io::Result<Option<Connection>> {
        let effect = self.effect;
        if let Some(latency_ms) = effect.latency_ms {
            pause_until(self.asked_at + Duration::from_millis(latency_ms));
        }
        if effect.hang {
            connection.wait_for_close();
            return Ok(None);
        }
        if effect.close_before_response {
            connection.close();
            return Ok(None);
        }
        if effect.reset == Some(0) {
            connection.reset()?;
            return Ok(None);
        }
        self.journal.answered(self.entry, reply.status);
        self.write_head(reply, keep_alive);
        if reply.head_only {
            connection.write_all(self.buffer)?;
        } else {
            let cut = self.send_body(&mut connection, reply)?;
            if cut && effect.reset.is_some() {
                connection.reset()?;
                return Ok(None);
            }
            if cut {
                connection.close();
                return Ok(None);
            }
        }
        self.journal.end(self.entry);
        if keep_alive && !effect.close_after_response {
            return Ok(Some(connection));
        }
        connection.close();
        Ok(None)
    }

    fn write_head(&mut self, reply: &Reply, keep_alive: bool) {
        self.buffer.clear();
        if self.effect.garbage_head {
            self.buffer.extend_from_slice(b"\x16\x03\x01 this is not HTTP \xff\xfe\r\n\r\n");
            return;
        }
        let mut head = format!("HTTP/1.1 {} {}\r\n", reply.status, reply.reason());
        for (name, value) in &reply.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let length = reply.body.length() + self.effect.overlong.unwrap_or(0);
        if self.effect.chunked && !reply.head_only {
            head.push_str("Transfer-Encoding: chunked\r\n");
        } else if reply.status != 204 {
            head.push_str(&format!("Content-Length: {length}\r\n"));
        }
        if let Some(size) = self.effect.huge_head {
            head.push_str(&format!("X-Huge: {}\r\n", "h".repeat(size)));
        }
        if !keep_alive {
            head.push_str("Connection: close\r\n");
        }
        head.push_str("\r\n");
        self.buffer.extend_from_slice(head.as_bytes());
    }

    /// Sends the head that waits in the buffer and the body; `true` when it was cut on purpose.
    fn send_body(&mut self, connection: &mut Connection, reply: &Reply) -> io::Result<bool> {
        let effect = self.effect;
        let length = reply.body.length() + effect.overlong.unwrap_or(0);
        let kept = length.saturating_sub(effect.truncate.unwrap_or(0));
        let end = kept.min(effect.reset.unwrap_or(kept));
        let chunked = effect.chunked;
        let (rate, piece_max) = self.pace();
        let started = Instant::now();
        let mut at = 0;
        loop {
            let piece = (end - at).min(piece_max) as usize;
            if chunked && piece > 0 {
                self.buffer.extend_from_slice(format!("{piece:x}\r\n").as_bytes());
            }
            let start = self.buffer.len();
            self.buffer.resize(start + piece, 0);
            reply.body.read(at, &mut self.buffer[start..])?;
            self.flip(reply.body.offset() + at, start);
            if chunked && piece > 0 {
                self.buffer.extend_from_slice(b"\r\n");
            }
            at += piece as u64;
            if chunked && at == length {
                self.buffer.extend_from_slice(b"0\r\n\r\n");
            }
            if at == length {
                let stray = effect.stray_bytes.unwrap_or(0) as usize;
                self.buffer.resize(self.buffer.len() + stray, b'?');
            }
            if let Some(rate) = effect.link_bytes_per_second {
                self.link.carry(self.buffer.len(), rate.max(1));
            }
            self.journal.sent(self.entry, piece);
            connection.write_all(self.buffer)?;
            self.buffer.clear();
            if at == end {
                return Ok(end < length);
            }
            if let Some(rate) = rate {
                pause_until(started + Duration::from_secs_f64(at as f64 / rate as f64));
            }
        }
    }

    /// Bytes per second, when they are limited, and the size of a piece.
    fn pace(&self) -> (Option<u64>, u64) {
        if let Some(rate) = self.effect.slow_drip {
            return (Some(rate.max(1)), (rate / DRIPS_PER_SECOND).max(1));
        }
        match self.effect.bandwidth_bytes_per_second {
            Some(rate) => (Some(rate.max(1)), (rate / 100).clamp(1, PACED_PIECE_BYTES_MAX)),
            None if self.effect.link_bytes_per_second.is_some() => (None, PACED_PIECE_BYTES_MAX),
            None => (None, PIECE_BYTES_MAX),
        }
    }

    /// Flips the ordered bit when it is in the piece of the blob that lies behind `start`.
    fn flip(&mut self, blob_offset: u64, start: usize) {
        let place = self.effect.flip_bit.and_then(|offset| offset.checked_sub(blob_offset));
        if let Some(byte) = place.and_then(|place| self.buffer[start..].get_mut(place as usize)) {
            *byte ^= 1;
        }
    }
}

fn pause_until(when: Instant) {
    thread::sleep(when.saturating_duration_since(Instant::now()));
}
