//! Reads a file past what the kernel here has of it, and prints how long that took: `benches/src/nydus/read.rs`.

use std::fs::File;
use std::io::Read as _;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt as _;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{Advice, fadvise};

const CHUNK: usize = 1 << 20;
const BLOCK: usize = 4096;

/// A file of whose content no page is in memory.
fn open(path: &str, advice: Advice) -> Result<File> {
    let file = File::open(path).with_context(|| path.to_owned())?;
    fadvise(&file, 0, None::<NonZeroU64>, Advice::DontNeed)?;
    fadvise(&file, 0, None::<NonZeroU64>, advice)?;
    Ok(file)
}

/// From its beginning to its end; prints bytes and microseconds.
pub fn sequential(path: &str) -> Result<()> {
    let mut file = open(path, Advice::Sequential)?;
    let mut chunk = vec![0; CHUNK];
    let (start, mut total) = (Instant::now(), 0);
    loop {
        match file.read(&mut chunk)? {
            0 => break,
            n => total += n,
        }
    }
    println!("{total} {}", start.elapsed().as_micros());
    Ok(())
}

/// `count` blocks in an order that looks random and is the same each time; prints the nanoseconds of each.
pub fn random(path: &str, count: u64) -> Result<()> {
    let file = open(path, Advice::Random)?;
    let blocks = file.metadata()?.len() / BLOCK as u64;
    ensure!(blocks >= count, "{path} has {blocks} blocks");
    let mut block = [0; BLOCK];
    let mut times = Vec::new();
    for number in 0..count {
        // Steps of the golden ratio: spread over the file, never close to the last one, and none twice.
        let at = ((number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) * blocks) >> 32;
        let start = Instant::now();
        file.read_exact_at(&mut block, at * BLOCK as u64)?;
        times.push(start.elapsed().as_nanos().to_string());
    }
    println!("{}", times.join(" "));
    Ok(())
}
