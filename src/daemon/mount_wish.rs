//! The body of PUT /api/sluice/v1/mounts: an image's entry, where to mount it, through which door.
//! Pure.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;

use super::entry::{self, Entry, Refusal};
use super::mounts::Door;

/// What a client wants mounted.
#[derive(Debug)]
pub struct MountWish {
    /// The image, as for PUT /api/v2/blobs.
    pub entry: Entry,
    /// The entry's JSON, for whoever has to remember it.
    pub body: Vec<u8>,
    /// An absolute path.
    pub mountpoint: PathBuf,
    /// Through which door; the daemon chooses without one.
    pub door: Option<Door>,
    /// Record what is touched first, into this file; an absolute path.
    pub trace: Option<PathBuf>,
}

impl MountWish {
    /// Reads a body.
    pub fn parse(body: &[u8]) -> Result<MountWish, Refusal> {
        #[derive(Deserialize)]
        struct Raw {
            entry: Value,
            mountpoint: PathBuf,
            door: Option<String>,
            trace: Option<PathBuf>,
        }
        let raw: Raw = entry::from_json(body).map_err(Refusal::Parse)?;
        let paths = [Some(&raw.mountpoint), raw.trace.as_ref()];
        if let Some(path) = paths.into_iter().flatten().find(|path| !path.is_absolute()) {
            return Err(Refusal::Refused(format!("{path:?} is not an absolute path")));
        }
        let door = match raw.door.as_deref() {
            None => None,
            Some(name) => Some(Door::named(name).ok_or_else(|| {
                Refusal::Refused(format!("door {name:?} is not known; fanotify and cachefiles are"))
            })?),
        };
        let body = raw.entry.to_string().into_bytes();
        let (entry, mountpoint, trace) = (Entry::parse(&body)?, raw.mountpoint, raw.trace);
        Ok(MountWish { entry, body, mountpoint, door, trace })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn wish(mountpoint: &str, door: Option<&str>) -> Result<MountWish, Refusal> {
        let entry = json!({"type": "bootstrap", "id": "i", "config_v2": {"version": 2,
            "backend": {"type": "localfs", "localfs": {"dir": "/b"}},
            "cache": {"type": "fscache"}, "metadata_path": "/m"}});
        let body = json!({"entry": entry, "mountpoint": mountpoint, "door": door});
        MountWish::parse(body.to_string().as_bytes())
    }

    #[test]
    fn a_wish_has_its_entry_and_the_entrys_json() {
        let wish = wish("/mnt", Some("fanotify")).unwrap();
        assert_eq!((wish.mountpoint, wish.door), (PathBuf::from("/mnt"), Some(Door::Fanotify)));
        assert!(Entry::parse(&wish.body).is_ok());
        assert_eq!(wish.entry.into_spec().unwrap().id, "i");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert!(matches!(wish("mnt", None), Err(Refusal::Refused(_))));
        assert!(matches!(wish("/mnt", Some("back")), Err(Refusal::Refused(_))));
        assert!(matches!(MountWish::parse(b"{}"), Err(Refusal::Parse(_))));
        assert!(MountWish::parse(br#"{"entry": {}, "mountpoint": "/m"}"#).is_err());
    }
}
