//! A repository of a registry (OCI distribution 1.1): pulled from and pushed to.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures_util::StreamExt;
use images::config::Auth;
use images::source::auth::{Challenge, Token};
use reqwest::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, LOCATION, WWW_AUTHENTICATE};
use reqwest::{Certificate, Client, RequestBuilder, Response, StatusCode, Url};
use tokio::io::AsyncWriteExt;

use crate::oci::{Descriptor, media};
use crate::progress::Progress;
use crate::store::{MAX_MANIFEST, Raw};

/// How registries let us in.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    /// A name and a password for all of them. Else those of Docker's configuration.
    pub auth: Option<Auth>,
    /// Certificates of an authority, PEM, besides the system's.
    pub ca: Option<PathBuf>,
}

impl Credentials {
    fn of(&self, host: &str) -> Option<Auth> {
        self.auth.clone().or_else(|| {
            let folder = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
            let folder = folder.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker")))?;
            let config = std::fs::read(folder.join("config.json")).ok()?;
            let config: serde_json::Value = serde_json::from_slice(&config).ok()?;
            Auth::from_base64(config["auths"][host]["auth"].as_str()?)
        })
    }
}

/// A repository.
#[derive(Debug)]
pub struct Remote {
    client: Client,
    base: Url,
    repository: String,
    auth: Option<Auth>,
    token: Mutex<Option<Token>>,
}

impl Remote {
    /// A repository of the registry at `host`.
    pub fn new(scheme: &str, host: &str, repository: &str, credentials: &Credentials) -> Result<Self> {
        let mut builder = Client::builder()
            .connect_timeout(Duration::from_secs(10))
            .read_timeout(Duration::from_secs(60))
            .user_agent(concat!("ctvm/", env!("CARGO_PKG_VERSION")));
        if let Some(ca) = &credentials.ca {
            let pem = std::fs::read(ca).with_context(|| format!("read {}", ca.display()))?;
            for certificate in Certificate::from_pem_bundle(&pem)? {
                builder = builder.add_root_certificate(certificate);
            }
        }
        let base = Url::parse(&format!("{scheme}://{host}/")).with_context(|| format!("{host} as a host"))?;
        let auth = credentials.of(host);
        Ok(Self {
            client: builder.build()?,
            base,
            repository: repository.into(),
            auth,
            token: Mutex::default(),
        })
    }

    /// A manifest or an index.
    pub async fn manifest(&self, reference: &str) -> Result<Raw> {
        let url = self.url(&format!("manifests/{reference}"))?;
        let accept = [media::MANIFEST, media::INDEX, media::DOCKER_MANIFEST, media::DOCKER_LIST].join(", ");
        let response = self.send(|| self.client.get(url.clone()).header(ACCEPT, &accept)).await?;
        let response = expect(response, &[StatusCode::OK])?;
        let media_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type =
            media_type.unwrap_or_default().split(';').next().unwrap_or_default().trim().to_owned();
        let mut bytes = Vec::new();
        let mut stream = response.bytes_stream();
        while let Some(piece) = stream.next().await {
            bytes.extend_from_slice(&piece?);
            ensure!(bytes.len() as u64 <= MAX_MANIFEST, "a manifest of more than {MAX_MANIFEST} bytes");
        }
        Ok(Raw { media_type, bytes })
    }

    /// Brings a blob into a file.
    pub async fn fetch(&self, descriptor: &Descriptor, to: &Path, progress: &mut Progress) -> Result<()> {
        let url = self.url(&format!("blobs/{}", descriptor.digest))?;
        let response = expect(self.send(|| self.client.get(url.clone())).await?, &[StatusCode::OK])?;
        let mut file = tokio::fs::File::create(to).await.with_context(|| format!("make {}", to.display()))?;
        let (mut stream, mut size) = (response.bytes_stream(), 0);
        while let Some(piece) = stream.next().await {
            let piece = piece?;
            size += piece.len() as u64;
            ensure!(
                descriptor.size == 0 || size <= descriptor.size,
                "there are more than {} bytes",
                descriptor.size
            );
            file.write_all(&piece).await.with_context(|| format!("write {}", to.display()))?;
            progress.add(piece.len() as u64);
        }
        Ok(file.flush().await?)
    }

    /// Whether a blob is there.
    pub async fn has(&self, hex: &str) -> Result<bool> {
        let url = self.url(&format!("blobs/sha256:{hex}"))?;
        let response = self.send(|| self.client.head(url.clone())).await?;
        Ok(expect(response, &[StatusCode::OK, StatusCode::NOT_FOUND])?.status() == StatusCode::OK)
    }

