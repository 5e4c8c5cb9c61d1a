//! Bootstraps that are stored inside their own data blob.
//!
//! Builders can write image.boot at the end of the blob, found through the blob's table of contents
//! or a tar header. nydusd takes the path of such a blob for a bootstrap, the file's name up to its
//! first dot being the blob's id; so do we, for a blob that is a local file. What is found is
//! checked by the image room and written beside the image's other files, since it is read again at
//! OPEN.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::config::{CATALOG_BOOTSTRAP_MAX_BYTES, INLINED_WRITE_TRIES_MAX};
use crate::error::{Error, Result};
use crate::image::bootstrap::Bootstrap;
use crate::image::identity::BlobId;
use crate::image::toc::{BOOTSTRAP_NAME, TAIL_BYTES, Tail};

/// Where the EROFS superblock starts with its magic number.
const MAGIC_OFFSET: u64 = 1024;
const MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();

/// The bootstrap inside the blob at `path`, whose file is `file`; none when it is no blob with a
/// bootstrap at its end, or is a bootstrap itself.
pub(super) fn find(file: &File, path: &Path) -> Result<Option<Bootstrap>> {
    let failed = |error: std::io::Error| Error::io(&error, path.display().to_string());
    let size_bytes = file.metadata().map_err(failed)?.len();
    let mut magic = [0; 4];
    if size_bytes < MAGIC_OFFSET + magic.len() as u64 {
        return Ok(None);
    }
    file.read_exact_at(&mut magic, MAGIC_OFFSET).map_err(failed)?;
    if magic == MAGIC {
        return Ok(None);
    }
    let read = |start: u64, end: u64| {
        let length = end.saturating_sub(start);
        if length > CATALOG_BOOTSTRAP_MAX_BYTES as u64 {
            return Err(Error::Unsupported(format!("a bootstrap of {length} bytes")));
        }
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, start).map_err(failed)?;
        Ok(bytes)
    };
    let tail = read(size_bytes.saturating_sub(TAIL_BYTES as u64), size_bytes)?;
    let bytes = match Tail::parse(&tail, size_bytes)? {
        Tail::Plain => return Ok(None),
        Tail::Bootstrap(range) => read(range.start, range.end)?,
        Tail::Toc(toc) => {
            let entry = toc.find(BOOTSTRAP_NAME)?;
            let range = entry.range();
            entry.extract(&read(range.start, range.end)?)?
        }
    };
    let bootstrap = Bootstrap::parse(bytes)?.with_inlined_id(&blob_id(path)?)?;
    Ok(Some(bootstrap))
}

/// Writes `bootstrap` to `<work_dir>/<blob id>.image.boot`, whole or not at all.
pub(super) fn keep(bootstrap: &Bootstrap, path: &Path, work_dir: &Path) -> Result<PathBuf> {
    let target = work_dir.join(format!("{}.image.boot", blob_id(path)?));
    let failed = |error: std::io::Error| {
        Error::io(&error, format!("cannot write the bootstrap {}", target.display()))
    };
    for attempt in 0..INLINED_WRITE_TRIES_MAX {
        let part = target.with_extension(format!("boot.part{attempt}"));
        let mut file = match File::create_new(&part) {
            Ok(file) => file,
            // Another registration is writing there, or died writing.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
            Err(error) => return Err(failed(error)),
        };
        let written = file.write_all(bootstrap.bytes()).and_then(|()| file.sync_all());
        let written = written.and_then(|()| std::fs::rename(&part, &target));
        return written.map(|()| target.clone()).map_err(|error| {
            let _ = std::fs::remove_file(&part);
            failed(error)
        });
    }
    Err(Error::Busy(format!(
        "{}.part*: {INLINED_WRITE_TRIES_MAX} unfinished files are in the way; remove them",
        target.display()
    )))
}

/// nydusd's rule: the file's name up to the first dot.
fn blob_id(path: &Path) -> Result<BlobId> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    BlobId::parse(name.split('.').next().unwrap_or_default())
}
