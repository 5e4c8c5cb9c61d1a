//! The network block device protocol, as much of it as a virtual machine's disk needs.
//!
//! Fixed newstyle handshake, one export whatever name is asked for, simple replies, commands one
//! after the other: nothing is answered before it is done, so a flush covers everything that was
//! answered before it. Specification:
//! <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>.

use crate::disk::{Disk, SECTOR};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

const GREETING: &[u8; 16] = b"NBDMAGICIHAVEOPT";
const FIXED_NEWSTYLE_NO_ZEROES: u16 = 3;
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_UNSUPPORTED: u32 = 0x8000_0001;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

/// Has flags, flush and FUA; no trim, no zeroes: what is not offered is written.
const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 3;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const FLAG_FUA: u16 = 1;
const INVALID: u32 = 22;
const INPUT_OUTPUT: u32 = 5;

/// The largest read or write, which is what is announced; and of options, which are names.
const REQUEST_BYTES_MAX: u32 = 32 << 20;
const OPTION_BYTES_MAX: u32 = 8192;

/// Serves one client until it disconnects, or breaks the protocol. `None` in place of the disk is
/// a disk without power: nothing is answered any more. Writes are slowed down to
/// `bytes_per_s`.
pub fn serve(
    mut stream: UnixStream,
    disk: &Mutex<Option<Disk>>,
    bytes_per_s: Option<f64>,
) -> io::Result<()> {
    let size = with(disk, |disk| Ok(disk.size()))?;
    if negotiate(&mut stream, size)? {
        while command(&mut stream, disk, bytes_per_s)? {}
    }
    Ok(())
}

/// Whether it came to an export.
fn negotiate(stream: &mut UnixStream, size: u64) -> io::Result<bool> {
    stream.write_all(GREETING)?;
    stream.write_all(&FIXED_NEWSTYLE_NO_ZEROES.to_be_bytes())?;
    let flags = u32::from_be_bytes(take(stream)?);
    let export = [&size.to_be_bytes()[..], &TRANSMISSION_FLAGS.to_be_bytes()].concat();
    loop {
        if u64::from_be_bytes(take(stream)?) != OPTION_MAGIC {
            return Err(broken("an option without its magic"));
        }
        let option = u32::from_be_bytes(take(stream)?);
        let length = u32::from_be_bytes(take(stream)?);
        if length > OPTION_BYTES_MAX {
            return Err(broken("an option that is too long"));
        }
        stream.read_exact(&mut vec![0; length as usize])?;
        match option {
            OPT_EXPORT_NAME => {
                stream.write_all(&export)?;
                // Unless the client, too, can do without them.
                stream.write_all(&[0; 124][..if flags & 2 == 0 { 124 } else { 0 }])?;
                return Ok(true);
            }
            OPT_INFO | OPT_GO => {
                let information = [&INFO_EXPORT.to_be_bytes()[..], &export].concat();
                reply_option(stream, option, REP_INFO, &information)?;
                reply_option(stream, option, REP_INFO, &block_sizes())?;
                reply_option(stream, option, REP_ACK, &[])?;
                if option == OPT_GO {
                    return Ok(true);
                }
            }
            OPT_ABORT => {
                reply_option(stream, option, REP_ACK, &[])?;
                return Ok(false);
            }
            _ => reply_option(stream, option, REP_UNSUPPORTED, &[])?,
        }
    }
}

/// Smallest, best, largest.
fn block_sizes() -> Vec<u8> {
    let sizes = [SECTOR as u32, 4096, REQUEST_BYTES_MAX].map(u32::to_be_bytes).concat();
    [&INFO_BLOCK_SIZE.to_be_bytes()[..], &sizes].concat()
}

fn reply_option(stream: &mut UnixStream, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    stream.write_all(&OPTION_REPLY_MAGIC.to_be_bytes())?;
    let numbers = [option, kind, data.len() as u32].map(u32::to_be_bytes).concat();
    stream.write_all(&[&numbers[..], data].concat())
}

/// One command; whether there may be another.
fn command(
    stream: &mut UnixStream,
    disk: &Mutex<Option<Disk>>,
    bytes_per_s: Option<f64>,
) -> io::Result<bool> {
    let magic = match take(stream) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(false),
        magic => u32::from_be_bytes(magic?),
    };
    if magic != REQUEST_MAGIC {
        return Err(broken("a request without its magic"));
    }
    let flags = u16::from_be_bytes(take(stream)?);
    let kind = u16::from_be_bytes(take(stream)?);
    let cookie: [u8; 8] = take(stream)?;
    let offset = u64::from_be_bytes(take(stream)?);
    let length = u32::from_be_bytes(take(stream)?);
    if length > REQUEST_BYTES_MAX && matches!(kind, READ | WRITE) {
        return Err(broken("a request that is too long"));
    }
    let mut bytes = vec![0; if matches!(kind, READ | WRITE) { length as usize } else { 0 }];
    if kind == WRITE {
        stream.read_exact(&mut bytes)?;
        if let Some(bytes_per_s) = bytes_per_s {
            thread::sleep(Duration::from_secs_f64(f64::from(length) / bytes_per_s));
        }
    }
    let done = with(disk, |disk| match kind {
        READ | WRITE if !disk.holds(offset, u64::from(length)) => Ok(INVALID),
        READ => disk.read(offset, &mut bytes).map(|()| 0),
        WRITE => disk.write(offset, &bytes, flags & FLAG_FUA != 0).map(|()| 0),
        FLUSH => disk.flush().map(|()| 0),
        _ => Ok(INVALID),
    });
    let status = match done {
        Err(error) if error.kind() == ErrorKind::NotConnected => return Err(error),
        done => done.unwrap_or(INPUT_OUTPUT),
    };
    if kind == DISCONNECT {
        return Ok(false);
    }
    let head = [&REPLY_MAGIC.to_be_bytes()[..], &status.to_be_bytes(), &cookie].concat();
    let data = if kind == READ && status == 0 { &bytes[..] } else { &[] };
    stream.write_all(&[&head[..], data].concat())?;
    Ok(true)
}

fn with<T>(
    disk: &Mutex<Option<Disk>>,
    act: impl FnOnce(&mut Disk) -> io::Result<T>,
) -> io::Result<T> {
    let mut disk = disk.lock().unwrap_or_else(PoisonError::into_inner);
    disk.as_mut().map_or_else(|| Err(ErrorKind::NotConnected.into()), act)
}

fn take<const N: usize>(stream: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn broken(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("the client sent {what}"))
}
