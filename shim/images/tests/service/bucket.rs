//! Blobs of an object store: S3 and OSS, asked as the Nydus daemon asks them.

use base64::Engine;
use hmac::{Hmac, Mac};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::registry::{Registry, Request};
use crate::sample::{Running, Sample};

const EIO: u32 = 5;

/// What an object store wants of a request.
#[derive(Debug, Clone, Copy)]
pub enum Objects {
    S3,
    Oss,
}

impl Objects {
    /// The blob that is asked for, if the signature is good: computed here once more, from the services' own pages.
    pub fn strip(self, request: &Request) -> Result<String, u16> {
        let name = match self {
            Objects::S3 => "/images/nydus/",
            // By the bucket's host name, through a proxy.
            Objects::Oss => "http://images.oss.test/nydus/",
        };
        let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
        let digest = path.strip_prefix(name).ok_or(404_u16)?;
        let good = match self {
            Objects::S3 => s3_is_signed(path, query, request),
            Objects::Oss => oss_is_signed(digest, request),
        };
        if good { Ok(digest.to_owned()) } else { Err(403) }
    }
}

fn oss_is_signed(digest: &str, request: &Request) -> bool {
    let date = request.headers.get("date").map_or("", String::as_str);
    let mut mac = Hmac::<Sha1>::new_from_slice(b"secret").expect("any length");
    mac.update(format!("GET\n\n\n{date}\n/images/nydus/{digest}").as_bytes());
    let signature = base64::engine::general_purpose::STANDARD.encode(mac.finalize().into_bytes());
    date.ends_with(" GMT") && request.headers.get("authorization") == Some(&format!("OSS id:{signature}"))
}

/// Signature Version 4 in the query: the URL's own parts, in their order, less the signature.
fn s3_is_signed(path: &str, query: &str, request: &Request) -> bool {
    let Some((signed, signature)) = query.split_once("&X-Amz-Signature=") else { return false };
    let host = request.headers.get("host").map_or("", String::as_str);
    let canonical = format!("GET\n{path}\n{signed}\nhost:{host}\n\nhost\nUNSIGNED-PAYLOAD");
    let value = |name: &str| signed.split('&').find_map(|pair| pair.strip_prefix(name)).unwrap_or_default();
    let time = value("X-Amz-Date=");
    let date = time.get(..8).unwrap_or_default();
    let hash = Sha256::digest(canonical.as_bytes());
    let text = format!("AWS4-HMAC-SHA256\n{time}\n{date}/r1/s3/aws4_request\n{hash:x}");
    let step = |key: &[u8], text: &str| {
        let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("any length");
        mac.update(text.as_bytes());
        mac.finalize().into_bytes().to_vec()
    };
    let key =
        [date, "r1", "s3", "aws4_request"].iter().fold(b"AWS4secret".to_vec(), |key, text| step(&key, text));
    let wanted: String = step(&key, &text).iter().map(|byte| format!("{byte:02x}")).collect();
    value("X-Amz-Credential=") == format!("id%2F{date}%2Fr1%2Fs3%2Faws4_request") && signature == wanted
}

fn config(store: Objects, at: std::net::SocketAddr, secret: &str) -> String {
    let (kind, place) = match store {
        Objects::S3 => ("s3", format!(r#""endpoint": "{at}", "region": "r1""#)),
        Objects::Oss => (
            "oss",
            format!(r#""endpoint": "oss.test", "proxy": {{"url": "http://{at}", "fallback": false}}"#),
        ),
    };
    format!(
        r#"{{"version": 2, "backend": {{"type": "{kind}", "{kind}": {{{place}, "scheme": "http", "bucket_name": "images",
            "object_prefix": "nydus/", "access_key_id": "id", "access_key_secret": "{secret}"}}}}}}"#
    )
}

#[test]
fn an_image_of_an_object_store_reads_as_the_folder() {
    for store in [Objects::S3, Objects::Oss] {
        let sample = Sample::new();
        let built = sample.build_v6();
        let objects = Registry::with_blobs(&sample.blobs());
        objects.state().objects = Some(store);
        let running = Running::plain();
        let wrong = running.open(&built.bootstrap, &config(store, objects.address, "guessed"));
        assert_eq!(wrong.fetch(0, 0, 1), EIO, "{store:?}: a signature by another key");
        let client = running.open(&built.bootstrap, &config(store, objects.address, "secret"));
        sample.compare(&built.bootstrap, &client);
        let state = objects.state();
        let said =
            state.log.iter().filter(|line| line.contains(" bytes=") && line.ends_with("-> 206")).count();
        assert!(said > 0 && state.log.len() == said + 1, "{store:?}: {:?}", state.log);
    }
}
