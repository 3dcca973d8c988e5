//! Fetching before anybody asks: what earlier starts read, the image's own list, and in the end, if wanted, all of it.

use std::sync::Arc;

use super::open::OpenImage;
use crate::config::Ahead;
use crate::fetch::Why;
use crate::rafs::ChunkRef;
use crate::source::Limit;

/// Stored bytes that are fetched at once.
const STEP: u64 = 1 << 20;

/// Fetches ahead for an image, until it is done or the image is closed (then this is dropped).
pub async fn run(image: Arc<OpenImage>, ahead: Ahead) {
    let limit = Limit::new(ahead.rate);
    if ahead.listed {
        let lists = [image.trace.known(), &image.parsed.prefetch];
        for list in lists {
            let mut rest = list;
            while !rest.is_empty() {
                let (step, behind) = rest.split_at(step_len(&image, rest));
                rest = behind;
                if !fetch(&image, step, &limit).await {
                    return;
                }
            }
        }
    }
    if ahead.all {
        for (number, blob) in (0..).zip(&image.blobs) {
            let all: Vec<ChunkRef> =
                (0..).take(blob.table.chunks.len()).map(|chunk| ChunkRef { blob: number, chunk }).collect();
            let mut rest = all.as_slice();
            while !rest.is_empty() {
                let (step, behind) = rest.split_at(step_len(&image, rest));
                rest = behind;
                if !fetch(&image, step, &limit).await {
                    return;
                }
            }
        }
    }
}

/// How many chunks make a step: neighbours in one blob, up to [`STEP`] bytes.
fn step_len(image: &OpenImage, list: &[ChunkRef]) -> usize {
    let (mut count, mut bytes) = (0, 0);
    for (index, next) in list.iter().enumerate() {
        let follows = index == 0 || {
            let last = list[index - 1];
            last.blob == next.blob && last.chunk.checked_add(1) == Some(next.chunk)
        };
        let size = image.stored_size(*next);
        if !follows || (index > 0 && bytes + size > STEP) {
            break;
        }
        (count, bytes) = (count + 1, bytes + size);
    }
    count.max(1)
}

/// Whether to go on.
async fn fetch(image: &OpenImage, step: &[ChunkRef], limit: &Limit) -> bool {
    let (Some(first), Some(last)) = (step.first(), step.last()) else { return true };
    let Some(blob) = image.blobs.get(first.blob as usize) else { return true };
    let wanted = first.chunk as usize..last.chunk as usize + 1;
    if blob.has(wanted.clone()) {
        return true;
    }
    image.fetcher.idle().await;
    limit.take(step.iter().map(|chunk| image.stored_size(*chunk)).sum()).await;
    match blob.ensure(wanted, Why::Ahead).await {
        Ok(()) => true,
        // The guest will be told when it asks; here it is no use to go on.
        Err(failure) => {
            log::warn!("blob {}: fetching ahead ends: {failure}", blob.table.id);
            false
        }
    }
}
