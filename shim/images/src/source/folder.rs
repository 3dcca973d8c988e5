//! Blobs in a folder of this machine, each a file under its SHA-256, as `nydus-image` writes them and OCI layouts have them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::{Part, SourceError};
use crate::cache::blocking;

#[derive(Debug)]
pub struct Folder {
    folders: Vec<PathBuf>,
}

impl Folder {
    pub fn new(folders: Vec<PathBuf>) -> Self {
        Self { folders }
    }

    pub async fn read(&self, part: Part<'_>) -> Result<Vec<u8>, SourceError> {
        let places: Vec<PathBuf> = self
            .folders
            .iter()
            .flat_map(|folder| [folder.join(part.blob), folder.join("blobs/sha256").join(part.blob)])
            .collect();
        let (offset, len) = (part.offset, part.len);
        blocking(move || {
            for place in &places {
                let file = match File::open(place) {
                    Ok(file) => file,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                        return Err(SourceError::Forbidden(place.display().to_string()));
                    }
                    Err(error) => {
                        return Err(SourceError::Broken(format!("open {}: {error}", place.display())));
                    }
                };
                let mut bytes = vec![0; len];
                return match file.read_exact_at(&mut bytes, offset) {
                    Ok(()) => Ok(bytes),
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        let size = file.metadata().map_or(0, |m| m.len());
                        let place = place.display();
                        Err(SourceError::Broken(format!(
                            "{place} is truncated: {len} bytes wanted at {offset}, it ends at {size}"
                        )))
                    }
                    Err(error) => Err(SourceError::Broken(format!("read {}: {error}", place.display()))),
                };
            }
            let first = places.first().map_or_else(String::new, |place| place.display().to_string());
            Err(SourceError::Missing(first))
        })
        .await
    }
}
