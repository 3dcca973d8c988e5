//! Blobs of a registry (OCI distribution 1.1), by range requests.
//!
//! A registry has one or several *places*: its mirrors in their order, then itself. A place that fails is left out for a while that
//! grows with each failure, so that a dead mirror costs one timeout and not one a chunk. What a mirror refuses or lacks is asked of
//! the next one.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use futures_util::StreamExt;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, RANGE, WWW_AUTHENTICATE};
use reqwest::{Certificate, Client, Response, StatusCode, Url};
use tokio::time::Instant;

use super::auth::{Challenge, Token};
use super::{Part, SourceError};
use crate::config::{Auth, RegistryBackend};

/// Most bytes of a token service's answer.
const MAX_TOKEN: usize = 64 << 10;

/// Why a registry cannot even be asked.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A file of certificates.
    #[error("read the CA certificates in {path}")]
    Ca {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A URL.
    #[error("{what} {url} is no URL for a registry")]
    Url {
        /// Whose.
        what: &'static str,
        /// It.
        url: String,
    },
    /// The HTTP client.
    #[error("set up HTTP for {host}")]
    Client {
        /// For which registry.
        host: String,
        /// Why not.
        #[source]
        source: reqwest::Error,
    },
}

/// A place that has a registry's blobs.
#[derive(Debug)]
pub struct Endpoint {
    base: Url,
    headers: HeaderMap,
    /// Credentials are the registry's; a mirror gets them only where it asks for them by the same means.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    token: Option<Token>,
    /// Name and password were asked for.
    basic: bool,
    failures: u32,
    /// Left out until then.
    until: Option<Instant>,
}

/// A repository of a registry.
#[derive(Debug)]
pub struct Registry {
    client: Client,
    /// Without the proxy, where it may be gone around.
    direct: Option<Client>,
    endpoints: Vec<Endpoint>,
    repo: String,
    auth: Option<Auth>,
}

impl Registry {
    /// A repository as its configuration says.
    pub fn new(config: &RegistryBackend) -> Result<Self, RegistryError> {
        let client = |proxy: Option<&str>| -> Result<Client, RegistryError> {
            let failed = |source| RegistryError::Client { host: config.host.clone(), source };
            let mut builder = Client::builder()
                .connect_timeout(Duration::from_secs(config.connect_timeout_s.into()))
                // Of silence, not of the whole: a slow link is no dead one.
                .read_timeout(Duration::from_secs(config.timeout_s.into()))
                .pool_max_idle_per_host(8)
                .user_agent(concat!("ctvm/", env!("CARGO_PKG_VERSION")))
                // What the environment of a service says is seldom meant for it.
                .no_proxy();
            if let Some(ca) = &config.ca {
                let path = ca.display().to_string();
                let pem = std::fs::read(ca).map_err(|source| RegistryError::Ca { path, source })?;
                for certificate in Certificate::from_pem_bundle(&pem).map_err(failed)? {
                    builder = builder.add_root_certificate(certificate);
                }
            }
            if config.skip_verify {
                log::warn!("{}: its certificate is not checked, as its configuration says", config.host);
                builder = builder.danger_accept_invalid_certs(true);
            }
            if let Some(proxy) = proxy {
                builder = builder.proxy(reqwest::Proxy::all(proxy).map_err(failed)?);
            }
            builder.build().map_err(failed)
        };
        let mut endpoints = Vec::new();
        for mirror in &config.mirrors {
            let mut headers = HeaderMap::new();
            for (name, value) in &mirror.headers {
                match (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_str(value)) {
                    (Ok(name), Ok(value)) => drop(headers.insert(name, value)),
                    _ => log::warn!("mirror {}: header {name} cannot be sent", mirror.host),
                }
            }
            endpoints.push(Endpoint::new("the mirror", &mirror.host, &config.scheme, headers)?);
        }
        endpoints.push(Endpoint::new("the registry", &config.host, &config.scheme, HeaderMap::new())?);
        let proxy = config.proxy.as_ref();
        Ok(Self {
            client: client(proxy.map(|proxy| proxy.url.as_str()))?,
            direct: proxy.filter(|proxy| proxy.fallback).map(|_| client(None)).transpose()?,
            endpoints,
            repo: config.repo.clone(),
            auth: config.auth.clone(),
        })
    }

    /// How many places there are.
    pub fn places(&self) -> usize {
        self.endpoints.len()
    }

