//! What the service is told: by the node's operator (TOML) and, for each image, by the snapshotter (the daemon's JSON).

mod fields;
pub mod nydusd;

use std::collections::BTreeMap;
use std::path::PathBuf;

use base64::Engine;
use serde::Deserialize;

/// Where an image's blobs are.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Backend {
    /// In folders of this machine, in this order.
    Folder {
        /// Them.
        folders: Vec<PathBuf>,
    },
    /// In a registry.
    Registry(RegistryBackend),
    /// In a bucket of an object store.
    Bucket(BucketBackend),
}

/// A repository of a registry.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RegistryBackend {
    /// `http` or `https`.
    pub scheme: String,
    /// Its name, with a port where it has one.
    pub host: String,
    /// Its repository.
    pub repo: String,
    /// Credentials.
    pub auth: Option<Auth>,
    /// How it is reached.
    pub link: Link,
    /// Places that have the same, asked first.
    pub mirrors: Vec<Mirror>,
}

/// What it looks like in a log: nothing of its credentials.
impl std::fmt::Debug for RegistryBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}/{}", self.scheme, self.host, self.repo)
    }
}

impl RegistryBackend {
    /// A repository with nothing special about it.
    pub fn new(scheme: &str, host: &str, repo: &str) -> Self {
        Self {
            scheme: scheme.into(),
            host: host.into(),
            repo: repo.into(),
            auth: None,
            link: Link::default(),
            mirrors: Vec::new(),
        }
    }
}

/// How a server is reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Link {
    /// Its certificate is not checked.
    pub skip_verify: bool,
    /// Certificates of its authority, PEM, besides the system's.
    pub ca: Option<PathBuf>,
    /// After so many seconds without a byte it is unavailable.
    pub timeout_s: u32,
    /// As much for a connection.
    pub connect_timeout_s: u32,
    /// A proxy between.
    pub proxy: Option<Proxy>,
}

impl Default for Link {
    fn default() -> Self {
        Self { skip_verify: false, ca: None, timeout_s: 20, connect_timeout_s: 5, proxy: None }
    }
}

/// A bucket of an object store. A blob is the object of its name, behind a prefix.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct BucketBackend {
    /// Whose words it speaks.
    pub store: Store,
    /// `http` or `https`.
    pub scheme: String,
    /// The store's name, with a port where it has one.
    pub endpoint: String,
    /// Its name.
    pub bucket: String,
    /// What comes before a blob's name.
    pub prefix: String,
    /// None for a bucket that anybody may read.
    pub keys: Option<Keys>,
    /// How it is reached.
    pub link: Link,
}

/// What it looks like in a log: nothing of its keys.
impl std::fmt::Debug for BucketBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}/{}/{}", self.scheme, self.endpoint, self.bucket, self.prefix)
    }
}

/// Kinds of object stores.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Store {
    /// Amazon S3, and what is like it.
    S3 {
        /// Where it is.
        region: String,
    },
    /// Alibaba Cloud OSS.
    Oss,
}

/// Who asks an object store.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Keys {
    /// Access key id.
    pub id: String,
    /// Access key secret.
    pub secret: String,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys")
    }
}

/// Credentials.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Auth {
    /// A name and a password.
    Basic {
        /// The name.
        user: String,
        /// The password.
        password: String,
    },
    /// A bearer token.
    Token(String),
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Auth")
    }
}

impl Auth {
    /// `name:password` in base64, as Docker's and the daemon's configurations have it.
    pub fn from_base64(text: &str) -> Option<Self> {
        let bytes = base64::engine::general_purpose::STANDARD.decode(text.trim()).ok()?;
        let both = String::from_utf8(bytes).ok()?;
        let (user, password) = both.split_once(':')?;
        Some(Auth::Basic { user: user.into(), password: password.into() })
    }
}

/// A place that has the same as a registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mirror {
    /// Its name or URL.
    pub host: String,
    /// Headers to send it.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
}

/// A proxy.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Proxy {
    /// Its URL.
    pub url: String,
    /// Whether to go around it when it is not there.
    pub fallback: bool,
}

/// How far ahead of the guest to fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ahead {
    /// The image's list and the trace of earlier starts.
    pub listed: bool,
    /// In the end, all of it.
    pub all: bool,
    /// Bytes a second for this; 0 for any number.
    pub rate: u64,
}

