//! The service as containerd uses it, over its socket.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use base64::Engine as _;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use snapshotter::api::snapshots_client::SnapshotsClient;
use snapshotter::api::{
    CleanupRequest, CommitRequest, CreateRequest, FieldMask, Info, KeyRequest, Kind, ListRequest, Mount,
    UpdateRequest,
};
use snapshotter::nydus::{BLOB, BOOTSTRAP, Config, FS_VERSION, IMAGE_REF, MOUNT_TYPE, TARGET};
use snapshotter::remap::{GID_MAPPING, UID_MAPPING};
use snapshotter::service::Service;
use snapshotter::store::Store;
use tempfile::TempDir;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Status};

struct Containerd {
    client: SnapshotsClient<Channel>,
    folder: TempDir,
}

type Labels<'a> = &'a [(&'a str, &'a str)];

impl Containerd {
    async fn start() -> Containerd {
        Self::again(tempfile::tempdir().unwrap()).await
    }

    /// With a service that finds what another left in `folder`.
    async fn again(folder: TempDir) -> Containerd {
        let store = Store::open(&folder.path().join("root")).unwrap();
        let config = Config { plain_http: vec!["localhost:5000".into()] };
        let socket = folder.path().join("sock");
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
        let server = Server::builder().add_service(Service::new(store, config).server());
        tokio::spawn(server.serve_with_incoming(listener));
        let connect = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://unix").connect_with_connector(connect).await.unwrap();
        Containerd { client: SnapshotsClient::new(channel), folder }
    }

    async fn prepare(&mut self, key: &str, parent: &str, labels: Labels<'_>) -> Result<Vec<Mount>, Status> {
        let request = create(key, parent, labels);
        self.client.prepare(request).await.map(|answer| answer.into_inner().mounts)
    }

    async fn view(&mut self, key: &str, parent: &str) -> Result<Vec<Mount>, Status> {
        self.client.view(create(key, parent, &[])).await.map(|answer| answer.into_inner().mounts)
    }

    async fn mounts(&mut self, key: &str) -> Result<Vec<Mount>, Status> {
        self.client.mounts(of(key)).await.map(|answer| answer.into_inner().mounts)
    }

    async fn commit(&mut self, name: &str, key: &str) -> Result<(), Status> {
        let (name, key) = (name.to_owned(), key.to_owned());
        let request = CommitRequest { name, key, ..CommitRequest::default() };
        self.client.commit(request).await.map(drop)
    }

    async fn remove(&mut self, key: &str) -> Result<(), Status> {
        self.client.remove(of(key)).await.map(drop)
    }

    async fn stat(&mut self, key: &str) -> Result<Info, Status> {
        self.client.stat(of(key)).await.map(|answer| answer.into_inner().info.unwrap())
    }

    async fn list(&mut self, filters: &[&str]) -> Vec<String> {
        let filters = filters.iter().map(ToString::to_string).collect();
        let request = ListRequest { filters, ..ListRequest::default() };
        let mut pages = self.client.list(request).await.unwrap().into_inner();
        let mut names = Vec::new();
        while let Some(page) = pages.next().await {
            names.extend(page.unwrap().info.into_iter().map(|info| info.name));
        }
        names
    }

    /// A layer with one file in it.
    async fn layer(&mut self, name: &str, parent: &str) {
        let mounts = self.prepare(&format!("extract-{name}"), parent, &[]).await.unwrap();
        let files = match option(&mounts[0], "upperdir=") {
            Some(upper) => upper,
            None => mounts[0].source.clone(),
        };
        std::fs::write(Path::new(&files).join(name), "x".repeat(5000)).unwrap();
        self.commit(name, &format!("extract-{name}")).await.unwrap();
    }
}

fn create(key: &str, parent: &str, labels: Labels<'_>) -> CreateRequest {
    let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    CreateRequest { key: key.to_owned(), parent: parent.to_owned(), labels, ..CreateRequest::default() }
}

fn of(key: &str) -> KeyRequest {
    KeyRequest { key: key.to_owned(), ..KeyRequest::default() }
}

fn option(mount: &Mount, name: &str) -> Option<String> {
    mount.options.iter().find_map(|option| option.strip_prefix(name)).map(str::to_owned)
}

fn code<T: std::fmt::Debug>(result: Result<T, Status>) -> Code {
    result.unwrap_err().code()
}

