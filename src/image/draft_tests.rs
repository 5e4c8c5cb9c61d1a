//! A writer of small RAFS v6 images, for tests: every kind of blob the fixtures lack.
//!
//! Written from the description of the format, not from the readers beside it, so that a mistake
//! in one shows. Test code: it panics where product code would answer an error.

use super::Bootstrap;
use super::blob_table::BlobFeatures;
use super::cipher::Cipher;
use super::codec::Compressor;
use super::digest::DigestAlgorithm;
use super::specimen_tests::Specimen;
use std::io::Write;

/// What an image is to be made of.
#[derive(Clone)]
pub(crate) struct Draft {
    /// The data of each chunk, and whether the bootstrap lists it.
    pub(crate) chunks: Vec<(Vec<u8>, bool)>,
    pub(crate) compressor: Compressor,
    pub(crate) digest: DigestAlgorithm,
    pub(crate) id: String,
    /// Context table entries of 24 bytes, not 16.
    pub(crate) version_2: bool,
    /// Chunks under 1000 bytes are compressed together, so many at a time.
    pub(crate) batch: Option<usize>,
    /// Key and tweak.
    pub(crate) key: Option<([u8; 32], [u8; 16])>,
    /// The blob is gzip members with so many chunks each; contexts span two members.
    pub(crate) zran_member: Option<usize>,
}

pub(crate) const CHUNK_SIZE: u32 = 0x10000;
const META: usize = 8192;
const ROOT: usize = META + 128 * 32;

impl Draft {
    /// Chunks of these sizes, all listed, in a plain v1 blob.
    pub(crate) fn new(sizes: &[usize]) -> Self {
        let chunk = |(number, &size): (usize, &usize)| {
            // Compressible, and different for every chunk.
            let data = (0..size).map(|at| ((at / 7) ^ (number * 31)) as u8).collect();
            (data, true)
        };
        Draft {
            chunks: sizes.iter().enumerate().map(chunk).collect(),
            compressor: Compressor::Zstd,
            digest: DigestAlgorithm::Blake3,
            id: "ab".repeat(32),
            version_2: false,
            batch: None,
            key: None,
            zran_member: None,
        }
    }

    pub(crate) fn compressor(self, compressor: Compressor) -> Self {
        Draft { compressor, ..self }
    }

    /// The image, parsed. Panics if our own parser refuses it.
    pub(crate) fn build(&self) -> Specimen {
        let (bytes, blob, meta) = self.write();
        let bootstrap = Bootstrap::parse(bytes).unwrap();
        let (blobs, metas) = match self.chunks.is_empty() {
            true => (vec![], vec![]),
            false => (vec![blob], vec![meta]),
        };
        Specimen { bootstrap, blobs, metas }
    }

