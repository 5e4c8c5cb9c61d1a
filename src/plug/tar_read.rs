//! A tar stream, member by member: extensions applied, sparse files laid out, everything bounded.
//!
//! `member` gives a member and throws away what is left of the one before; `copy` gives the content
//! of a regular file in runs, each with its place, and leaves out the holes. Nothing is kept but
//! one head and its extensions. An archive may end without its two blocks of zeros, but not within
//! a member.

use std::io::Read;

use super::tar::{
    BLOCK_BYTES, Head, Kind, Member, XATTR_PREFIX, decimal, parse_head, parse_records, parse_time,
    size,
};
use crate::config;
use crate::error::{Error, Result};

/// Reads members from a stream.
pub struct TarReader<R> {
    source: R,
    /// Bytes of the member's content still in the stream, and of the padding behind it.
    content: u64,
    padding: u64,
    /// Where the stored bytes of a sparse file belong; None for a file without holes.
    sparse: Option<Vec<Run>>,
}

/// So many stored bytes, at this place of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    offset: u64,
    length: u64,
}

/// What extensions say about the member that follows them.
#[derive(Default)]
struct Extensions {
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    records: Vec<(Vec<u8>, Vec<u8>)>,
}

impl<R: Read> TarReader<R> {
    /// Reads from the first byte of `source`.
    pub fn new(source: R) -> Self {
        TarReader { source, content: 0, padding: 0, sparse: None }
    }

    /// The stream, to read what stands behind the archive's end.
    pub fn into_inner(self) -> R {
        self.source
    }

    /// The next member; None at the archive's end.
    pub fn member(&mut self) -> Result<Option<Member>> {
        self.skip(self.content + self.padding)?;
        let mut extensions = Extensions::default();
        for _ in 0..config::UNPACK_EXTENSIONS_MAX {
            (self.content, self.padding) = (0, 0);
            let Some((head, block)) = self.head()? else { return Ok(None) };
            match head.flag {
                b'L' => extensions.long_path = Some(self.name(&head)?),
                b'K' => extensions.long_link = Some(self.name(&head)?),
                b'x' | b'X' => {
                    let bytes = self.extension(&head)?;
                    let records = parse_records(&bytes)?.into_iter();
                    extensions.records.extend(records.map(|(k, v)| (k.to_vec(), v.to_vec())));
                }
                // Global extensions and the names of volumes: Docker passes over them, too.
                b'g' | b'V' => self.skip(padded(head.member.size)?)?,
                b'0' | 0 | b'1'..=b'7' | b'D' | b'S' => {
                    return self.complete(head, &block, extensions).map(Some);
                }
                flag => {
                    return Err(Error::Unsupported(format!(
                        "a layer has a member of the unknown kind {:?}",
                        char::from(flag)
                    )));
                }
            }
        }
        Err(Error::Malformed("a layer has one extension after the other and no member".to_owned()))
    }

    /// Hands the content of the regular file that `member` gave last to `sink`, with its place.
    pub fn copy(&mut self, mut sink: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let whole = Run { offset: 0, length: self.content };
        let runs = self.sparse.take().unwrap_or_else(|| vec![whole]);
        let mut buffer = vec![0; config::TAR_COPY_BYTES];
        for Run { mut offset, mut length } in runs {
            if length > self.content {
                return Err(broken("a sparse file has fewer bytes than its map"));
            }
            while length > 0 {
                let count = length.min(buffer.len() as u64) as usize;
                self.fill(&mut buffer[..count])?;
                self.content -= count as u64;
                sink(offset, &buffer[..count])?;
                offset += count as u64;
                length -= count as u64;
            }
        }
        Ok(())
    }

    /// None where the archive ends: at two blocks of zeros, or at the stream's end.
    fn head(&mut self) -> Result<Option<(Head, [u8; BLOCK_BYTES])>> {
        for _ in 0..2 {
            let mut block = [0; BLOCK_BYTES];
            if !self.fill_or_end(&mut block)? {
                return Ok(None);
            }
            if let Some(head) = parse_head(&block)? {
                return Ok(Some((head, block)));
            }
        }
        Ok(None)
    }

