//! What the kernel has open: one table per core, kept equal by messages.
//!
//! An object is in every core's table before its OPEN is answered, so a READ finds it wherever it
//! is taken. It leaves them at CLOSE; fetches in flight hold it until they end.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::cachefiles::{MessageId, ObjectId};
use super::device::Device;
use crate::blob::open::OpenBlob;
use crate::blob::registration::Image;
use crate::engine::{CoreId, Fd};
use crate::store::object::CacheObject;

/// An open bootstrap.
pub struct OpenBootstrap {
    /// Whose.
    pub image: Arc<Image>,
    /// Where it goes.
    pub object: CacheObject,
    /// Whether all of it is there.
    pub is_filled: AtomicBool,
    /// Whether a core is filling it.
    pub is_filling: AtomicBool,
}

/// An object that the predecessor had open and that this daemon cannot serve, with the time until
/// which that is taken for granted. To answer its open with an error would not do: the kernel would
/// ask for it again and again, and never answer its readers.
pub struct RefusedObject {
    /// The way to answer its reads.
    pub object: CacheObject,
    /// In the cores' time.
    pub until_ns: u64,
}

/// An open object.
#[derive(Clone)]
pub enum Opened {
    /// The metadata of an image.
    Bootstrap(Arc<OpenBootstrap>),
    /// A data blob.
    Data(Arc<OpenBlob>),
    /// What nobody knows: its reads get EIO.
    Refused(Arc<RefusedObject>),
}

impl Opened {
    /// The file it is filled and answered through.
    pub fn fd(&self) -> Fd {
        match self {
            Opened::Bootstrap(bootstrap) => bootstrap.object.fd(),
            Opened::Data(blob) => {
                blob.cache.object().expect("a blob behind this door has an object").fd()
            }
            Opened::Refused(refused) => refused.object.fd(),
        }
    }

    /// Nothing new is to be fetched for it.
    pub fn close(&self) {
        if let Opened::Data(blob) = self {
            blob.is_closed.store(true, Ordering::Relaxed);
        }
    }
}

/// A READ that has been taken from the device.
#[derive(Clone)]
pub struct ReadJob {
    /// For the answer.
    pub id: MessageId,
    /// Of which object.
    pub object: ObjectId,
    /// Which bytes.
    pub range: Range<u64>,
    /// When it was taken; all cores have one clock.
    pub taken_ns: u64,
}

/// A message between the doors of two cores.
pub enum DoorMail {
    /// Begin to serve a device: for doors that were started without one.
    Begin(Arc<Device>),
    /// Put an object into the table, count down, and tell the core that waits.
    Install {
        /// Its number.
        object: ObjectId,
        /// What it is.
        opened: Opened,
        /// Cores that have not installed it.
        missing: Arc<AtomicUsize>,
        /// Who waits for that to be none.
        opener: CoreId,
    },
    /// A sibling has installed an object.
    Installed,
    /// Take an object out of the table.
    Remove(ObjectId),
    /// Serve a read: from a core that polls for others.
    HandOver(ReadJob),
    /// Take nothing new from the device.
    Stop {
        /// What cannot be answered with data is left to a successor, not refused.
        is_hand_over: bool,
    },
}

/// One core's table.
#[derive(Default)]
pub struct Objects {
    table: HashMap<ObjectId, Opened>,
}

impl Objects {
    /// What an object is.
    pub fn find(&self, object: ObjectId) -> Option<&Opened> {
        self.table.get(&object)
    }

    /// Puts an object in.
    pub fn install(&mut self, object: ObjectId, opened: Opened) {
        self.table.insert(object, opened);
    }

    /// Takes an object out.
    pub fn remove(&mut self, object: ObjectId) -> Option<Opened> {
        self.table.remove(&object)
    }
}
