//! RAFS metadata: whatever a bootstrap says, what is read of it is in order, and a cache file's table takes it or leaves it.
#![no_main]

use std::io::Read;
use std::sync::LazyLock;

use images::rafs::{Image, MAX_CHUNK, lookup, v5_as_erofs};
use images::table::Table;
use libfuzzer_sys::fuzz_target;

/// Images of a few files, of versions 6 and 5.
static SAMPLES: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| {
    [&include_bytes!("../samples/v6.boot.gz")[..], include_bytes!("../samples/v5.boot.gz")].map(|gzip| {
        let mut bytes = Vec::new();
        flate2::read::GzDecoder::new(gzip).read_to_end(&mut bytes).expect("a sample");
        bytes
    })
});

fuzz_target!(|data: &[u8]| {
    let Some((kind, rest)) = data.split_first() else { return };
    let bytes = match kind % 4 {
        0 => rest.to_vec(),
        which => {
            // A sample with some numbers changed: where, how many bytes, and them.
            let mut bytes = SAMPLES[usize::from(which) % 2].clone();
            for edit in rest.chunks_exact(11) {
                let at = usize::from(u16::from_le_bytes([edit[0], edit[1]])) % bytes.len();
                let len = usize::from(edit[2] % 9).min(bytes.len() - at);
                bytes[at..at + len].copy_from_slice(&edit[3..3 + len]);
            }
            if kind & 0x80 != 0 {
                bytes.truncate(usize::from(*kind) << 7);
            }
            bytes
        }
    };
    let Ok(image) = Image::parse(&bytes) else { return };
    assert!(image.blobs.len() <= 128);
    if image.version == 5 {
        as_erofs(&bytes, &image);
    }
    for chunk in &image.prefetch {
        assert!((chunk.chunk as usize) < image.blobs[chunk.blob as usize].chunks.len());
    }
    for blob in &image.blobs {
        assert!(blob.id.len() == 64 && blob.id.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let mut end = 0;
        for chunk in &blob.chunks {
            assert!(chunk.offset >= end && chunk.size >= 1 && chunk.size <= MAX_CHUNK);
            end = chunk.end();
        }
        assert!(end <= blob.bytes);
        assert_eq!(blob.chunks_in(0, blob.bytes).len(), blob.chunks.len());
        // A map of a sparse blob of terabytes would be the fuzzer's memory, not a defect.
        if blob.bytes < 1 << 30 {
            table(blob);
        }
    }
});

/// What a guest mounts in place of a version 5: not much larger, and readable where it was made at all.
fn as_erofs(bytes: &[u8], image: &Image) {
    let Ok(erofs) = v5_as_erofs(bytes, image) else { return };
    assert!(erofs.len() % 4096 == 0 && erofs.len() < (4 * bytes.len()).max(1 << 20), "{} bytes", erofs.len());
    for path in ["", "etc", "etc/passwd", "etc/group"] {
        // Large files are not looked up.
        let found = lookup::extents_of(&erofs, path).ok().flatten();
        for extent in found.into_iter().flatten() {
            let blob = &image.blobs[extent.blob.expect("no holes") as usize];
            assert!(extent.offset + extent.len <= blob.bytes);
        }
    }
}

fn table(blob: &images::rafs::BlobTable) {
    let mut table = Table::new(blob.bytes);
    assert_eq!(table.merge(blob), Ok(!blob.chunks.is_empty()));
    for chunk in &blob.chunks {
        table.set_done(chunk.offset);
        assert!(table.is_done(chunk.offset));
    }
    assert_eq!(table.merge(blob), Ok(false), "it agrees with itself, whatever is ready");
    let mut again = Table::from_bytes(&table.to_bytes()).expect("whole");
    again.load_ready(table.ready());
    assert_eq!(again, table);
}
