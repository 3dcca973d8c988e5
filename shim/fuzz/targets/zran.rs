//! zran: an index, and gzip streams entered in the middle, neither of which is to be believed.
#![no_main]

use images::codec::{Compressor, Digester};
use images::rafs::blob_meta::Index;
use images::rafs::{BlobTable, Chunk, Stored, ZranIndex};
use images::zran::inflate;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // The header's few numbers that count; the rest is the table and, once more, the stream.
    let Some((numbers, table)) = data.split_first_chunk::<25>() else { return };
    let mut header = vec![0; 4096];
    header[..4].copy_from_slice(&0xb10b_b10b_u32.to_le_bytes());
    header[4092..].copy_from_slice(&0xb10b_b10b_u32.to_le_bytes());
    header[40..60].copy_from_slice(&numbers[..20]);
    let zran = ZranIndex {
        blob: "0".repeat(64),
        blob_size: 0,
        offset: 0,
        stored_size: 0,
        size: 0,
        compressor: Compressor::None,
        chunks: u32::from(numbers[20]),
    };
    let chunk = |at: u8| Chunk {
        offset: u64::from(at) << 12,
        size: 4096 - u32::from(at),
        stored_offset: 0,
        stored_size: 0,
        stored: Stored::Compressed,
        digest: [0; 32],
    };
    let blob = BlobTable {
        id: "0".repeat(64),
        bytes: 1 << 20,
        compressor: Compressor::Gzip,
        digester: Digester::Sha256,
        zran: Some(zran),
        chunks: (0..numbers[21] % 8).map(chunk).collect(),
    };
    let Ok(index) = Index::parse(&blob, table, &header) else { return };
    assert_eq!(index.places.len(), blob.chunks.len());
    for place in &index.places {
        assert!((place.context as usize) < index.contexts.len());
    }
    // Memory is what a context says it needs, up to 64 MiB; not worth a run each.
    for context in index.contexts.iter().filter(|context| context.size < 1 << 20).take(4) {
        if let Ok(bytes) = inflate(context, index.dictionary(context), table) {
            assert_eq!(bytes.len(), context.size as usize);
        }
    }
});