#[tokio::test]
async fn layers_are_stacked_in_order() {
    let mut containerd = Containerd::start().await;
    containerd.layer("base", "").await;
    containerd.layer("top", "base").await;
    let mounts = containerd.prepare("container", "top", &[]).await.unwrap();
    let [mount] = &mounts[..] else { panic!("{mounts:?}") };
    assert_eq!((mount.r#type.as_str(), mount.source.as_str()), ("overlay", "overlay"));
    let lower = option(mount, "lowerdir=").unwrap();
    let layers: Vec<_> = lower.split(':').collect();
    assert!(Path::new(layers[0]).join("top").exists() && Path::new(layers[1]).join("base").exists());
    assert!(Path::new(&option(mount, "upperdir=").unwrap()).is_dir());
    assert!(Path::new(&option(mount, "workdir=").unwrap()).is_dir());
    assert_eq!(containerd.mounts("container").await.unwrap(), mounts);
    // A view of one layer needs no overlay, of two it has nothing to write to.
    let one = containerd.view("look", "base").await.unwrap();
    assert_eq!(
        (one[0].r#type.as_str(), &one[0].options),
        ("bind", &vec!["ro".to_owned(), "rbind".to_owned()])
    );
    let two = containerd.view("look too", "top").await.unwrap();
    assert_eq!((two[0].r#type.as_str(), two[0].options.len()), ("overlay", 1));
}

#[tokio::test]
async fn what_cannot_be_has_the_codes_that_containerd_knows() {
    let mut containerd = Containerd::start().await;
    containerd.layer("base", "").await;
    containerd.prepare("active", "base", &[]).await.unwrap();
    assert_eq!(code(containerd.prepare("active", "", &[]).await), Code::AlreadyExists);
    assert_eq!(code(containerd.prepare("other", "nothing", &[]).await), Code::NotFound);
    assert_eq!(code(containerd.prepare("other", "active", &[]).await), Code::InvalidArgument);
    assert_eq!(code(containerd.prepare("", "base", &[]).await), Code::InvalidArgument);
    assert_eq!(code(containerd.commit("base", "active").await), Code::AlreadyExists);
    assert_eq!(code(containerd.commit("new", "base").await), Code::FailedPrecondition);
    assert_eq!(code(containerd.mounts("base").await), Code::FailedPrecondition);
    assert_eq!(code(containerd.remove("base").await), Code::FailedPrecondition);
    assert_eq!(code(containerd.remove("nothing").await), Code::NotFound);
    assert_eq!(code(containerd.stat("nothing").await), Code::NotFound);
    containerd.view("look", "base").await.unwrap();
    assert_eq!(code(containerd.commit("new", "look").await), Code::FailedPrecondition);
}

#[tokio::test]
async fn what_is_removed_goes_and_usage_is_each_snapshots_own() {
    let mut containerd = Containerd::start().await;
    containerd.layer("base", "").await;
    containerd.prepare("active", "base", &[]).await.unwrap();
    let base = containerd.client.usage(of("base")).await.unwrap().into_inner();
    assert!(base.size >= 5000 && base.inodes == 2, "{base:?}");
    let active = containerd.client.usage(of("active")).await.unwrap().into_inner();
    assert_eq!(active.inodes, 1);
    containerd.remove("active").await.unwrap();
    containerd.remove("base").await.unwrap();
    assert!(containerd.list(&[]).await.is_empty());
    containerd.client.cleanup(CleanupRequest::default()).await.unwrap();
    for folder in ["snapshots", "new", "removed"] {
        let path = containerd.folder.path().join("root").join(folder);
        assert_eq!(std::fs::read_dir(path).unwrap().count(), 0, "{folder}");
    }
}

#[tokio::test]
async fn a_service_that_ended_anywhere_is_followed_by_one_that_knows() {
    let mut containerd = Containerd::start().await;
    containerd.layer("base", "").await;
    let mounts = containerd.prepare("active", "base", &[("kept", "1")]).await.unwrap();
    let before = containerd.stat("active").await.unwrap();
    // Half made, half removed, and half written.
    let root = containerd.folder.path().join("root");
    for left in ["new/77/fs", "removed/78/fs"] {
        std::fs::create_dir_all(root.join(left)).unwrap();
    }
    let id = std::fs::read_dir(root.join("snapshots")).unwrap().next().unwrap().unwrap().path();
    std::fs::write(id.join("meta.json.new"), "{").unwrap();
    let mut again = Containerd::again(containerd.folder).await;
    assert_eq!(again.stat("active").await.unwrap(), before);
    assert_eq!(again.mounts("active").await.unwrap(), mounts);
    assert!(!root.join("new/77").exists() && !root.join("removed/78").exists());
    // Numbers are not used twice.
    let other = again.prepare("other", "base", &[]).await.unwrap();
    assert_ne!(option(&other[0], "upperdir="), option(&mounts[0], "upperdir="));
}

#[tokio::test]
async fn the_root_of_a_container_has_the_owner_of_the_layer_below() {
    let mut containerd = Containerd::start().await;
    containerd.layer("base", "").await;
    let files = containerd.view("look", "base").await.unwrap()[0].source.clone();
    // Only root may give files away; others see that it stays theirs.
    let given = std::os::unix::fs::chown(&files, Some(1234), Some(1235)).is_ok();
    let mounts = containerd.prepare("active", "base", &[]).await.unwrap();
    let upper = std::fs::metadata(option(&mounts[0], "upperdir=").unwrap()).unwrap();
    let owner = std::fs::metadata(&files).unwrap();
    assert_eq!((upper.uid(), upper.gid()), (owner.uid(), owner.gid()));
    assert!(!given || upper.uid() == 1234);
    assert_eq!(upper.mode() & 0o777, 0o755);
}

#[tokio::test]
async fn labels_change_whole_or_one_by_one() {
    let mut containerd = Containerd::start().await;
    containerd.prepare("a", "", &[("x", "1"), ("y.z", "2")]).await.unwrap();
    let mut update = async |labels: Labels<'_>, paths: &[&str]| {
        let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let info = Info { name: "a".into(), labels, ..Info::default() };
        let paths = paths.iter().map(ToString::to_string).collect();
        let request = UpdateRequest {
            info: Some(info),
            update_mask: Some(FieldMask { paths }),
            ..UpdateRequest::default()
        };
        containerd.client.update(request).await.map(|answer| answer.into_inner().info.unwrap().labels)
    };
    let labels = |pairs: Labels<'_>| -> HashMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    };
    assert_eq!(
        update(&[("y.z", "3"), ("x", "9")], &["labels.y.z"]).await.unwrap(),
        labels(&[("x", "1"), ("y.z", "3")])
    );
    assert_eq!(update(&[], &["labels.x"]).await.unwrap(), labels(&[("y.z", "3")]));
    assert_eq!(update(&[("n", "4")], &[]).await.unwrap(), labels(&[("n", "4")]));
    assert_eq!(code(update(&[], &["parent"]).await), Code::InvalidArgument);
}

/// What containerd does with each layer of a Nydus image, and then for a container.
#[tokio::test]
async fn a_nydus_image_is_not_unpacked() {
    let mut containerd = Containerd::start().await;
    let mut parent = String::new();
    for layer in ["sha256:aa", "sha256:bb"] {
        let labels = [(BLOB, "true"), (TARGET, layer), (IMAGE_REF, "localhost:5000/app:1")];
        for round in ["first", "again"] {
            let key = format!("default/1/extract-{round} {layer}");
            assert_eq!(code(containerd.prepare(&key, &parent, &labels).await), Code::AlreadyExists);
        }
        // As containerd looks for it.
        let filter = format!("labels.\"containerd.io/snapshot.ref\"=={layer},parent==\"{parent}\"");
        let found = containerd.list(&[&filter]).await;
        assert_eq!(found.len(), 1, "{found:?}");
        let info = containerd.stat(&found[0]).await.unwrap();
        assert_eq!((info.kind, info.labels[TARGET].as_str()), (Kind::Committed.into(), layer));
        parent.clone_from(&found[0]);
    }
    let labels =
        [(BOOTSTRAP, "true"), (FS_VERSION, "6"), (IMAGE_REF, "localhost:5000/app:1"), (TARGET, "sha256:cc")];
    let mounts = containerd.prepare("extract-boot", &parent, &labels).await.unwrap();
    assert_eq!(mounts[0].r#type, "bind", "the bootstrap is unpacked alone");
    let image = Path::new(&mounts[0].source).join("image");
    std::fs::create_dir(&image).unwrap();
    std::fs::write(image.join("image.boot"), "boot").unwrap();
    containerd.commit("boot", "extract-boot").await.unwrap();

    let mounts = containerd.prepare("container", "boot", &[]).await.unwrap();
    let [mount] = &mounts[..] else { panic!("{mounts:?}") };
    assert_eq!((mount.r#type.as_str(), mount.source.as_str()), (MOUNT_TYPE, "overlay"));
    let lower = option(mount, "lowerdir=").unwrap();
    assert!(!lower.contains(':'), "nothing is unpacked");
    let extra =
        base64::engine::general_purpose::STANDARD.decode(option(mount, "extraoption=").unwrap()).unwrap();
    let extra: Value = serde_json::from_slice(&extra).unwrap();
    assert_eq!(std::fs::read_to_string(extra["source"].as_str().unwrap()).unwrap(), "boot");
    assert_eq!(extra["fs_version"], "v6");
    let folder = Path::new(extra["snapshotdir"].as_str().unwrap());
    assert_eq!(option(mount, "upperdir=").unwrap(), folder.join("fs").display().to_string());
    let config: Value = serde_json::from_str(extra["config"].as_str().unwrap()).unwrap();
    assert_eq!(config["device"]["backend"]["config"]["repo"], "app");
    assert_eq!(config["device"]["backend"]["config"]["scheme"], "http");

    // What was committed over it is before where the image would be.
    containerd.layer("over", "boot").await;
    containerd.layer("more", "over").await;
    let mounts = containerd.prepare("second", "more", &[]).await.unwrap();
    let dirs = option(&mounts[0], "lowerdir=").unwrap();
    let dirs: Vec<&str> = dirs.split(':').collect();
    assert!(Path::new(dirs[0]).join("more").exists() && Path::new(dirs[1]).join("over").exists());
    assert_eq!(dirs[2..], [lower.as_str()]);
}

/// As containerd asks for it where it is told that we can.
#[tokio::test]
async fn owners_are_shifted_by_whoever_mounts() {
    let mut containerd = Containerd::start().await;
    containerd.layer("base", "").await;
    let files = containerd.view("look", "base").await.unwrap()[0].source.clone();
    let give = |path: &str, uid, gid| std::os::unix::fs::chown(path, Some(uid), Some(gid));
    if give(&files, 0, 0).is_err() {
        eprintln!("not run: this takes root");
        return;
    }
    let (uid, gid) = (200_000, 300_000);
    let (uids, gids) = (format!("0:{uid}:65536"), format!("0:{gid}:65536"));
    let labels = [(UID_MAPPING, uids.as_str()), (GID_MAPPING, gids.as_str())];
    let mounts = containerd.prepare("container", "base", &labels).await.unwrap();
    assert_eq!(option(&mounts[0], "uidmap="), Some(uids.clone()));
    assert_eq!(option(&mounts[0], "gidmap="), Some(gids.clone()));
    assert_eq!(containerd.mounts("container").await.unwrap(), mounts);
    let upper = std::fs::metadata(option(&mounts[0], "upperdir=").unwrap()).unwrap();
    assert_eq!((upper.uid(), upper.gid()), (uid, gid));
    let view = containerd.client.view(create("view", "base", &labels)).await.unwrap().into_inner().mounts;
    assert_eq!((view[0].r#type.as_str(), option(&view[0], "uidmap=")), ("bind", Some(uids.clone())));
    // By containerd itself, where it is not told.
    let own = containerd.prepare("own-remap", "base", &[]).await.unwrap();
    give(&option(&own[0], "upperdir=").unwrap(), uid, gid).unwrap();
    containerd.commit("own", "own-remap").await.unwrap();
    let mounts = containerd.prepare("of-own", "own", &labels).await.unwrap();
    assert_eq!((option(&mounts[0], "uidmap="), option(&mounts[0], "gidmap=")), (None, None));
    assert_eq!(code(containerd.prepare("half", "base", &labels[..1]).await), Code::InvalidArgument);
    assert_eq!(code(containerd.stat("half").await), Code::NotFound);
}

/// Another image shares its first layer; a third has a blob of the same name on top of another one.
#[tokio::test]
async fn a_blob_is_found_by_its_name_and_what_it_stands_on() {
    let mut containerd = Containerd::start().await;
    containerd.layer("ordinary", "").await;
    let blob = [(BLOB, "true"), (TARGET, "sha256:aa")];
    for parent in ["", "ordinary", ""] {
        let key = format!("k {parent}");
        assert_eq!(code(containerd.prepare(&key, parent, &blob).await), Code::AlreadyExists);
    }
    assert_eq!(containerd.list(&["labels.\"containerd.io/snapshot.ref\"==sha256:aa"]).await.len(), 2);
    // Without a target nobody would look for it: an ordinary layer.
    containerd.prepare("plain", "", &[(BLOB, "true")]).await.unwrap();
}