    /// Bootstrap, blob, and the file that has the context table.
    pub(crate) fn write(&self) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
        let body = Body::write(self);
        let mut out = vec![0; ROOT];
        self.write_superblocks(&mut out);
        if !self.chunks.is_empty() {
            self.write_blob_record(&mut out, &body);
        }
        self.write_tree(&mut out, &body);
        out.resize(out.len().next_multiple_of(4096), 0);
        let table = out.len();
        let mut count = 0;
        for (index, chunk) in body.chunks.iter().enumerate().filter(|(_, chunk)| chunk.listed) {
            out.extend(self.digest.digest(&self.chunks[index].0).0);
            let member = chunk.flags & 4 != 0;
            let (offset, stored) = if member { (0, 0) } else { (chunk.offset, chunk.stored) };
            // Context table flags to chunk table flags.
            let flags = chunk.flags & 1 | (chunk.flags & 8) >> 1 | (chunk.flags & 4) << 1;
            for word in [0, flags as u32, stored, chunk.size] {
                out.extend(word.to_le_bytes());
            }
            for long in [offset, chunk.start, 0] {
                out.extend(long.to_le_bytes());
            }
            out.extend((index as u32).to_le_bytes());
            out.extend([0; 4]);
            count += 1;
        }
        put(&mut out, 1152 + 24, &(table as u64).to_le_bytes());
        put(&mut out, 1152 + 32, &(count as u64 * 80).to_le_bytes());
        out.resize(out.len().next_multiple_of(4096), 0);
        let meta = if self.zran_member.is_some() { body.meta } else { body.blob.clone() };
        (out, body.blob, meta)
    }

    fn features(&self) -> u32 {
        let mut features = BlobFeatures::ALIGNED | 0x4000_0000;
        features |= if self.version_2 { BlobFeatures::CHUNK_INFO_V2 } else { 0 };
        features |= if self.batch.is_some() { BlobFeatures::BATCH } else { 0 };
        features |= if self.key.is_some() { BlobFeatures::ENCRYPTED } else { 0 };
        match self.zran_member {
            Some(_) => features | BlobFeatures::ZRAN | BlobFeatures::SEPARATE,
            None => features,
        }
    }

    fn write_superblocks(&self, out: &mut [u8]) {
        let blobs = u16::from(!self.chunks.is_empty());
        let compressor = [1u64, 2, 0x40, 0x80][number(self.compressor) as usize];
        let digest = if self.digest == DigestAlgorithm::Blake3 { 4 } else { 8 };
        put(out, 1024, &0xe0f5_e1e2u32.to_le_bytes());
        put(out, 1024 + 8, &0x4000_0000u32.to_le_bytes());
        put(out, 1024 + 12, &[12, 0, 128, 0]);
        put(out, 1024 + 16, &(1 + self.chunks.len() as u64).to_le_bytes());
        put(out, 1024 + 40, &((META / 4096) as u32).to_le_bytes());
        put(out, 1024 + 80, &0xcu32.to_le_bytes());
        put(out, 1024 + 86, &blobs.to_le_bytes());
        put(out, 1024 + 88, &11u16.to_le_bytes());
        put(out, 1152, &(compressor | digest | 0x0100_0010).to_le_bytes());
        put(out, 1152 + 8, &4096u64.to_le_bytes());
        put(out, 1152 + 16, &(256 * u32::from(blobs)).to_le_bytes());
        put(out, 1152 + 20, &CHUNK_SIZE.to_le_bytes());
    }

    fn write_blob_record(&self, out: &mut [u8], body: &Body) {
        put(out, 1408, self.id.as_bytes());
        put(out, 1408 + 64, &((body.space / 4096) as u32).to_le_bytes());
        put(out, 4096, self.id.as_bytes());
        let words = [
            0,
            CHUNK_SIZE,
            self.chunks.len() as u32,
            number(self.compressor),
            u32::from(self.digest == DigestAlgorithm::Sha256),
            self.features(),
        ];
        for (at, word) in words.iter().enumerate() {
            put(out, 4096 + 64 + at * 4, &word.to_le_bytes());
        }
        put(out, 4096 + 88, &(body.blob.len() as u64).to_le_bytes());
        put(out, 4096 + 96, &body.space.to_le_bytes());
        put(out, 4096 + 108, &body.ci_compressor.to_le_bytes());
        for (at, long) in [body.ci_offset, body.ci_stored, body.ci_size].iter().enumerate() {
            put(out, 4096 + 112 + at * 8, &long.to_le_bytes());
        }
        match self.key {
            Some((key, tweak)) => {
                put(out, 4096 + 168, &key);
                put(out, 4096 + 200, &tweak);
                put(out, 4096 + 216, &1u32.to_le_bytes());
            }
            None if self.zran_member.is_some() => {
                let digest = DigestAlgorithm::Sha256.digest(&body.meta);
                put(out, 4096 + 168, &digest.0);
                put(out, 4096 + 200, &(body.meta.len() as u64).to_le_bytes());
            }
            None => {}
        }
    }

    /// A root directory with one file `c0000` for each chunk, 32 of them at most.
    fn write_tree(&self, out: &mut Vec<u8>, body: &Body) {
        let chunks: Vec<_> = body.chunks.iter().enumerate().filter(|(_, c)| c.listed).collect();
        let chunks = &chunks[..chunks.len().min(32)];
        let mut names = vec![(b".".to_vec(), 128, 2), (b"..".to_vec(), 128, 2)];
        let first = 128 + 40;
        for (position, (index, _)) in chunks.iter().enumerate() {
            let name = format!("c{index:04}").into_bytes();
            names.push((name, first + position as u64 * 3, 1u8));
        }
        let mut directory = Vec::new();
        let mut name_at = names.len() * 12;
        for (name, nid, kind) in &names {
            directory.extend(nid.to_le_bytes());
            directory.extend((name_at as u16).to_le_bytes());
            directory.extend([*kind, 0]);
            name_at += name.len();
        }
        directory.extend(names.iter().flat_map(|(name, ..)| name.clone()));
        assert!(64 + directory.len() <= 40 * 32);
        out.extend(inode(2, 0o40755, directory.len() as u64, 0, 2));
        out.extend(directory);
        out.resize(META + first as usize * 32, 0);
        for (index, chunk) in chunks {
            let bits = CHUNK_SIZE.ilog2() - 12;
            out.extend(inode(4, 0o100_644, chunk.size.into(), 0x20 | bits, 1));
            out.extend((*index as u16).to_le_bytes());
            out.extend([1, 0]);
            out.extend(((chunk.start / 4096) as u32).to_le_bytes());
            out.resize(out.len().next_multiple_of(32), 0);
        }
    }
}

