//! What containerd mounts, or hands to a runtime, for a snapshot.

use std::path::Path;

use crate::api::Mount;
use crate::error::SnapshotError;
use crate::nydus;
use crate::remap;
use crate::snapshot::{Kind, Snapshot};
use crate::store::{Store, kind_error, owner};

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
        (Kind::View, [only]) => {
            let mut mount = bind(&store.files(only), "ro");
            mount.options.extend(maps(store, top, layers)?);
            mount
        }
        (_, []) => bind(&store.files(top), "rw"),
        _ => overlay("overlay", options(store, top, layers)?),
    }])
}

/// `upperdir=` and `workdir=` of what is active, `lowerdir=` of the layers, and how owners of what is below are shifted.
pub(crate) fn options(
    store: &Store,
    top: &Snapshot,
    layers: &[&Snapshot],
) -> Result<Vec<String>, SnapshotError> {
    let mut options = maps(store, top, layers)?;
    if top.kind == Kind::Active {
        options.push(format!("workdir={}", store.work(top).display()));
        options.push(format!("upperdir={}", store.files(top).display()));
    }
    if !layers.is_empty() {
        let lower: Vec<_> = layers.iter().map(|layer| store.files(layer).display().to_string()).collect();
        options.push(format!("lowerdir={}", lower.join(":")));
    }
    Ok(options)
}

/// How the owners of what is in `layers` are shifted for `top`. A containerd that does not know that this can be has done it itself, in
/// a layer of its own above the image's, and says the maps nevertheless.
fn maps(store: &Store, top: &Snapshot, layers: &[&Snapshot]) -> Result<Vec<String>, SnapshotError> {
    let (Some(root), Some(layer)) = (remap::root(&top.labels)?, layers.first()) else {
        return Ok(Vec::new());
    };
    let is_shifted = owner(&store.files(layer))? == root;
    Ok(if is_shifted { Vec::new() } else { remap::options(&top.labels) })
}

pub(crate) fn overlay(kind: &str, options: Vec<String>) -> Mount {
    Mount { r#type: kind.to_owned(), source: "overlay".to_owned(), target: String::new(), options }
}

fn bind(source: &Path, access: &str) -> Mount {
    let options = vec![access.to_owned(), "rbind".to_owned()];
    Mount { r#type: "bind".to_owned(), source: source.display().to_string(), target: String::new(), options }
}
