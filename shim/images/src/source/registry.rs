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
use reqwest::{Response, StatusCode, Url};
use tokio::time::Instant;

use super::auth::{Challenge, Token};
use super::http::{self, Http, HttpError};
use super::{Part, SourceError};
use crate::config::{Auth, RegistryBackend};

/// Most bytes of a token service's answer.
const MAX_TOKEN: usize = 64 << 10;

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
    http: Http,
    endpoints: Vec<Endpoint>,
    repo: String,
    auth: Option<Auth>,
}

impl Registry {
    /// A repository as its configuration says.
    pub fn new(config: &RegistryBackend) -> Result<Self, HttpError> {
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
        Ok(Self {
            http: Http::new(&config.host, &config.link)?,
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
        let range = http::range(offset, len);
        let response = self.get(endpoint, &url, Some(&range)).await?;
        http::part(endpoint.base.as_str(), response, offset, len).await
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
        self.http.get(url, headers).await
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
        let mut request = self.http.client.get(url);
        if let Some(Auth::Basic { user, password }) = &self.auth {
            request = request.basic_auth(user, Some(password));
        }
        let response = request.send().await;
        let response = response.map_err(|error| {
            SourceError::Unavailable(format!("token service {realm}: {}", http::why(&error)))
        })?;
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
                piece.map_err(|error| SourceError::Unavailable(format!("{realm}: {}", http::why(&error))))?;
            if answer.len() + piece.len() > MAX_TOKEN {
                return Err(broken("answers without end"));
            }
            answer.extend_from_slice(&piece);
        }
        Token::parse(&answer).ok_or_else(|| broken("answers without a token"))
    }
}

impl Endpoint {
    fn new(what: &'static str, host: &str, scheme: &str, headers: HeaderMap) -> Result<Self, HttpError> {
        let mut url = if host.contains("://") { host.to_owned() } else { format!("{scheme}://{host}") };
        if !url.ends_with('/') {
            url.push('/');
        }
        match Url::parse(&url) {
            Ok(base) if matches!(base.scheme(), "http" | "https") && base.has_host() => {
                Ok(Self { base, headers, state: Mutex::default() })
            }
            _ => Err(HttpError::Url { what, url }),
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

fn basic(user: &str, password: &str) -> String {
    let both = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    format!("Basic {both}")
}
