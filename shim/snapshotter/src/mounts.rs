//! What containerd mounts, or hands to a runtime, for a snapshot.

use std::path::Path;

use crate::api::Mount;
use crate::error::SnapshotError;
use crate::nydus;
use crate::snapshot::{Kind, Snapshot};
use crate::store::{Store, kind_error};

/// The mounts of a snapshot that is not committed.
pub fn of(store: &Store, config: &nydus::Config, name: &str) -> Result<Vec<Mount>, SnapshotError> {
    let chain = store.chain(name)?;
    let (top, below) = chain.split_first().expect("a chain begins with the snapshot itself");
    if top.kind == Kind::Committed {
        return Err(kind_error(top, Kind::Active));
    }
    // The bootstrap itself is being unpacked: alone, since the blobs below it have no files.
    if nydus::is_bootstrap(top) {
        return Ok(vec![bind(&store.files(top), "rw")]);
    }
    let image = below.iter().position(|layer| nydus::is_bootstrap(layer));
    let (layers, image) = below.split_at(image.unwrap_or(below.len()));
    if let Some(bootstrap) = image.first() {
        return Ok(vec![nydus::mount(store, config, top, layers, bootstrap)?]);
    }
    Ok(vec![match (top.kind, layers) {
        (Kind::View, []) => bind(&store.files(top), "ro"),
        (Kind::View, [only]) => bind(&store.files(only), "ro"),
        (_, []) => bind(&store.files(top), "rw"),
        _ => overlay("overlay", options(store, top, layers)),
    }])
}

/// `upperdir=` and `workdir=` of what is active, `lowerdir=` of the layers.
pub(crate) fn options(store: &Store, top: &Snapshot, layers: &[&Snapshot]) -> Vec<String> {
    let mut options = Vec::new();
    if top.kind == Kind::Active {
        options.push(format!("workdir={}", store.work(top).display()));
        options.push(format!("upperdir={}", store.files(top).display()));
    }
    if !layers.is_empty() {
        let lower: Vec<_> = layers.iter().map(|layer| store.files(layer).display().to_string()).collect();
        options.push(format!("lowerdir={}", lower.join(":")));
    }
    options
}

pub(crate) fn overlay(kind: &str, options: Vec<String>) -> Mount {
    Mount { r#type: kind.to_owned(), source: "overlay".to_owned(), target: String::new(), options }
}

fn bind(source: &Path, access: &str) -> Mount {
    let options = vec![access.to_owned(), "rbind".to_owned()];
    Mount { r#type: "bind".to_owned(), source: source.display().to_string(), target: String::new(), options }
}
