//! HTTP as back ends speak it: a client as a configuration wants it, and a part of a blob as an answer.

use std::time::Duration;

use futures_util::StreamExt;
use reqwest::header::HeaderMap;
use reqwest::{Certificate, Client, Response, StatusCode, Url};

use super::SourceError;
use crate::config::Link;

/// Why a server cannot even be asked.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
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
    #[error("{what} {url} is no URL that can be asked")]
    Url {
        /// Whose.
        what: &'static str,
        /// It.
        url: String,
    },
    /// The HTTP client.
    #[error("set up HTTP for {host}")]
    Client {
        /// For which server.
        host: String,
        /// Why not.
        #[source]
        source: reqwest::Error,
    },
}

/// A client for one server.
#[derive(Debug)]
pub struct Http {
    /// Through the proxy, where there is one.
    pub client: Client,
    /// Without it, where it may be gone around.
    direct: Option<Client>,
}

impl Http {
    /// For `host`, as its configuration says.
    pub fn new(host: &str, link: &Link) -> Result<Self, HttpError> {
        let proxy = link.proxy.as_ref();
        let client = client(host, link, proxy.map(|proxy| proxy.url.as_str()))?;
        let direct = proxy.filter(|proxy| proxy.fallback).map(|_| self::client(host, link, None));
        Ok(Self { client, direct: direct.transpose()? })
    }

    /// A GET.
    pub async fn get(&self, url: &Url, headers: HeaderMap) -> Result<Response, SourceError> {
        let place = place(url);
        let sent = self.client.get(url.clone()).headers(headers.clone()).send().await;
        let sent = match (sent, &self.direct) {
            (Err(error), Some(direct)) if error.is_connect() => {
                log::warn!("{place}: {}; going around the proxy", why(&error));
                direct.get(url.clone()).headers(headers).send().await
            }
            (sent, _) => sent,
        };
        sent.map_err(|error| SourceError::Unavailable(format!("{place}: {}", why(&error))))
    }
}

/// What a message says of a URL: nothing that could have a signature in it.
pub fn place(url: &Url) -> String {
    let mut place = url.clone();
    place.set_query(None);
    place.to_string()
}

fn client(host: &str, link: &Link, proxy: Option<&str>) -> Result<Client, HttpError> {
    let failed = |source| HttpError::Client { host: host.to_owned(), source };
    let mut builder = Client::builder()
        .connect_timeout(Duration::from_secs(link.connect_timeout_s.into()))
        // Of silence, not of the whole: a slow link is no dead one.
        .read_timeout(Duration::from_secs(link.timeout_s.into()))
        .pool_max_idle_per_host(8)
        .user_agent(concat!("ctvm/", env!("CARGO_PKG_VERSION")))
        // What the environment of a service says is seldom meant for it.
        .no_proxy();
    if let Some(ca) = &link.ca {
        let path = ca.display().to_string();
        let pem = std::fs::read(ca).map_err(|source| HttpError::Ca { path, source })?;
        for certificate in Certificate::from_pem_bundle(&pem).map_err(failed)? {
            builder = builder.add_root_certificate(certificate);
        }
    }
    if link.skip_verify {
        log::warn!("{host}: its certificate is not checked, as its configuration says");
        builder = builder.danger_accept_invalid_certs(true);
    }
    if let Some(proxy) = proxy {
        builder = builder.proxy(reqwest::Proxy::all(proxy).map_err(failed)?);
    }
    builder.build().map_err(failed)
}

/// The header that asks for `len` bytes from `offset`.
pub fn range(offset: u64, len: usize) -> String {
    format!("bytes={offset}-{}", offset + (len as u64).max(1) - 1)
}

/// The `len` bytes from `offset` that an answer has, all of them.
pub async fn part(place: &str, response: Response, offset: u64, len: usize) -> Result<Vec<u8>, SourceError> {
    let status = response.status();
    let whole = status == StatusCode::OK && offset == 0 && response.content_length() == Some(len as u64);
    if status != StatusCode::PARTIAL_CONTENT && !whole {
        return Err(refused(place, status, len));
    }
    body(place, response, len).await
}

async fn body(place: &str, response: Response, len: usize) -> Result<Vec<u8>, SourceError> {
    let mut bytes = Vec::with_capacity(len);
    let mut stream = response.bytes_stream();
    while let Some(piece) = stream.next().await {
        let cut = |error| SourceError::Unavailable(format!("{}: {}", place, why(&error)));
        let piece = piece.map_err(cut)?;
        if bytes.len() + piece.len() > len {
            return Err(SourceError::Broken(format!("{} sends more than the {len} bytes asked for", place)));
        }
        bytes.extend_from_slice(&piece);
    }
    if bytes.len() < len {
        let got = bytes.len();
        return Err(SourceError::Broken(format!(
            "{} sends {got} bytes of the {len} asked for: the blob is truncated",
            place
        )));
    }
    Ok(bytes)
}

fn refused(place: &str, status: StatusCode, len: usize) -> SourceError {
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

/// An error with its causes, without the URL (it is told already, and may have a token in it).
pub fn why(error: &reqwest::Error) -> String {
    let mut text = Vec::new();
    let mut next: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(cause) = next {
        text.push(cause.to_string());
        next = cause.source();
    }
    if text.is_empty() { "the connection failed".into() } else { text.join(": ") }
}
