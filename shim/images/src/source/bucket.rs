//! Blobs as objects of a bucket: S3 by signed URLs (Signature Version 4), OSS by its own signature (version 1), as the Nydus
//! daemon asks them.

use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac};
use reqwest::Url;
use reqwest::header::{AUTHORIZATION, DATE, HeaderMap, HeaderName, HeaderValue, RANGE};
use rusty_s3::actions::{GetObject, S3Action};
use rusty_s3::{Credentials, UrlStyle};
use sha1::Sha1;

use super::http::{self, Http, HttpError};
use super::{Part, SourceError};
use crate::config::{BucketBackend, Keys, Store};

/// For how long a signed URL is good. It is used at once; clocks differ.
const GOOD_FOR: Duration = Duration::from_secs(15 * 60);

/// A bucket.
#[derive(Debug)]
pub struct Bucket {
    http: Http,
    prefix: String,
    signer: Signer,
}

enum Signer {
    S3 { bucket: rusty_s3::Bucket, credentials: Option<Credentials> },
    Oss { base: Url, bucket: String, keys: Option<Keys> },
}

/// Nothing of the keys.
impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Signer::S3 { .. } => "S3",
            Signer::Oss { .. } => "Oss",
        })
    }
}

impl Bucket {
    /// A bucket as its configuration says.
    pub fn new(config: &BucketBackend) -> Result<Self, HttpError> {
        let BucketBackend { store, scheme, endpoint, bucket, prefix, keys, link } = config;
        let url = |host: &str| {
            let url = format!("{scheme}://{host}/");
            Url::parse(&url).map_err(|_| HttpError::Url { what: "the object store", url })
        };
        let signer = match store {
            Store::S3 { region } => {
                let base = url(endpoint)?;
                let at = base.to_string();
                let bucket = rusty_s3::Bucket::new(base, UrlStyle::Path, bucket.clone(), region.clone())
                    .map_err(|_| HttpError::Url { what: "the object store", url: at })?;
                let credentials = keys.as_ref().map(|keys| Credentials::new(&keys.id, &keys.secret));
                Signer::S3 { bucket, credentials }
            }
            Store::Oss => {
                let base = url(&format!("{bucket}.{endpoint}"))?;
                Signer::Oss { base, bucket: bucket.clone(), keys: keys.clone() }
            }
        };
        Ok(Self { http: Http::new(endpoint, link)?, prefix: prefix.clone(), signer })
    }

    /// Reads a part once.
    pub async fn read(&self, part: Part<'_>) -> Result<Vec<u8>, SourceError> {
        let Part { blob, offset, len } = part;
        let (url, mut headers) = self.signer.get(&format!("{}{blob}", self.prefix), SystemTime::now())?;
        headers.insert(RANGE, value(&http::range(offset, len))?);
        let response = self.http.get(&url, headers).await?;
        http::part(&http::place(&url), response, offset, len).await
    }
}

impl Signer {
    /// Where an object is, and what a GET of it needs.
    fn get(&self, object: &str, now: SystemTime) -> Result<(Url, HeaderMap), SourceError> {
        match self {
            Signer::S3 { bucket, credentials } => {
                let url = GetObject::new(bucket, credentials.as_ref(), object).sign(GOOD_FOR);
                Ok((url, HeaderMap::new()))
            }
            Signer::Oss { base, bucket, keys } => {
                let url = base.join(object);
                let url = url.map_err(|_| SourceError::Broken(format!("{base}{object} is no URL")))?;
                let mut headers = HeaderMap::new();
                if let Some(keys) = keys {
                    let date = httpdate::fmt_http_date(now);
                    // Of method, MD5, type, date and resource, the MD5 and the type are empty.
                    let signed = format!("GET\n\n\n{date}\n/{bucket}/{object}");
                    let signed = format!("OSS {}:{}", keys.id, hmac_sha1(&keys.secret, &signed));
                    insert(&mut headers, DATE, &date)?;
                    insert(&mut headers, AUTHORIZATION, &signed)?;
                }
                Ok((url, headers))
            }
        }
    }
}

fn hmac_sha1(key: &str, text: &str) -> String {
    let mut mac = Hmac::<Sha1>::new_from_slice(key.as_bytes()).expect("a key of any length will do");
    mac.update(text.as_bytes());
    STANDARD.encode(mac.finalize().into_bytes())
}

fn insert(headers: &mut HeaderMap, name: HeaderName, text: &str) -> Result<(), SourceError> {
    let mut value = value(text)?;
    value.set_sensitive(name == AUTHORIZATION);
    headers.insert(name, value);
    Ok(())
}

fn value(text: &str) -> Result<HeaderValue, SourceError> {
    let wrong = |_| SourceError::Broken("the access key id cannot be sent in a header".into());
    HeaderValue::from_str(text).map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of Alibaba Cloud's page "Include signatures in the Authorization header (V1)", as a GET would sign.
    #[test]
    fn oss_signs_what_its_page_says() {
        let signed = "PUT\nODBGOERFMDMzQTczRUY3NUE3NzA5QzdFNUYzMDQxNEM=\ntext/html\nThu, 17 Nov 2005 18:49:58 GMT\n\
                      x-oss-magic:abracadabra\nx-oss-meta-author:foo@bar.com\n/oss-example/nelson";
        assert_eq!(
            hmac_sha1("OtxrzxIsfpFjA7SwPzILwy8Bw21TLhquhboDYROV", signed),
            "26NBxoKdsyly4EDv6inkoDft/yA="
        );
    }
}
