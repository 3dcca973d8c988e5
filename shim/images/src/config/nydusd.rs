//! The configuration of the Nydus daemon, as a snapshotter hands it over, in its old and its new form.
//!
//! ```text
//! old  {"device": {"backend": {"type": T, "config": {…}}, "cache": {…}}, "mode": …, "fs_prefetch": {…}, …}
//! new  {"version": 2, "id": …, "backend": {"type": T, T: {…}}, "cache": {"prefetch": {…}, …}, "rafs": {…}}
//! ```
//!
//! We are no such daemon: its cache, modes and threads are not ours. What is not understood is named in a warning.

use serde_json::Value;

use super::fields::Fields;
use super::{Ahead, Auth, Backend, BucketBackend, Keys, Link, Mirror, Proxy, RegistryBackend, Store};

/// What a daemon's configuration says that matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Daemon {
    /// Where the blobs are.
    pub backend: Backend,
    /// How far to fetch ahead; nothing where it does not say.
    pub ahead: Option<Ahead>,
    /// What was not understood.
    pub warnings: Vec<String>,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Not JSON.
    #[error("the daemon's configuration is not JSON")]
    Json(#[source] serde_json::Error),
    /// Without a back end.
    #[error("the daemon's configuration names no back end (neither device.backend.type nor backend.type)")]
    NoBackend,
    /// A back end that there is not here.
    #[error("the daemon's configuration has the back end {0}; there are registry, localfs, s3 and oss")]
    Backend(String),
    /// Something that a back end needs.
    #[error("the daemon's configuration has no {0}")]
    Missing(String),
}

impl Daemon {
    /// Reads one.
    pub fn parse(json: &str) -> Result<Self, DaemonError> {
        let value: Value = serde_json::from_str(json).map_err(DaemonError::Json)?;
        let mut warnings = Vec::new();
        let old = value.get("device").is_some();
        let mut fields = Fields::of("", value, &mut warnings);
        let (backend, ahead) = if old { old_form(&mut fields)? } else { new_form(&mut fields)? };
        fields.end();
        Ok(Self { backend, ahead, warnings })
    }
}

fn old_form(fields: &mut Fields<'_>) -> Result<(Backend, Option<Ahead>), DaemonError> {
    let mut device = fields.object("device");
    device.ignore(&["id", "cache", "external_backends"]);
    let mut backend = device.object("backend");
    let kind = backend.text("type").ok_or(DaemonError::NoBackend)?;
    let mut config = backend.object("config");
    let found = backend_of(&kind, &mut config)?;
    config.end();
    backend.end();
    device.end();
    let mut prefetch = fields.object("fs_prefetch");
    prefetch.ignore(&["threads_count", "merging_size"]);
    let ahead = prefetch.flag("enable").map(|listed| Ahead {
        listed,
        // As the daemon has it.
        all: listed && prefetch.flag("prefetch_all").unwrap_or(false),
        rate: prefetch.number("bandwidth_rate").unwrap_or(0),
    });
    prefetch.end();
    fields.ignore(&[
        "mode",
        "digest_validate",
        "iostats_files",
        "enable_xattr",
        "access_pattern",
        "latest_read_files",
        "amplify_io",
        "id",
        "prefetch_config",
    ]);
    Ok((found, ahead))
}

fn new_form(fields: &mut Fields<'_>) -> Result<(Backend, Option<Ahead>), DaemonError> {
    let mut backend = fields.object("backend");
    let kind = backend.text("type").ok_or(DaemonError::NoBackend)?;
    let mut config = backend.object(&kind);
    let found = backend_of(&kind, &mut config)?;
    config.end();
    backend.end();
    let mut cache = fields.object("cache");
    cache.ignore(&["type", "compressed", "validate", "filecache", "fscache"]);
    let mut ahead = prefetch_of(&mut cache);
    cache.end();
    let mut rafs = fields.object("rafs");
    ahead = prefetch_of(&mut rafs).or(ahead);
    rafs.ignore(&[
        "mode",
        "batch_size",
        "validate",
        "enable_xattr",
        "iostats_files",
        "access_pattern",
        "latest_read_files",
    ]);
    rafs.end();
    fields.ignore(&["version", "id", "external_backends", "overlay"]);
    Ok((found, ahead))
}

fn prefetch_of(fields: &mut Fields<'_>) -> Option<Ahead> {
    let mut prefetch = fields.object("prefetch");
    prefetch.ignore(&["threads", "threads_count", "batch_size"]);
    let ahead = prefetch.flag("enable").map(|listed| Ahead {
        listed,
        all: listed && prefetch.flag("prefetch_all").unwrap_or(false),
        rate: prefetch.number("bandwidth_limit").unwrap_or(0),
    });
    prefetch.end();
    ahead
}

fn backend_of(kind: &str, config: &mut Fields<'_>) -> Result<Backend, DaemonError> {
    match kind {
        "localfs" => localfs(config),
        "registry" => registry(config).map(Backend::Registry),
        "s3" | "oss" => bucket(kind, config).map(Backend::Bucket),
        other => Err(DaemonError::Backend(other.into())),
    }
}