fn inode(layout: u16, mode: u16, size: u64, address: u32, links: u32) -> Vec<u8> {
    let mut out = vec![0; 64];
    put(&mut out, 0, &(layout << 1 | 1).to_le_bytes());
    put(&mut out, 4, &mode.to_le_bytes());
    put(&mut out, 8, &size.to_le_bytes());
    put(&mut out, 16, &address.to_le_bytes());
    put(&mut out, 44, &links.to_le_bytes());
    out
}

pub(crate) fn put(out: &mut [u8], at: usize, field: &[u8]) {
    out[at..at + field.len()].copy_from_slice(field);
}

fn number(compressor: Compressor) -> u32 {
    match compressor {
        Compressor::None => 0,
        Compressor::Lz4Block => 1,
        Compressor::Gzip => 2,
        Compressor::Zstd => 3,
    }
}

/// A chunk as placed in a blob; `flags` and `data` as a v2 context table has them.
struct Placed {
    start: u64,
    size: u32,
    offset: u64,
    stored: u32,
    flags: u64,
    data: u64,
    listed: bool,
}

/// The blob file and what the blob table says of it.
#[derive(Default)]
struct Body {
    blob: Vec<u8>,
    meta: Vec<u8>,
    chunks: Vec<Placed>,
    contexts: Vec<u8>,
    space: u64,
    ci_compressor: u32,
    ci_offset: u64,
    ci_stored: u64,
    ci_size: u64,
}

impl Body {
    fn write(draft: &Draft) -> Self {
        let mut body = Body::default();
        let mut at = 0;
        while at < draft.chunks.len() {
            let run = match (draft.batch, draft.zran_member) {
                (Some(most), _) => {
                    let small = |(data, _): &&(Vec<u8>, bool)| data.len() < 1000;
                    draft.chunks[at..].iter().take(most).take_while(small).count()
                }
                (_, Some(members)) => (draft.chunks.len() - at).min(2 * members),
                _ => 0,
            };
            match (run, draft.zran_member) {
                (0, _) => body.add_own(draft, at),
                (_, None) => body.add_batch(draft, at..at + run),
                (_, Some(members)) => body.add_zran(draft, at..at + run, members),
            }
            at += run.max(1);
        }
        body.write_context_table(draft);
        body
    }

    fn place(&mut self, draft: &Draft, index: usize, stored: u32, flags: u64, data: u64) {
        let (bytes, listed) = &draft.chunks[index];
        let offset = self.blob.len() as u64;
        let size = bytes.len() as u32;
        let start = self.space;
        self.space += u64::from(size).next_multiple_of(4096);
        self.chunks.push(Placed { start, size, offset, stored, flags, data, listed: *listed });
    }

    fn add_own(&mut self, draft: &Draft, index: usize) {
        let (packed, compressed) = pack(draft.compressor, &draft.chunks[index].0);
        let stored = seal(draft, &packed);
        let flags = u64::from(compressed) | if draft.key.is_some() { 8 } else { 0 };
        self.place(draft, index, stored.len() as u32, flags, 0);
        self.blob.extend(stored);
    }

    fn add_batch(&mut self, draft: &Draft, range: std::ops::Range<usize>) {
        let number = (self.contexts.len() / 40) as u64;
        let mut plain = Vec::new();
        for index in range {
            let flags = 1 | 4 | if draft.key.is_some() { 8 } else { 0 };
            self.place(draft, index, 0, flags, number << 32 | plain.len() as u64);
            plain.extend(&draft.chunks[index].0);
        }
        let stored = seal(draft, &pack(draft.compressor, &plain).0);
        self.contexts.extend((stored.len() as u32).to_le_bytes());
        self.contexts.extend((plain.len() as u32).to_le_bytes());
        self.contexts.extend([0; 32]);
        self.blob.extend(stored);
    }