    /// The member of a head, its extensions applied.
    fn complete(
        &mut self,
        head: Head,
        block: &[u8; BLOCK_BYTES],
        extensions: Extensions,
    ) -> Result<Member> {
        let Head { flag, mut member } = head;
        let mut stored = member.size;
        let mut sparse = None;
        if flag == b'S' {
            sparse = Some(self.old_map(block)?);
            member.size = size(&block[483..495])?;
        }
        let Extensions { long_path, long_link, records } = extensions;
        member.path = long_path.unwrap_or(member.path);
        member.link = long_link.unwrap_or(member.link);
        let map = apply(&mut member, &mut stored, records)?;
        // As Go sees it: only files have content, whatever the size field of another kind says.
        if member.kind != Kind::File {
            member.size = 0;
            stored = 0;
        }
        (self.content, self.padding) = (stored, padded(stored)? - stored);
        self.sparse = match map {
            SparseMap::None => sparse,
            SparseMap::Records(runs) => Some(runs),
            SparseMap::InContent => Some(self.content_map()?),
        };
        if let Some(runs) = &self.sparse {
            check_runs(runs, member.size)?;
        } else if member.kind == Kind::File {
            member.size = stored;
        }
        Ok(member)
    }

    /// GNU's old form: four runs in the head, and while a byte says so 21 more in a further block.
    fn old_map(&mut self, head: &[u8; BLOCK_BYTES]) -> Result<Vec<Run>> {
        let mut runs = old_runs(&head[386..482])?;
        let mut goes_on = head[482] != 0;
        while goes_on {
            let mut block = [0; BLOCK_BYTES];
            self.fill(&mut block)?;
            runs.extend(old_runs(&block[..504])?);
            goes_on = block[504] != 0;
            if runs.len() > config::TAR_SPARSE_RUNS_MAX {
                return Err(too_many_runs());
            }
        }
        Ok(runs)
    }

    /// GNU's pax form 1.0: the map is text at the front of the content, in whole blocks.
    fn content_map(&mut self) -> Result<Vec<Run>> {
        let mut text = Vec::new();
        let (mut numbers, mut at) = (Vec::new(), 0);
        let mut wanted = 1;
        while numbers.len() < wanted {
            match text[at..].iter().position(|&byte| byte == b'\n') {
                Some(end) => {
                    let value = decimal(&text[at..at + end]);
                    numbers.push(value.ok_or_else(|| broken("the map of a sparse file"))?);
                    at += end + 1;
                    wanted = numbers[0].saturating_mul(2).saturating_add(1) as usize;
                }
                None if self.content < BLOCK_BYTES as u64 => {
                    return Err(broken("the map of a sparse file"));
                }
                None => {
                    let mut block = [0; BLOCK_BYTES];
                    self.fill(&mut block)?;
                    self.content -= BLOCK_BYTES as u64;
                    text.drain(..std::mem::take(&mut at));
                    text.extend(block);
                }
            }
            if wanted > 2 * config::TAR_SPARSE_RUNS_MAX {
                return Err(too_many_runs());
            }
        }
        Ok(pairs(&numbers[1..]))
    }

    fn name(&mut self, head: &Head) -> Result<Vec<u8>> {
        let mut bytes = self.extension(head)?;
        bytes.truncate(bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len()));
        Ok(bytes)
    }

    fn extension(&mut self, head: &Head) -> Result<Vec<u8>> {
        let size = head.member.size;
        if size > config::UNPACK_EXTENSION_MAX_BYTES as u64 {
            return Err(Error::Unsupported(format!(
                "a layer has an extension of {size} bytes; at most {} are read",
                config::UNPACK_EXTENSION_MAX_BYTES
            )));
        }
        let mut bytes = vec![0; padded(size)? as usize];
        self.fill(&mut bytes)?;
        bytes.truncate(size as usize);
        Ok(bytes)
    }

    fn skip(&mut self, count: u64) -> Result<()> {
        let skipped = std::io::copy(&mut (&mut self.source).take(count), &mut std::io::sink())
            .map_err(|error| Error::io(&error, "the layer's tar stream broke off"))?;
        (self.content, self.padding) = (0, 0);
        match skipped == count {
            true => Ok(()),
            false => Err(broken("it ends within a member")),
        }
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        match self.fill_or_end(buffer)? || buffer.is_empty() {
            true => Ok(()),
            false => Err(broken("it ends within a member")),
        }
    }

    /// False at the stream's end, if that is where `buffer` would begin.
    fn fill_or_end(&mut self, buffer: &mut [u8]) -> Result<bool> {
        let mut count = 0;
        while count < buffer.len() {
            match self.source.read(&mut buffer[count..]) {
                Ok(0) if count == 0 => return Ok(false),
                Ok(0) => return Err(broken("it ends within a block")),
                Ok(more) => count += more,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(Error::io(&error, "the layer's tar stream broke off"));
                }
            }
        }
        Ok(true)
    }
}