/// The operator's file: `ctvm-images serve --config`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// See [`CacheConfig`].
    pub cache: CacheConfig,
    /// See [`FetchConfig`].
    pub fetch: FetchConfig,
    /// Folders with blobs, for images that come without a configuration.
    pub folders: Vec<PathBuf>,
    /// What is to be known of some registries.
    pub registry: Vec<RegistryRule>,
}

/// How large the cache may be.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheConfig {
    /// MiB on the disk above which what nobody uses is removed.
    pub max_mib: u64,
    /// MiB of the file system that stay free.
    pub min_free_mib: u64,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self { max_mib: 20 << 10, min_free_mib: 512 }
    }
}

/// How to fetch.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FetchConfig {
    /// KiB/s that all back ends together may bring; 0 for any number.
    pub rate_kib: u64,
    /// KiB to fetch with what a guest asked for, where its neighbours are not there either.
    pub read_ahead_kib: u64,
    /// Seconds for which what is not available is tried again, before the guest gets an error.
    pub patience_s: u64,
    /// Fetch the image's list and what earlier starts read.
    pub prefetch: bool,
    /// Fetch all of an image in the end.
    pub background_fill: bool,
    /// KiB/s for fetching ahead; 0 for any number.
    pub prefetch_rate_kib: u64,
}

impl Default for FetchConfig {
    fn default() -> Self {
        Self {
            rate_kib: 0,
            read_ahead_kib: 128,
            patience_s: 60,
            prefetch: true,
            background_fill: false,
            prefetch_rate_kib: 0,
        }
    }
}

/// What an operator says of a registry. It adds to what an image's configuration says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryRule {
    /// Its name, with a port where it has one.
    pub host: String,
    /// It speaks plain HTTP.
    pub plain_http: bool,
    /// Certificates of its authority, PEM.
    pub ca: Option<PathBuf>,
    /// Credentials.
    pub auth: Option<Auth>,
    /// Places that have the same.
    pub mirrors: Vec<Mirror>,
    /// URL of a proxy.
    pub proxy: Option<String>,
}

impl<'de> Deserialize<'de> for RegistryRule {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Written {
            host: String,
            #[serde(default)]
            plain_http: bool,
            ca: Option<PathBuf>,
            username: Option<String>,
            password: Option<String>,
            token: Option<String>,
            #[serde(default)]
            mirrors: Vec<Mirror>,
            proxy: Option<String>,
        }
        let Written { host, plain_http, ca, username, password, token, mirrors, proxy } =
            Written::deserialize(deserializer)?;
        let auth = match (username, password, token) {
            (None, None, None) => None,
            (Some(user), Some(password), None) => Some(Auth::Basic { user, password }),
            (None, None, Some(token)) => Some(Auth::Token(token)),
            _ => {
                let wrong = "a registry has either username and password, or a token";
                return Err(serde::de::Error::custom(wrong));
            }
        };
        Ok(Self { host, plain_http, ca, auth, mirrors, proxy })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operators_file() {
        let config: Config = toml::from_str(
            "folders = [\"/var/lib/blobs\"]\n[cache]\nmax_mib = 10\n[fetch]\nread_ahead_kib = 0\n\
             [[registry]]\nhost = \"r:5000\"\nplain_http = true\nusername = \"u\"\npassword = \"p\"\n\
             mirrors = [{ host = \"http://m\" }]\n",
        )
        .expect("fine");
        assert_eq!((config.cache.max_mib, config.cache.min_free_mib), (10, 512));
        assert_eq!(config.registry[0].mirrors[0].host, "http://m");
        assert_eq!(format!("{:?}", config.registry[0].auth), "Some(Auth)", "no secrets in logs");
        for wrong in ["cahce = 1", "[cache]\nmax = 1", "[[registry]]\nhost = \"x\"\nusername = \"u\""] {
            assert!(toml::from_str::<Config>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn docker_credentials() {
        let auth = Auth::from_base64("dXNlcjpwYTpzcw==").expect("fine");
        assert_eq!(auth, Auth::Basic { user: "user".into(), password: "pa:ss".into() });
        assert!(Auth::from_base64("dXNlcg==").is_none() && Auth::from_base64("!").is_none());
    }
}
