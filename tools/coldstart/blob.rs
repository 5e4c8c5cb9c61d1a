//! The target of a bare blob: objects of the emulated device, each read by its own readers, and
//! what goes on beside them.

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::daemon::{Daemon, Registration};
use crate::image::Image;
use crate::kernel::{Kernel, Object, next_data, next_hole};
use crate::load::{Target, Touch};
use crate::plan::{Operation, Random};

/// Readers of the image whose registry is dead.
pub const BESIDE_READERS: usize = 4;
const BESIDE_DOMAIN: &str = "beside";
/// How long the dead registry's readers have waited before anything is measured: an outage lasts.
const BESIDE_BEFORE: Duration = Duration::from_secs(1);
const BESIDE_READ_BYTES: u64 = 4096;

/// How the other image's registry is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Dead {
    /// It refuses connections.
    Refusing,
    /// It takes connections and never says anything.
    Silent,
}

/// Open objects: reader r reads object r modulo their number.
pub struct Objects<'a> {
    kernel: &'a Kernel,
    objects: Vec<Object>,
    /// From the first OPEN sent to the last one answered.
    pub opening: Duration,
}

impl<'a> Objects<'a> {
    /// Opens bootstrap and blob of each domain, as mounts do, and reads a bootstrap's first page.
    pub fn open(kernel: &'a Kernel, image: &Image, domains: &[String]) -> io::Result<Self> {
        let started = Instant::now();
        let mut objects = Vec::new();
        for domain in domains {
            let bootstrap = kernel.open(domain, domain)?;
            kernel.read(0, &bootstrap, 0..4096)?;
            objects.push(kernel.open(domain, &image.blob_id)?);
        }
        Ok(Objects { kernel, objects, opening: started.elapsed() })
    }

    /// Opens only the bootstrap of a domain, to be read as the blob is otherwise.
    pub fn open_bootstrap(kernel: &'a Kernel, domain: &str) -> io::Result<Self> {
        let started = Instant::now();
        let objects = vec![kernel.open(domain, domain)?];
        Ok(Objects { kernel, objects, opening: started.elapsed() })
    }

    /// Compares all that the caches hold with the image; gives how many bytes that is.
    pub fn verify(&self, image: &Image) -> io::Result<u64> {
        let mut compared = 0;
        for object in &self.objects {
            let mut at = 0;
            while let Some(data) = self.data_after(object, at)? {
                compared += image.verify(&object.file, data.clone())?;
                at = data.end;
            }
        }
        Ok(compared)
    }

    /// Bytes of the caches that hold data.
    pub fn filled_bytes(&self) -> io::Result<u64> {
        let mut filled = 0;
        for object in &self.objects {
            let mut at = 0;
            while let Some(data) = self.data_after(object, at)? {
                filled += data.end - data.start;
                at = data.end;
            }
        }
        Ok(filled)
    }

    fn data_after(&self, object: &Object, at: u64) -> io::Result<Option<Range<u64>>> {
        let end = object.size;
        let start = next_data(&object.file, at, end)?;
        if start >= end {
            return Ok(None);
        }
        Ok(Some(start..next_hole(&object.file, start, end)?))
    }
}

impl Target for Objects<'_> {
    fn read(&self, reader: usize, operation: &Operation) -> io::Result<Touch> {
        let object = &self.objects[reader % self.objects.len()];
        let range = operation.offset..operation.offset + operation.length;
        match self.kernel.read(reader, object, range) {
            Ok(true) => Ok(Touch::Miss),
            Ok(false) => Ok(Touch::Hit),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(Touch::Refused),
            Err(error) => Err(error),
        }
    }
}

/// An image whose registry is dead, read all the time by readers of its own.
pub struct Beside<'a> {
    kernel: &'a Kernel,
    object: Object,
    first_reader: usize,
    /// Keeps the silent registry listening.
    _listener: Option<TcpListener>,
}

impl<'a> Beside<'a> {
    /// Registers and opens it. Its readers are numbered from `first_reader` on.
    pub fn open(
        daemon: &'a Daemon,
        image: &Image,
        dead: Dead,
        work: &Path,
        first_reader: usize,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let origin = listener.local_addr()?.to_string();
        let work = work.join("work");
        let how = Registration { origin, prefetch: false, validate: false, work };
        daemon.register(BESIDE_DOMAIN, image, &how)?;
        let object = daemon.kernel.open(BESIDE_DOMAIN, &image.blob_id)?;
        let listener = match dead {
            Dead::Silent => Some(listener),
            Dead::Refusing => None,
        };
        Ok(Beside { kernel: &daemon.kernel, object, first_reader, _listener: listener })
    }

    /// Keeps its readers reading for a while and while `during` runs, then calls them off.
    pub fn while_read<T>(&self, during: impl FnOnce() -> T) -> T {
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for reader in 0..BESIDE_READERS {
                let is_over = &is_over;
                scope.spawn(move || self.read_until(reader, is_over));
            }
            std::thread::sleep(BESIDE_BEFORE);
            let result = during();
            is_over.store(true, Ordering::Relaxed);
            let readers = self.first_reader..self.first_reader + BESIDE_READERS;
            readers.for_each(|reader| self.kernel.give_up(reader));
            result
        })
    }

    fn read_until(&self, reader: usize, is_over: &AtomicBool) {
        let mut random = Random(reader as u64);
        let pages = self.object.size / BESIDE_READ_BYTES;
        while !is_over.load(Ordering::Relaxed) {
            let start = random.next() % pages * BESIDE_READ_BYTES;
            let range = start..start + BESIDE_READ_BYTES;
            // Refused, sooner or later; when does not matter here.
            let _ = self.kernel.read(self.first_reader + reader, &self.object, range);
        }
    }
}
