//! containerd's Snapshots service over the store.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_stream::Iter;
use tonic::{Request, Response, Status};

use crate::api::snapshots_server::{Snapshots, SnapshotsServer};
use crate::api::{
    CleanupRequest, CommitRequest, CreateRequest, Empty, Info, InfoResponse, KeyRequest, Kind as WireKind,
    ListRequest, ListResponse, MountsResponse, Timestamp, UpdateRequest, UsageResponse,
};
use crate::error::SnapshotError;
use crate::filter::Filters;
use crate::mounts;
use crate::nydus::{self, TARGET, blob_target};
use crate::snapshot::{Kind, Labels, Snapshot};
use crate::store::Store;

/// Snapshots in one answer of List: labels may have 4 KiB each, and a message of gRPC 4 MiB.
const A_PAGE: usize = 100;

/// The service.
#[derive(Debug, Clone)]
pub struct Service {
    store: Arc<Mutex<Store>>,
    config: Arc<nydus::Config>,
}

impl Service {
    /// A service over `store`.
    pub fn new(store: Store, config: nydus::Config) -> Service {
        Service { store: Arc::new(Mutex::new(store)), config: Arc::new(config) }
    }

    /// For tonic's server.
    pub fn server(self) -> SnapshotsServer<Service> {
        SnapshotsServer::new(self)
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        // What one call left undone is on disk as it was before or after.
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs what waits for the disk where it holds nobody else up.
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Store, &nydus::Config) -> Result<T, SnapshotError> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let service = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&mut service.store(), &service.config)).await;
        let done = done.map_err(|panic| Status::internal(panic.to_string()))?;
        done.map(Response::new).map_err(Status::from)
    }

    async fn create(&self, kind: Kind, request: CreateRequest) -> Result<Response<MountsResponse>, Status> {
        self.work(move |store, config| {
            let CreateRequest { key, parent, labels, .. } = request;
            let labels: Labels = labels.into_iter().collect();
            if let Some(target) = blob_target(&labels).filter(|_| kind == Kind::Active).map(str::to_owned) {
                return Err(take_blob(store, &target, &key, &parent, labels)?);
            }
            store.create(kind, &key, &parent, labels)?;
            Ok(MountsResponse { mounts: mounts::of(store, config, &key)? })
        })
        .await
    }
}

/// Commits an empty layer for a blob, unless it is there; what containerd is then told, that it is there, makes it not download the
/// blob. It finds it by its label and its parent.
fn take_blob(
    store: &mut Store,
    target: &str,
    key: &str,
    parent: &str,
    labels: Labels,
) -> Result<SnapshotError, SnapshotError> {
    let is_it = |snapshot: &&Snapshot| {
        snapshot.kind == Kind::Committed
            && snapshot.labels.get(TARGET).map(String::as_str) == Some(target)
            && snapshot.parent.as_deref().unwrap_or_default() == parent
    };
    if store.all().find(is_it).is_none() {
        store.create(Kind::Active, key, parent, labels)?;
        // The key is containerd's for this call alone, and so a name that nobody else has.
        store.commit(&format!("{key} {target}"), key, "", Labels::new())?;
        log::info!("{target}: a blob, left to the image service");
    }
    Ok(SnapshotError::Exists(target.to_owned()))
}

#[tonic::async_trait]
impl Snapshots for Service {
    async fn prepare(&self, request: Request<CreateRequest>) -> Result<Response<MountsResponse>, Status> {
        self.create(Kind::Active, request.into_inner()).await
    }

    async fn view(&self, request: Request<CreateRequest>) -> Result<Response<MountsResponse>, Status> {
        self.create(Kind::View, request.into_inner()).await
    }

    async fn mounts(&self, request: Request<KeyRequest>) -> Result<Response<MountsResponse>, Status> {
        let key = request.into_inner().key;
        self.work(move |store, config| Ok(MountsResponse { mounts: mounts::of(store, config, &key)? })).await
    }