    /// Puts a blob there.
    pub async fn put(&self, hex: &str, from: &Path, progress: &mut Progress) -> Result<()> {
        let url = self.url("blobs/uploads/")?;
        let response = self.send(|| self.client.post(url.clone()).header(CONTENT_LENGTH, 0)).await?;
        let response = expect(response, &[StatusCode::ACCEPTED])?;
        let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let mut place = url.join(location.context("a registry that does not say where to upload")?)?;
        place.query_pairs_mut().append_pair("digest", &format!("sha256:{hex}"));
        let size = std::fs::metadata(from)?.len();
        // Opened for each attempt: a token may have ended since.
        let file = || std::fs::File::open(from).map(tokio::fs::File::from_std);
        file().with_context(|| format!("open {}", from.display()))?;
        let request = || {
            let request = self.client.put(place.clone()).header(CONTENT_LENGTH, size);
            let request = request.header(CONTENT_TYPE, "application/octet-stream");
            match file() {
                Ok(file) => request.body(file),
                Err(_) => request,
            }
        };
        expect(self.send(request).await?, &[StatusCode::CREATED])?;
        progress.add(size);
        Ok(())
    }

    /// Gives a manifest the name.
    pub async fn name(&self, reference: &str, raw: &Raw) -> Result<()> {
        let url = self.url(&format!("manifests/{reference}"))?;
        let request =
            || self.client.put(url.clone()).header(CONTENT_TYPE, &raw.media_type).body(raw.bytes.clone());
        expect(self.send(request).await?, &[StatusCode::CREATED])?;
        Ok(())
    }

    fn url(&self, path: &str) -> Result<Url> {
        Ok(self.base.join(&format!("v2/{}/{path}", self.repository))?)
    }

    /// Sends a request with whatever credentials the registry turns out to want.
    async fn send(&self, request: impl Fn() -> RequestBuilder) -> Result<Response> {
        let response =
            self.authorize(request()).send().await.with_context(|| format!("ask {}", self.base))?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        let challenges = response.headers().get_all(WWW_AUTHENTICATE).iter();
        match challenges.filter_map(|value| Challenge::parse(value.to_str().ok()?)).next() {
            Some(Challenge::Bearer { realm, service, scope }) => {
                let token = self.fetch_token(&realm, service.as_deref(), scope.as_deref()).await?;
                *self.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(token);
                Ok(self.authorize(request()).send().await?)
            }
            Some(Challenge::Basic) => {
                let Some(Auth::Basic { user, password }) = &self.auth else { return Ok(response) };
                Ok(request().basic_auth(user, Some(password)).send().await?)
            }
            None => Ok(response),
        }
    }

    fn authorize(&self, request: RequestBuilder) -> RequestBuilder {
        let token = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        match (token.as_ref().filter(|token| token.is_fresh()), &self.auth) {
            (Some(token), _) => request.bearer_auth(&token.bearer),
            (None, Some(Auth::Token(token))) => request.bearer_auth(token),
            _ => request,
        }
    }

    async fn fetch_token(&self, realm: &str, service: Option<&str>, scope: Option<&str>) -> Result<Token> {
        let mut url = Url::parse(realm).with_context(|| format!("the token service {realm}"))?;
        ensure!(
            self.base.scheme() != "https" || url.scheme() == "https",
            "the token service {realm} is not HTTPS as the registry is"
        );
        let ours = format!("repository:{}:pull,push", self.repository);
        url.query_pairs_mut().append_pair("scope", scope.unwrap_or(&ours));
        if let Some(service) = service {
            url.query_pairs_mut().append_pair("service", service);
        }
        let mut request = self.client.get(url);
        if let Some(Auth::Basic { user, password }) = &self.auth {
            request = request.basic_auth(user, Some(password));
        }
        let response = request.send().await.with_context(|| format!("ask the token service {realm}"))?;
        ensure!(response.status().is_success(), "the token service {realm} answers {}", response.status());
        let answer = response.bytes().await?;
        Token::parse(&answer).with_context(|| format!("the token service {realm} gives no token"))
    }
}

fn expect(response: Response, wanted: &[StatusCode]) -> Result<Response> {
    let status = response.status();
    if wanted.contains(&status) {
        return Ok(response);
    }
    let url = response.url();
    let place = format!("{}{}", url.host_str().unwrap_or_default(), url.path());
    bail!(match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN =>
            format!("{place}: {status}; wrong or no credentials"),
        StatusCode::NOT_FOUND => format!("{place}: not found"),
        status => format!("{place}: {status}"),
    })
}