    /// Reads a part once from the first place, not counting the first `avoid`, that gives it.
    pub async fn read(&self, part: Part<'_>, avoid: usize) -> Result<(Vec<u8>, usize), SourceError> {
        let mut last = None;
        let now = Instant::now();
        // If all are left out, all are tried.
        let all_out = self.endpoints.iter().skip(avoid).all(|endpoint| endpoint.is_out(now));
        for (index, endpoint) in self.endpoints.iter().enumerate().skip(avoid) {
            if endpoint.is_out(now) && !all_out {
                continue;
            }
            match self.read_from(endpoint, part).await {
                Ok(bytes) => {
                    endpoint.went_well();
                    return Ok((bytes, index + 1));
                }
                Err(error) => {
                    if error.is_transient() {
                        endpoint.went_wrong();
                    }
                    if index + 1 < self.endpoints.len() {
                        log::warn!("blob {} at {}: {error}; trying the next place", part.blob, part.offset);
                    }
                    // What may come later is worth more than what another place is sure not to have.
                    if !matches!(last, Some(SourceError::Unavailable(_))) {
                        last = Some(error);
                    }
                }
            }
        }
        Err(last.unwrap_or_else(|| SourceError::Missing(format!("none of {} places", self.endpoints.len()))))
    }

    async fn read_from(&self, endpoint: &Endpoint, part: Part<'_>) -> Result<Vec<u8>, SourceError> {
        let Part { blob, offset, len } = part;
        let url = endpoint.url(&format!("v2/{}/blobs/sha256:{blob}", self.repo))?;
        let range = format!("bytes={offset}-{}", offset + (len as u64).max(1) - 1);
        let response = self.get(endpoint, &url, Some(&range)).await?;
        let status = response.status();
        let whole = status == StatusCode::OK && offset == 0 && response.content_length() == Some(len as u64);
        if status != StatusCode::PARTIAL_CONTENT && !whole {
            return Err(refused(endpoint, status, len));
        }
        body(endpoint, response, len).await
    }

    /// A GET with whatever credentials the place turns out to want.
    async fn get(
        &self,
        endpoint: &Endpoint,
        url: &Url,
        range: Option<&str>,
    ) -> Result<Response, SourceError> {
        let response = self.send(endpoint, url, range).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        let challenges = response.headers().get_all(WWW_AUTHENTICATE).iter();
        let challenge = challenges.filter_map(|value| Challenge::parse(value.to_str().ok()?)).next();
        let had_basic = endpoint.lock().basic;
        match challenge {
            Some(Challenge::Basic) if !had_basic && matches!(self.auth, Some(Auth::Basic { .. })) => {
                endpoint.lock().basic = true;
            }
            Some(Challenge::Bearer { realm, service, scope }) => {
                // A token that was given, or one that has ended before its time.
                let token = self.token(endpoint, &realm, service.as_deref(), scope.as_deref()).await?;
                endpoint.lock().token = Some(token);
            }
            _ => return Ok(response),
        }
        drop(response);
        self.send(endpoint, url, range).await
    }

    async fn send(
        &self,
        endpoint: &Endpoint,
        url: &Url,
        range: Option<&str>,
    ) -> Result<Response, SourceError> {
        let mut headers = endpoint.headers.clone();
        if let Some(range) = range.and_then(|range| HeaderValue::from_str(range).ok()) {
            headers.insert(RANGE, range);
        }
        if let Some(value) = self.authorization(endpoint) {
            headers.insert(AUTHORIZATION, value);
        }
        let sent = self.client.get(url.clone()).headers(headers.clone()).send().await;
        let sent = match (sent, &self.direct) {
            (Err(error), Some(direct)) if error.is_connect() => {
                log::warn!("{}: {}; going around the proxy", endpoint.base, why(&error));
                direct.get(url.clone()).headers(headers).send().await
            }
            (sent, _) => sent,
        };
        sent.map_err(|error| SourceError::Unavailable(format!("{}: {}", endpoint.base, why(&error))))
    }

