//! What a blob's address space holds, made from the files of a test image without daemon or
//! network.

use std::path::{Path, PathBuf};

use sluice::image::bootstrap::Bootstrap;
use sluice::image::context::{ContextTable, HEADER_BYTES};
use sluice::image::decode::Decoder;
use sluice::image::identity::ChunkIndex;
use sluice::image::layout::Layout;

pub struct Truth {
    pub domain: String,
    pub bootstrap: PathBuf,
    pub blob_id: String,
    pub bytes: Vec<u8>,
    pub layout: Layout,
}

/// The folder of one of the small test images.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

impl Truth {
    /// The only blob of a test image.
    pub fn of(name: &str) -> Truth {
        Truth::read(&folder(name))
    }

    /// The only blob of the image in a folder, beside the layer it was made from.
    pub fn read(folder: &Path) -> Truth {
        let name = folder.file_name().expect("a name").to_string_lossy();
        let path = folder.join("image.boot");
        let bootstrap = Bootstrap::parse(std::fs::read(&path).expect("a bootstrap")).expect("good");
        let record = bootstrap.blobs()[0].clone();
        let context = Layout::needs_context(&record).then(|| {
            let id = record.context_blob().expect("it is named");
            let file = std::fs::read(folder.join(id.as_str())).expect("the blob with the table");
            let range = record.context_range();
            let bytes = &file[range.start as usize..range.end as usize];
            let (table, header) = bytes.split_at(bytes.len() - HEADER_BYTES);
            ContextTable::parse(&record, table, header).expect("a good table")
        });
        let layout = Layout::build(&bootstrap, 0, context.as_ref()).expect("a good layout");
        let stored = match record.is_zran() {
            true => folder.parent().expect("fixtures").join("source.tar.gz"),
            false => folder.join(record.id.as_str()),
        };
        let stored = std::fs::read(stored).expect("the blob");
        let mut bytes = vec![0; layout.uncompressed_size() as usize];
        let mut decoder = Decoder::new();
        for number in 0..layout.unit_count() {
            let unit = layout.unit(number);
            let from = unit.compressed_offset as usize;
            let to = from + unit.compressed_size as usize;
            let start = unit.uncompressed_offset as usize;
            let output = &mut bytes[start..start + unit.output_size as usize];
            decoder.decode_unit(&layout, number, &stored[from..to], output).expect("it decodes");
        }
        let (domain, blob_id) = (name.into_owned(), record.id.to_string());
        let truth = Truth { domain, bootstrap: path, blob_id, bytes, layout };
        truth.chunks().for_each(|chunk| assert!(truth.is_right(chunk)));
        truth
    }

    /// The chunks that somebody may read.
    pub fn chunks(&self) -> impl Iterator<Item = ChunkIndex> + '_ {
        let all = (0..self.layout.chunk_count()).map(ChunkIndex);
        all.filter(|&chunk| self.layout.chunk(chunk).digest.is_some())
    }

    /// Where a chunk's bytes are.
    pub fn range(&self, chunk: ChunkIndex) -> std::ops::Range<u64> {
        let chunk = self.layout.chunk(chunk);
        chunk.uncompressed_offset..chunk.uncompressed_offset + u64::from(chunk.size)
    }

    fn is_right(&self, chunk: ChunkIndex) -> bool {
        let range = self.range(chunk);
        self.layout.verify(chunk, &self.bytes[range.start as usize..range.end as usize])
    }
}
