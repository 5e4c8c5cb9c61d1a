//! tools/powerdisk is as bad as a real disk, and not worse: what was flushed survives a power cut,
//! what was not may vanish, stay, or be torn between two sectors.
//!
//! Each test serves a small disk of its own to a client that speaks just enough of the protocol.

use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const SECTOR: usize = 512;
const SIZE: usize = 1 << 20;
const FUA: u16 = 1;
const INVALID: u32 = 22;
/// Cuts with different seeds; so many that each of three fates is met, or something is wrong.
const CUTS: u64 = 60;

/// A disk under power, and the one client that it has.
struct Disk {
    child: Child,
    orders: Option<ChildStdin>,
    client: UnixStream,
    folder: TempDir,
}

impl Disk {
    fn start(seed: u64) -> Disk {
        Disk::over(TempDir::new().unwrap(), seed)
    }

    fn over(folder: TempDir, seed: u64) -> Disk {
        let socket = folder.path().join("socket");
        let mut child = Command::new(executable())
            .args(["--size-mib", "1", "--seed", &seed.to_string(), "--file"])
            .arg(folder.path().join("disk"))
            .arg("--socket")
            .arg(&socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("powerdisk can be started");
        let orders = child.stdin.take();
        let mut client = connect(&socket);
        assert_eq!(greet(&mut client).unwrap(), SIZE as u64);
        Disk { child, orders, client, folder }
    }

    /// The error number of one command, and what a read brought.
    fn command(&mut self, flags: u16, kind: u16, offset: u64, data: &[u8], length: usize) -> u32 {
        let mut request = [&0x2560_9513_u32.to_be_bytes()[..], &flags.to_be_bytes()].concat();
        request.extend([&kind.to_be_bytes()[..], &7_u64.to_be_bytes()].concat());
        request.extend([&offset.to_be_bytes()[..], &(length as u32).to_be_bytes()].concat());
        request.extend(data);
        self.client.write_all(&request).unwrap();
        let mut reply = [0; 16];
        self.client.read_exact(&mut reply).unwrap();
        assert_eq!((&reply[..4], reply[15]), (&0x6744_6698_u32.to_be_bytes()[..], 7));
        u32::from_be_bytes(reply[4..8].try_into().unwrap())
    }

    fn write(&mut self, sector: usize, data: &[u8], flags: u16) {
        assert_eq!(self.command(flags, 1, (sector * SECTOR) as u64, data, data.len()), 0);
    }

    /// `sectors` sectors full of `byte`.
    fn fill(&mut self, sector: usize, sectors: usize, byte: u8) {
        self.write(sector, &vec![byte; sectors * SECTOR], 0);
    }

    fn flush(&mut self) {
        assert_eq!(self.command(0, 3, 0, &[], 0), 0);
    }

    fn read(&mut self, sector: usize, sectors: usize) -> Vec<u8> {
        let mut data = vec![0; sectors * SECTOR];
        assert_eq!(self.command(0, 0, (sector * SECTOR) as u64, &[], data.len()), 0);
        self.client.read_exact(&mut data).unwrap();
        data
    }

    /// What became of the cache, and the folder with what is on the platters.
    fn cut(mut self) -> (Value, TempDir) {
        writeln!(self.orders.take().unwrap(), "cut").unwrap();
        self.end()
    }

    /// An orderly end, when the orders were closed.
    fn end(mut self) -> (Value, TempDir) {
        self.orders = None;
        let mut line = String::new();
        BufReader::new(self.child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(self.child.wait().unwrap().success());
        let folder = std::mem::replace(&mut self.folder, TempDir::new().unwrap());
        (serde_json::from_str(&line).unwrap(), folder)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn executable() -> std::path::PathBuf {
    let own = std::env::current_exe().expect("a process knows its executable");
    let path = own.ancestors().nth(2).expect("target/PROFILE/deps").join("examples/powerdisk");
    assert!(path.is_file(), "{}: cargo build --example powerdisk", path.display());
    path
}

fn connect(socket: &Path) -> UnixStream {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) if Instant::now() > deadline => panic!("{}: {error}", socket.display()),
            Err(_) => thread::sleep(Duration::from_millis(5)), // tidy: polling
        }
    }
}

/// The handshake, with one option the server does not know and one that it does: the size.
fn greet(stream: &mut UnixStream) -> io::Result<u64> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    stream.write_all(&3_u32.to_be_bytes())?;
    for (option, data) in [(8_u32, &[][..]), (7, &[0; 6])] {
        let numbers = [option, data.len() as u32].map(u32::to_be_bytes).concat();
        stream.write_all(&[&b"IHAVEOPT"[..], &numbers, data].concat())?;
    }
    let mut size = None;
    loop {
        let mut head = [0; 20];
        stream.read_exact(&mut head)?;
        let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
        let mut data = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
        stream.read_exact(&mut data)?;
        match (kind, data.as_slice()) {
            (0x8000_0001, []) => assert_eq!(head[11], 8, "only the unknown option is refused"),
            (3, [0, 0, bytes @ .., _, _]) => size = bytes.try_into().ok().map(u64::from_be_bytes),
            (3, [0, 3, sizes @ ..]) => assert_eq!(sizes[..4], (SECTOR as u32).to_be_bytes()),
            (1, []) => return Ok(size.expect("the export was described")),
            other => panic!("an unexpected reply {other:?}"),
        }
    }
}

fn platters(folder: &TempDir) -> Vec<u8> {
    fs::read(folder.path().join("disk")).unwrap()
}