/// Where the map of a sparse file in pax form is.
enum SparseMap {
    None,
    Records(Vec<Run>),
    InContent,
}

/// Applies pax records: later ones win, an empty value takes an earlier one back.
fn apply(
    member: &mut Member,
    stored: &mut u64,
    records: Vec<(Vec<u8>, Vec<u8>)>,
) -> Result<SparseMap> {
    let plain = |value: &[u8], what: &str| {
        decimal(value).ok_or_else(|| broken(&format!("the {what} in a pax extension")))
    };
    let narrow = |value: &[u8], what: &str| {
        u32::try_from(plain(value, what)?).map_err(|_| broken(&format!("the {what} of a member")))
    };
    let (mut runs, mut map, mut sparse_size) = (Vec::new(), SparseMap::None, None);
    // A sparse file's `path` is a made-up one, whichever of the two comes first.
    let mut sparse_name = None;
    for (key, value) in records {
        match key.as_slice() {
            _ if value.is_empty() && !key.starts_with(XATTR_PREFIX) => {}
            b"path" => member.path = value,
            b"GNU.sparse.name" => sparse_name = Some(value),
            b"linkpath" => member.link = value,
            b"size" => *stored = plain(&value, "size")?,
            b"uid" => member.uid = narrow(&value, "owner")?,
            b"gid" => member.gid = narrow(&value, "group")?,
            b"mtime" => member.mtime = parse_time(&value)?,
            b"GNU.sparse.major" if value == b"1" => map = SparseMap::InContent,
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                sparse_size = Some(plain(&value, "size of a sparse file")?);
            }
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                runs.push(plain(&value, "map of a sparse file")?);
            }
            b"GNU.sparse.map" => {
                let numbers = value.split(|&byte| byte == b',');
                for number in numbers {
                    runs.push(plain(number, "map of a sparse file")?);
                }
            }
            _ => {
                if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
                    member.xattrs.retain(|(other, _)| other != name);
                    member.xattrs.push((name.to_vec(), value));
                }
            }
        }
    }
    member.path = sparse_name.unwrap_or_else(|| std::mem::take(&mut member.path));
    let Some(size) = sparse_size else {
        return match map {
            SparseMap::None if runs.is_empty() => Ok(SparseMap::None),
            _ => Err(broken("a sparse file without a size")),
        };
    };
    member.size = size;
    if runs.len() > 2 * config::TAR_SPARSE_RUNS_MAX {
        return Err(too_many_runs());
    }
    Ok(match map {
        SparseMap::InContent => SparseMap::InContent,
        _ => SparseMap::Records(pairs(&runs)),
    })
}

/// Runs of 12 bytes of offset and 12 of length; an empty one ends the list.
fn old_runs(field: &[u8]) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    for pair in field.chunks_exact(24).take_while(|pair| pair[0] != 0 || pair[12] != 0) {
        runs.push(Run { offset: size(&pair[..12])?, length: size(&pair[12..])? });
    }
    Ok(runs)
}

fn pairs(numbers: &[u64]) -> Vec<Run> {
    numbers.chunks_exact(2).map(|pair| Run { offset: pair[0], length: pair[1] }).collect()
}

/// Runs come in order, do not overlap and stay within the file.
fn check_runs(runs: &[Run], size: u64) -> Result<()> {
    let mut end = 0;
    for run in runs {
        let next = run.offset.checked_add(run.length);
        match next {
            Some(next) if run.offset >= end && next <= size => end = next,
            _ => return Err(broken("the map of a sparse file goes back or beyond its end")),
        }
    }
    Ok(())
}

fn padded(size: u64) -> Result<u64> {
    size.checked_next_multiple_of(BLOCK_BYTES as u64)
        .filter(|&size| i64::try_from(size).is_ok())
        .ok_or_else(|| broken("the size of a member"))
}

fn broken(what: &str) -> Error {
    Error::Malformed(format!("the layer's tar is damaged: {what}"))
}

fn too_many_runs() -> Error {
    Error::Unsupported(format!(
        "a sparse file in a layer has more than {} runs of data",
        config::TAR_SPARSE_RUNS_MAX
    ))
}