    async fn commit(&self, request: Request<CommitRequest>) -> Result<Response<Empty>, Status> {
        let CommitRequest { name, key, labels, parent, .. } = request.into_inner();
        self.work(move |store, _| {
            store.commit(&name, &key, &parent, labels.into_iter().collect()).map(|_| Empty {})
        })
        .await
    }

    async fn remove(&self, request: Request<KeyRequest>) -> Result<Response<Empty>, Status> {
        let key = request.into_inner().key;
        self.work(move |store, _| store.remove(&key).map(|()| Empty {})).await
    }

    async fn stat(&self, request: Request<KeyRequest>) -> Result<Response<InfoResponse>, Status> {
        let key = request.into_inner().key;
        self.work(move |store, _| Ok(InfoResponse { info: Some(info(store.get(&key)?)) })).await
    }

    async fn update(&self, request: Request<UpdateRequest>) -> Result<Response<InfoResponse>, Status> {
        let UpdateRequest { info: wanted, update_mask, .. } = request.into_inner();
        let wanted = wanted.ok_or_else(|| Status::invalid_argument("no info"))?;
        self.work(move |store, _| {
            let old = store.get(&wanted.name)?.labels.clone();
            let paths = update_mask.map(|mask| mask.paths).unwrap_or_default();
            let labels = relabelled(old, wanted.labels, &paths)?;
            Ok(InfoResponse { info: Some(info(store.relabel(&wanted.name, labels)?)) })
        })
        .await
    }

    type ListStream = Iter<std::vec::IntoIter<Result<ListResponse, Status>>>;

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<Self::ListStream>, Status> {
        let filters = Filters::parse(&request.into_inner().filters)?;
        self.work(move |store, _| {
            let infos: Vec<_> = store.all().filter(|snapshot| filters.match_(snapshot)).map(info).collect();
            let pages: Vec<_> =
                infos.chunks(A_PAGE).map(|page| Ok(ListResponse { info: page.to_vec() })).collect();
            Ok(tokio_stream::iter(pages))
        })
        .await
    }

    async fn usage(&self, request: Request<KeyRequest>) -> Result<Response<UsageResponse>, Status> {
        let key = request.into_inner().key;
        self.work(move |store, _| {
            let usage = store.usage(&key)?;
            let signed = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
            Ok(UsageResponse { size: signed(usage.bytes), inodes: signed(usage.inodes) })
        })
        .await
    }

    async fn cleanup(&self, _: Request<CleanupRequest>) -> Result<Response<Empty>, Status> {
        self.work(|store, _| store.cleanup().map(|()| Empty {})).await
    }
}

/// Labels after an update: all of them new without a mask or by `labels`, or each that the mask names.
fn relabelled(old: Labels, new: HashMap<String, String>, paths: &[String]) -> Result<Labels, SnapshotError> {
    if paths.is_empty() || paths.iter().any(|path| path == "labels") {
        return Ok(new.into_iter().collect());
    }
    let mut labels = old;
    for path in paths {
        let Some(key) = path.strip_prefix("labels.") else {
            return Err(SnapshotError::Invalid(format!("{path:?} cannot be updated, only labels can")));
        };
        match new.get(key) {
            Some(value) if !value.is_empty() => labels.insert(key.to_owned(), value.clone()),
            _ => labels.remove(key),
        };
    }
    Ok(labels)
}

fn info(snapshot: &Snapshot) -> Info {
    let time = |since: std::time::Duration| Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
    };
    let kind = match snapshot.kind {
        Kind::View => WireKind::View,
        Kind::Active => WireKind::Active,
        Kind::Committed => WireKind::Committed,
    };
    Info {
        name: snapshot.name.clone(),
        parent: snapshot.parent.clone().unwrap_or_default(),
        kind: kind.into(),
        created_at: Some(time(snapshot.created)),
        updated_at: Some(time(snapshot.updated)),
        labels: snapshot.labels.clone().into_iter().collect(),
    }
}