/// The byte that fills a sector; half a sector of one and half of another is never seen.
fn byte_of(platters: &[u8], sector: usize) -> u8 {
    let sector = &platters[sector * SECTOR..(sector + 1) * SECTOR];
    assert!(sector.iter().all(|byte| *byte == sector[0]), "a sector was torn");
    sector[0]
}

#[test]
fn what_was_flushed_survives_every_cut() {
    for seed in 0..CUTS {
        let mut disk = Disk::start(seed);
        disk.fill(0, 64, 1);
        disk.fill(8, 8, 2);
        disk.flush();
        disk.fill(100, 64, 3);
        let (_, folder) = disk.cut();
        let platters = platters(&folder);
        let expected = |sector| if (8..16).contains(&sector) { 2 } else { 1 };
        assert!((0..64).all(|sector| byte_of(&platters, sector) == expected(sector)));
    }
}

#[test]
fn what_was_not_flushed_stays_vanishes_or_is_torn_between_sectors() {
    let (mut kept, mut lost, mut torn) = (0, 0, 0);
    for seed in 0..CUTS {
        let mut disk = Disk::start(seed);
        disk.fill(0, 64, 1);
        disk.flush();
        disk.fill(0, 64, 2);
        let (cut, folder) = disk.cut();
        let platters = platters(&folder);
        let new = (0..64).filter(|sector| byte_of(&platters, *sector) == 2).count();
        assert_eq!(cut["stale_sectors"], 64 - new);
        let fate = match new {
            64 => ("kept", &mut kept),
            0 => ("lost", &mut lost),
            _ => ("torn", &mut torn),
        };
        assert_eq!(cut[fate.0], 1, "{cut}");
        *fate.1 += 1;
    }
    assert!(kept > 0 && lost > 0 && torn > 0, "kept {kept}, lost {lost}, torn {torn}");
}

#[test]
fn a_later_write_may_survive_an_earlier_one() {
    let mut seen = BTreeSet::new();
    for seed in 0..CUTS {
        let mut disk = Disk::start(seed);
        disk.fill(0, 1, 1);
        disk.fill(100, 1, 1);
        let (_, folder) = disk.cut();
        let platters = platters(&folder);
        seen.insert((byte_of(&platters, 0), byte_of(&platters, 100)));
    }
    assert_eq!(seen, BTreeSet::from([(0, 0), (0, 1), (1, 0), (1, 1)]));
}

#[test]
fn of_several_versions_any_may_be_found() {
    let mut seen = BTreeSet::new();
    for seed in 0..CUTS {
        let mut disk = Disk::start(seed);
        (1..=3).for_each(|byte| disk.fill(0, 1, byte));
        seen.insert(byte_of(&platters(&disk.cut().1), 0));
    }
    assert_eq!(seen, BTreeSet::from([0, 1, 2, 3]));
}

#[test]
fn fua_is_through_and_nothing_older_comes_back_over_it() {
    for seed in 0..CUTS {
        let mut disk = Disk::start(seed);
        disk.fill(0, 8, 1);
        disk.write(2, &[2; 2 * SECTOR], FUA);
        let (_, folder) = disk.cut();
        let platters = platters(&folder);
        assert_eq!((byte_of(&platters, 2), byte_of(&platters, 3)), (2, 2));
    }
}

#[test]
fn the_machine_reads_what_it_wrote() {
    let mut disk = Disk::start(1);
    disk.fill(0, 8, 1);
    disk.flush();
    disk.fill(4, 8, 2);
    disk.write(6, &[3; SECTOR], FUA);
    let bytes: Vec<u8> = disk.read(0, 13).chunks(SECTOR).map(|sector| sector[0]).collect();
    assert_eq!(bytes, [1, 1, 1, 1, 2, 2, 3, 2, 2, 2, 2, 2, 0]);
}

#[test]
fn an_orderly_end_loses_nothing() {
    let mut disk = Disk::start(1);
    disk.fill(0, 64, 1);
    let (cut, folder) = disk.end();
    assert_eq!(cut["lost"], 0);
    assert!((0..64).all(|sector| byte_of(&platters(&folder), sector) == 1));
    // And the next machine finds it.
    assert_eq!(Disk::over(folder, 1).read(63, 1), [1; SECTOR]);
}

#[test]
fn the_same_seed_is_the_same_cut() {
    let cut = |seed| {
        let mut disk = Disk::start(seed);
        (0..64).for_each(|sector| disk.fill(sector, 2, sector as u8));
        platters(&disk.cut().1)
    };
    assert_eq!(cut(5), cut(5));
    assert_ne!(cut(5), cut(6));
}

#[test]
fn what_makes_no_sense_is_refused_and_the_disk_goes_on() {
    let mut disk = Disk::start(1);
    let size = SIZE as u64;
    for (kind, offset, length) in [(0, size, SECTOR), (0, 1, SECTOR), (0, 0, 1), (9, 0, 0)] {
        assert_eq!(disk.command(0, kind, offset, &[], length), INVALID);
    }
    for offset in [size - 512, u64::MAX - 511, 100] {
        assert_eq!(disk.command(0, 1, offset, &[1; 1024], 1024), INVALID);
    }
    disk.fill(2047, 1, 1);
    assert_eq!(disk.read(2046, 2)[SECTOR..], [1; SECTOR]);
    disk.client.write_all(&[0; 28]).unwrap();
    let mut rest = Vec::new();
    // The end, or a reset for what was not read.
    let _ = disk.client.read_to_end(&mut rest);
    assert!(rest.is_empty(), "a client that is out of step is left alone");
    let mut other = connect(&disk.folder.path().join("socket"));
    assert_eq!(greet(&mut other).unwrap(), size);
}
