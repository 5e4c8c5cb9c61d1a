//! Which cookies the kernel has open, from /proc/fs/fscache.
//!
//! The cache's directory does not tell: the file of a cookie that is new has no name until the
//! cookie is let go (fs/cachefiles/namei.c, cachefiles_create_tmpfile). A cookie is in the
//! kernel's list from before its OPEN until after its file got its name
//! (fs/netfs/fscache_cookie.c). Reads only.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::config::{COOKIE_LEAVE_WAIT_MS, COOKIE_LIST_MAX_BYTES, COOKIE_LOOK_MS};
use crate::error::{Error, Result};

/// The kernel's lists.
#[derive(Clone, Debug)]
pub struct Cookies {
    directory: PathBuf,
}

impl Cookies {
    /// This kernel's.
    pub fn of_kernel() -> Cookies {
        Cookies::listed_in(Path::new("/proc/fs/fscache"))
    }

    /// Lists that somebody else keeps, as `volumes` and `cookies` in a directory.
    pub fn listed_in(directory: &Path) -> Cookies {
        Cookies { directory: directory.to_owned() }
    }

    /// Whether any image is mounted, as far as the kernel tells; if it does not, one may be.
    pub fn any_in_use(&self) -> bool {
        let list = read(&self.directory.join("volumes"));
        // VOLUME REF nCOOK ACC FL CACHE KEY: a volume without cookies is being let go.
        list.map_or(true, |list| {
            list.lines().any(|line| {
                let is_image = line.rsplit(' ').next().is_some_and(|key| key.starts_with("erofs,"));
                is_image && line.split_whitespace().nth(2).is_some_and(|count| count != "0")
            })
        })
    }

    /// Waits while the kernel is letting a cookie go: an unmount returns before that is done. Then
    /// none, or the state of what is open: the letter that the kernel shows.
    ///
    /// # Errors
    /// What the lists cannot be read for; `Busy` when they keep changing.
    pub fn settle(&self, volume: &str, cookie: &str) -> Result<Option<char>> {
        let deadline = Instant::now() + Duration::from_millis(COOKIE_LEAVE_WAIT_MS);
        let (volumes, cookies) = (self.directory.join("volumes"), self.directory.join("cookies"));
        let mut before = None;
        loop {
            let (volumes, cookies) = (read(&volumes)?, read(&cookies)?);
            // The kernel gives a list out in pages and counts its lines again for each: when a line
            // goes meanwhile, another is left out. It does not happen twice without a trace.
            let now = Some((first_words(&volumes), first_words(&cookies)));
            let is_steady = before == now;
            before = now;
            let states = states(&volumes, &cookies, volume, cookie);
            let in_use = states.iter().copied().find(|state| !LEAVING.contains(state));
            if in_use.is_some() || (is_steady && states.is_empty()) {
                return Ok(in_use);
            }
            if Instant::now() >= deadline {
                return match states.first() {
                    Some(state) => Ok(Some(*state)),
                    None => Err(Error::Busy(
                        "the kernel's list of cookies keeps changing; try again".into(),
                    )),
                };
            }
            if !states.is_empty() {
                std::thread::sleep(Duration::from_millis(COOKIE_LOOK_MS));
            }
        }
    }
}

/// Relinquishing and dropped.
const LEAVING: [char; 2] = ['R', 'D'];

fn read(path: &Path) -> Result<String> {
    let failed = |error: std::io::Error| {
        Error::io(&error, format!("{} tells whether a cookie is in use", path.display()))
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(COOKIE_LIST_MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > COOKIE_LIST_MAX_BYTES {
        return Err(Error::Unsupported(format!("{}: too long", path.display())));
    }
    // Other file systems' keys need not be text.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// What tells lines apart: the kernel counts its volumes and cookies up.
fn first_words(list: &str) -> Vec<String> {
    list.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

/// The states of all cookies of this name in volumes of this name.
fn states(volumes: &str, cookies: &str, volume: &str, cookie: &str) -> Vec<char> {
    // VOLUME REF nCOOK ACC FL CACHE KEY; the cache's name may hold spaces, an EROFS key may not.
    let is_ours = |line: &&str| line.rsplit(' ').next() == Some(volume);
    let first = |line| str::split_whitespace(line).next();
    let ours: Vec<&str> = volumes.lines().filter(is_ours).filter_map(first).collect();
    let key: String = cookie.bytes().map(|byte| format!("{byte:02x}")).collect();
    // COOKIE VOLUME REF ACT ACC S FL KEY[, AUX], the last two in hexadecimal digits.
    let state = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let is_named = words.get(7)?.trim_end_matches(',') == key;
        (is_named && ours.contains(words.get(1)?)).then(|| words[5].chars().next())?
    };
    cookies.lines().filter_map(state).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOLUMES: &str = "VOLUME   REF   nCOOK ACC FL CACHE           KEY\n\
        ======== ===== ===== === == =============== ================\n\
        00000001     3     2   1 00 default         erofs,demo\n\
        0000000a     2     1   1 00 my cache        erofs,other\n";
    const COOKIES: &str = "COOKIE   VOLUME   REF ACT ACC S FL DEF\n\
        ======== ======== === === === = == ================\n\
        00000001 00000001   2   1   0 A 4008 64656d6f, \n\
        00000002 00000001   2   1  -1 - 4008 61\n\
        00000003 0000000a   2   1   0 R 4008 62, 00ff\n";

    fn listed(volumes: &str, cookies: &str) -> (tempfile::TempDir, Cookies) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("volumes"), volumes).unwrap();
        std::fs::write(directory.path().join("cookies"), cookies).unwrap();
        let cookies = Cookies::listed_in(directory.path());
        (directory, cookies)
    }

    #[test]
    fn open_cookies_are_found_by_volume_and_name() {
        let (_directory, cookies) = listed(VOLUMES, COOKIES);
        for (volume, cookie, expected) in [
            ("erofs,demo", "demo", Some('A')),
            ("erofs,demo", "a", Some('-')),
            ("erofs,demo", "b", None),
            ("erofs,other", "demo", None),
            ("erofs,oth", "b", None),
            ("erofs,demo", "", None),
        ] {
            assert_eq!(cookies.settle(volume, cookie), Ok(expected), "{volume} {cookie}");
        }
    }

    #[test]
    fn a_cookie_that_is_let_go_is_waited_for() {
        let (directory, cookies) = listed(VOLUMES, COOKIES);
        let waiting = std::thread::spawn(move || cookies.settle("erofs,other", "b"));
        std::fs::write(directory.path().join("cookies"), "COOKIE\n").unwrap();
        assert_eq!(waiting.join().unwrap(), Ok(None));
    }

    #[test]
    fn an_image_is_mounted_while_its_volume_has_cookies() {
        assert!(listed(VOLUMES, COOKIES).1.any_in_use());
        let none = VOLUMES.replace("     2     1   1 00 my", "     2     0   1 00 my");
        assert!(listed(&none, COOKIES).1.any_in_use());
        let none = none.replace("     3     2   1 00 default", "     3     0   1 00 default");
        assert!(!listed(&none, COOKIES).1.any_in_use());
        assert!(!listed(&VOLUMES.replace("erofs,", "nfs,"), COOKIES).1.any_in_use());
        assert!(Cookies::listed_in(Path::new("/nonexistent")).any_in_use());
    }

    #[test]
    fn lists_that_are_not_there_are_an_error() {
        let nowhere = Cookies::listed_in(Path::new("/nonexistent"));
        let error = nowhere.settle("erofs,demo", "demo").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/volumes"), "{error}");
    }
}