    fn authorization(&self, endpoint: &Endpoint) -> Option<HeaderValue> {
        let state = endpoint.lock();
        let value = match (&state.token, &self.auth) {
            (Some(token), _) if token.is_fresh() => format!("Bearer {}", token.bearer),
            (None, Some(Auth::Token(token))) => format!("Bearer {token}"),
            (_, Some(Auth::Basic { user, password })) if state.basic => basic(user, password),
            _ => return None,
        };
        let mut value = HeaderValue::from_str(&value).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    async fn token(
        &self,
        endpoint: &Endpoint,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
    ) -> Result<Token, SourceError> {
        let broken =
            |why: &str| SourceError::Broken(format!("{}: its token service {realm} {why}", endpoint.base));
        let mut url = Url::parse(realm).map_err(|_| broken("has no URL"))?;
        // A name and a password do not go over a wire that the registry itself does not use.
        if endpoint.base.scheme() == "https" && url.scheme() != "https" {
            return Err(broken("is not HTTPS as the registry is"));
        }
        let ours = format!("repository:{}:pull", self.repo);
        {
            let mut query = url.query_pairs_mut();
            query.append_pair("scope", scope.unwrap_or(&ours));
            if let Some(service) = service {
                query.append_pair("service", service);
            }
        }
        let mut request = self.client.get(url);
        if let Some(Auth::Basic { user, password }) = &self.auth {
            request = request.basic_auth(user, Some(password));
        }
        let response = request.send().await;
        let response = response
            .map_err(|error| SourceError::Unavailable(format!("token service {realm}: {}", why(&error))))?;
        if !response.status().is_success() {
            return Err(match response.status() {
                status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                    SourceError::Unavailable(format!("token service {realm}: {status}"))
                }
                status => SourceError::Forbidden(format!("token service {realm} ({status})")),
            });
        }
        let mut answer = Vec::new();
        let mut stream = response.bytes_stream();
        while let Some(piece) = stream.next().await {
            let piece =
                piece.map_err(|error| SourceError::Unavailable(format!("{realm}: {}", why(&error))))?;
            if answer.len() + piece.len() > MAX_TOKEN {
                return Err(broken("answers without end"));
            }
            answer.extend_from_slice(&piece);
        }
        Token::parse(&answer).ok_or_else(|| broken("answers without a token"))
    }
}

impl Endpoint {
    fn new(what: &'static str, host: &str, scheme: &str, headers: HeaderMap) -> Result<Self, RegistryError> {
        let mut url = if host.contains("://") { host.to_owned() } else { format!("{scheme}://{host}") };
        if !url.ends_with('/') {
            url.push('/');
        }
        match Url::parse(&url) {
            Ok(base) if matches!(base.scheme(), "http" | "https") && base.has_host() => {
                Ok(Self { base, headers, state: Mutex::default() })
            }
            _ => Err(RegistryError::Url { what, url }),
        }
    }

    fn url(&self, path: &str) -> Result<Url, SourceError> {
        self.base.join(path).map_err(|_| SourceError::Broken(format!("{}{path} is no URL", self.base)))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_out(&self, now: Instant) -> bool {
        self.lock().until.is_some_and(|until| now < until)
    }

    fn went_well(&self) {
        let mut state = self.lock();
        (state.failures, state.until) = (0, None);
    }

    fn went_wrong(&self) {
        let mut state = self.lock();
        state.failures = state.failures.saturating_add(1);
        state.until = Some(Instant::now() + Duration::from_millis(500 << state.failures.min(6)));
    }
}

async fn body(endpoint: &Endpoint, response: Response, len: usize) -> Result<Vec<u8>, SourceError> {
    let mut bytes = Vec::with_capacity(len);
    let mut stream = response.bytes_stream();
    while let Some(piece) = stream.next().await {
        let cut = |error| SourceError::Unavailable(format!("{}: {}", endpoint.base, why(&error)));
        let piece = piece.map_err(cut)?;
        if bytes.len() + piece.len() > len {
            return Err(SourceError::Broken(format!(
                "{} sends more than the {len} bytes asked for",
                endpoint.base
            )));
        }
        bytes.extend_from_slice(&piece);
    }
    if bytes.len() < len {
        let got = bytes.len();
        return Err(SourceError::Broken(format!(
            "{} sends {got} bytes of the {len} asked for: the blob is truncated",
            endpoint.base
        )));
    }
    Ok(bytes)
}

fn refused(endpoint: &Endpoint, status: StatusCode, len: usize) -> SourceError {
    let place = endpoint.base.to_string();
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            SourceError::Forbidden(format!("{place} ({status})"))
        }
        StatusCode::NOT_FOUND | StatusCode::GONE => SourceError::Missing(format!("{place} ({status})")),
        StatusCode::RANGE_NOT_SATISFIABLE => {
            SourceError::Broken(format!("{place} ({status}): the blob is shorter than it shall be"))
        }
        StatusCode::OK => {
            SourceError::Broken(format!("{place} does not serve ranges: {len} bytes were asked for"))
        }
        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => {
            SourceError::Unavailable(format!("{place} ({status})"))
        }
        _ if status.is_server_error() => SourceError::Unavailable(format!("{place} ({status})")),
        _ => SourceError::Broken(format!("{place} ({status})")),
    }
}

fn basic(user: &str, password: &str) -> String {
    let both = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    format!("Basic {both}")
}

/// An error with its causes, without the URL (it is told already, and may have a token in it).
fn why(error: &reqwest::Error) -> String {
    let mut text = Vec::new();
    let mut next: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(cause) = next {
        text.push(cause.to_string());
        next = cause.source();
    }
    if text.is_empty() { "the connection failed".into() } else { text.join(": ") }
}