    /// One context over as many gzip members as it takes, with 512 bytes of "tar header" before
    /// each chunk.
    fn add_zran(&mut self, draft: &Draft, range: std::ops::Range<usize>, per_member: usize) {
        let number = (self.contexts.len() / 40) as u64;
        let mut inside = 0;
        let mut stream = Vec::new();
        for member in draft.chunks[range.clone()].chunks(per_member) {
            let mut encoder = flate2::GzBuilder::new()
                .filename("name")
                .extra(vec![1, 2, 3])
                .write(Vec::new(), flate2::Compression::default());
            for (data, _) in member {
                encoder.write_all(&[b't'; 512]).unwrap();
                encoder.write_all(data).unwrap();
            }
            stream.extend(encoder.finish().unwrap());
        }
        for index in range {
            inside += 512;
            self.place(draft, index, 0, 1 | 2, number << 32 | inside);
            inside += draft.chunks[index].0.len() as u64;
        }
        // The header of the first member is not part of the context: 10 bytes, extra, name.
        let header = 10 + 2 + 3 + 5;
        self.contexts.extend((self.blob.len() as u64 + header).to_le_bytes());
        self.contexts.extend([0; 16]);
        self.contexts.extend((stream.len() as u32 - header as u32).to_le_bytes());
        self.contexts.extend((inside as u32).to_le_bytes());
        self.contexts.extend([0; 8]);
        self.blob.extend(stream);
    }

    fn write_context_table(&mut self, draft: &Draft) {
        let mut table = Vec::new();
        for chunk in &self.chunks {
            let (size, stored) = (u64::from(chunk.size - 1), u64::from(chunk.stored));
            if draft.version_2 {
                let uncompressed = chunk.start >> 12 | size << 32 | chunk.flags << 56;
                let compressed = chunk.offset | stored << 40;
                for long in [uncompressed, compressed, chunk.data] {
                    table.extend(long.to_le_bytes());
                }
            } else {
                let stored = stored - 1;
                let spread = |size: u64, high: u64| (size & 0xfffff) << 44 | (size >> 20) << high;
                table.extend((chunk.start | spread(size, 8)).to_le_bytes());
                table.extend((chunk.offset | spread(stored, 40)).to_le_bytes());
            }
        }
        let contexts_at = table.len() as u64;
        table.extend(&self.contexts);
        self.ci_size = table.len() as u64;
        let (packed, compressed) = pack(draft.compressor, &table);
        self.ci_compressor = if compressed { number(draft.compressor) } else { 0 };
        let stored = seal(draft, &packed);
        self.ci_stored = stored.len() as u64;
        let zran = draft.zran_member.is_some();
        self.ci_offset = if zran { 0 } else { self.blob.len() as u64 };
        let mut header = vec![0; 4096];
        for at in [0, 4092] {
            put(&mut header, at, &0xb10b_b10bu32.to_le_bytes());
        }
        put(&mut header, 8, &self.ci_compressor.to_le_bytes());
        put(&mut header, 12, &(self.chunks.len() as u32).to_le_bytes());
        let contexts = self.contexts.len() as u64;
        let longs = [self.ci_offset, self.ci_stored, self.ci_size, contexts_at, contexts];
        for (position, long) in longs.iter().enumerate() {
            put(&mut header, 16 + position * 8, &long.to_le_bytes());
        }
        put(&mut header, 56, &((contexts / 40) as u32).to_le_bytes());
        let target = if zran { &mut self.meta } else { &mut self.blob };
        target.extend(stored);
        target.extend(seal(draft, &header));
    }
}

/// The smaller of the compressed and the plain form, and whether it is the former.
pub(crate) fn pack(compressor: Compressor, plain: &[u8]) -> (Vec<u8>, bool) {
    let packed = match compressor {
        Compressor::None => plain.to_vec(),
        Compressor::Lz4Block => lz4_flex::block::compress(plain),
        Compressor::Zstd => zstd::bulk::compress(plain, 3).unwrap(),
        Compressor::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Default::default());
            encoder.write_all(plain).unwrap();
            encoder.finish().unwrap()
        }
    };
    match packed.len() < plain.len() {
        true => (packed, true),
        false => (plain.to_vec(), false),
    }
}

fn seal(draft: &Draft, plain: &[u8]) -> Vec<u8> {
    match draft.key {
        Some((key, tweak)) => Cipher::aes_128_xts(key, tweak).encrypt(plain),
        None => plain.to_vec(),
    }
}