fn localfs(config: &mut Fields<'_>) -> Result<Backend, DaemonError> {
    config.ignore(&["readahead", "readahead_sec"]);
    let mut folders: Vec<_> = config.text("dir").into_iter().collect();
    folders.extend(config.texts("alt_dirs"));
    if config.text("blob_file").is_some() {
        config.warn("blob_file", "is left out: blobs are found by their names in dir");
    }
    if folders.is_empty() {
        return Err(DaemonError::Missing("dir of the localfs back end".into()));
    }
    Ok(Backend::Folder { folders: folders.into_iter().map(Into::into).collect() })
}

fn registry(config: &mut Fields<'_>) -> Result<RegistryBackend, DaemonError> {
    let missing = |what: &str| DaemonError::Missing(format!("{what} of the registry back end"));
    let scheme = scheme(config);
    let host = config.text("host").ok_or_else(|| missing("host"))?;
    let repo = config.text("repo").ok_or_else(|| missing("repo"))?;
    let mut found = RegistryBackend::new(&scheme, &host, &repo);
    if let Some(auth) = config.text("auth") {
        found.auth = Auth::from_base64(&auth);
        if found.auth.is_none() {
            config.warn("auth", "is no name and password in base64: left out");
        }
    }
    if let Some(token) = config.text("registry_token") {
        found.auth = found.auth.or(Some(Auth::Token(token)));
    }
    found.link = link(config);
    config.each("mirrors", |mirror| {
        // How to watch its health is our own affair.
        mirror.ignore(&["ping_url", "health_check_interval", "failure_limit", "auth_through"]);
        if let Some(host) = mirror.text("host") {
            found.mirrors.push(Mirror { host, headers: mirror.map("headers").into_iter().collect() });
        } else {
            mirror.warn("host", "is missing: the mirror is left out");
        }
    });
    for redirect in ["blob_url_scheme", "blob_redirected_host"] {
        if config.text(redirect).is_some() {
            config.warn(redirect, "is left out: redirections are followed as the registry gives them");
        }
    }
    config.ignore(&["disable_token_refresh"]);
    Ok(found)
}

/// Nydus asks S3 by path (`endpoint/bucket/prefix`), OSS by the bucket's host name.
fn bucket(kind: &str, config: &mut Fields<'_>) -> Result<BucketBackend, DaemonError> {
    let missing = |what: &str| DaemonError::Missing(format!("{what} of the {kind} back end"));
    let scheme = scheme(config);
    let endpoint = config.text("endpoint");
    let (store, endpoint) = if kind == "s3" {
        let region = config.text("region").ok_or_else(|| missing("region"))?;
        (Store::S3 { region }, endpoint.unwrap_or_else(|| "s3.amazonaws.com".into()))
    } else {
        (Store::Oss, endpoint.ok_or_else(|| missing("endpoint"))?)
    };
    let bucket = config.text("bucket_name").ok_or_else(|| missing("bucket_name"))?;
    let prefix = config.text("object_prefix").unwrap_or_default();
    let keys = match (config.text("access_key_id"), config.text("access_key_secret")) {
        (Some(id), Some(secret)) => Some(Keys { id, secret }),
        (None, None) => None,
        (Some(_), None) => return Err(missing("access_key_secret")),
        (None, Some(_)) => return Err(missing("access_key_id")),
    };
    let link = link(config);
    Ok(BucketBackend { store, scheme, endpoint, bucket, prefix, keys, link })
}

fn scheme(config: &mut Fields<'_>) -> String {
    match config.text("scheme") {
        Some(scheme) if scheme == "http" || scheme == "https" => scheme,
        Some(_) => {
            config.warn("scheme", "is neither http nor https: https is taken");
            "https".into()
        }
        None => "https".into(),
    }
}

fn link(config: &mut Fields<'_>) -> Link {
    let seconds = |value: Option<u64>, or: u32| {
        value.and_then(|v| u32::try_from(v).ok()).filter(|v| *v > 0).unwrap_or(or)
    };
    let usual = Link::default();
    let skip_verify = config.flag("skip_verify").unwrap_or(false);
    let ca = config.text("ca_cert_file").or_else(|| config.text("ca_cert")).map(Into::into);
    let timeout_s = seconds(config.number("timeout"), usual.timeout_s);
    let connect_timeout_s = seconds(config.number("connect_timeout"), usual.connect_timeout_s);
    // How often to try, and how to watch a proxy's health, is our own affair.
    config.ignore(&["retry_limit"]);
    let mut proxy = config.object("proxy");
    proxy.ignore(&["ping_url", "check_interval", "check_pause_elapsed", "use_http"]);
    let fallback = proxy.flag("fallback").unwrap_or(true);
    let found = proxy.text("url").map(|url| Proxy { url, fallback });
    proxy.end();
    Link { skip_verify, ca, timeout_s, connect_timeout_s, proxy: found }
}

#[cfg(test)]
mod tests;
