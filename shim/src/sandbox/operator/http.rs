//! As much of HTTP/1.1 (RFC 9112) as a scraper needs, and `ctvm`: `GET` or `POST` of a path, one answer, and the
//! connection ends.
//!
//! A body and the header's fields are not looked at; the head is bounded and must come in time.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Most bytes of a request's head.
pub const MAX_HEAD: usize = 8 * 1024;
/// Most bytes of its target.
const MAX_TARGET: usize = 1024;
/// How long a client has to say what it wants.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Prometheus's text format.
pub const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Anything for people.
pub const TEXT_TYPE: &str = "text/plain; charset=utf-8";
/// Anything for programs.
pub const JSON_TYPE: &str = "application/json";

/// What is to be done with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Tell it.
    Get,
    /// Do it. What is to be done is in the query, as a body is not read.
    Post,
}

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// The target's path.
    pub path: String,
    /// What follows a `?`, or "".
    pub query: String,
}

/// Why there is no request.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RequestError {
    /// No HTTP.
    #[error("not an HTTP/1 request")]
    Malformed,
    /// Another method.
    #[error("methods are GET and POST")]
    Method,
    /// Another version.
    #[error("versions are HTTP/1.0 and HTTP/1.1")]
    Version,
    /// More than is read.
    #[error("more than {MAX_HEAD} bytes before the end of the head")]
    TooLong,
    /// Too slow.
    #[error("no request within {HEAD_TIMEOUT:?}")]
    Late,
    /// Nobody is there to be told.
    #[error("the client went away")]
    Gone,
}

impl RequestError {
    /// The status line's number and words; none where nobody listens.
    pub fn status(&self) -> Option<&'static str> {
        Some(match self {
            RequestError::Malformed => "400 Bad Request",
            RequestError::Method => "405 Method Not Allowed",
            RequestError::Version => "505 HTTP Version Not Supported",
            RequestError::TooLong => "431 Request Header Fields Too Large",
            RequestError::Late => "408 Request Timeout",
            RequestError::Gone => return None,
        })
    }
}

/// Reads the head of a request.
///
/// # Errors
/// See [`RequestError`].
pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> Result<Request, RequestError> {
    let head = async {
        let mut head = Vec::with_capacity(512);
        loop {
            if let Some(request) = parse(&head)? {
                return Ok(request);
            }
            let room = u64::try_from(MAX_HEAD - head.len()).expect("a small constant");
            match (&mut *from).take(room.min(512)).read_buf(&mut head).await {
                Ok(1..) => {}
                Ok(0) | Err(_) => return Err(RequestError::Gone),
            }
        }
    };
    tokio::time::timeout(HEAD_TIMEOUT, head).await.unwrap_or(Err(RequestError::Late))
}

/// The request, or none when its head has not ended yet.
///
/// # Errors
/// See [`RequestError`].
pub fn parse(head: &[u8]) -> Result<Option<Request>, RequestError> {
    let Some(line_end) = head.iter().position(|b| *b == b'\n') else {
        // What cannot become a request line is told at once.
        let begun = head.iter().all(|b| b.is_ascii_graphic() || matches!(b, b' ' | b'\r'));
        return match begun {
            true if head.len() < MAX_HEAD => Ok(None),
            true => Err(RequestError::TooLong),
            false => Err(RequestError::Malformed),
        };
    };
    let line = head[..line_end].strip_suffix(b"\r").unwrap_or(&head[..line_end]);
    let line = std::str::from_utf8(line).map_err(|_| RequestError::Malformed)?;
    let words: Vec<&str> = line.split(' ').collect();
    let &[method, target, version] = words.as_slice() else { return Err(RequestError::Malformed) };
    let is_target = target.starts_with('/') && target.bytes().all(|b| b.is_ascii_graphic());
    if method.is_empty() || !method.bytes().all(|b| b.is_ascii_uppercase()) || !is_target {
        return Err(RequestError::Malformed);
    }
    if target.len() > MAX_TARGET {
        return Err(RequestError::TooLong);
    }
    match version {
        "HTTP/1.0" | "HTTP/1.1" => {}
        _ if version.starts_with("HTTP/") => return Err(RequestError::Version),
        _ => return Err(RequestError::Malformed),
    }
    let method = match method {
        "GET" => Method::Get,
        "POST" => Method::Post,
        _ => return Err(RequestError::Method),
    };
    // What is wrong with the line is told before the rest has come.
    let ends = |end: &&[u8]| head.windows(end.len()).any(|w| w == *end);
    if ![&b"\r\n\r\n"[..], b"\n\n"].iter().any(ends) {
        return if head.len() < MAX_HEAD { Ok(None) } else { Err(RequestError::TooLong) };
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    Ok(Some(Request { method, path: path.to_owned(), query: query.to_owned() }))
}

/// The head of an answer of `length` bytes; without a length it lasts until the connection ends.
pub fn head(status: &str, content_type: &str, length: Option<usize>) -> String {
    let length = length.map(|n| format!("Content-Length: {n}\r\n")).unwrap_or_default();
    format!("HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n{length}Connection: close\r\n\r\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(path: &str, query: &str) -> Result<Option<Request>, RequestError> {
        Ok(Some(Request { method: Method::Get, path: path.into(), query: query.into() }))
    }

    #[test]
    fn requests_of_scrapers_are_read() {
        assert_eq!(parse(b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n"), get("/metrics", ""));
        assert_eq!(parse(b"GET /logs?follow=1 HTTP/1.0\n\n"), get("/logs", "follow=1"));
        let post = parse(b"POST /resize?vcpus=2 HTTP/1.1\n\n").unwrap().unwrap();
        assert_eq!((post.method, &*post.path, &*post.query), (Method::Post, "/resize", "vcpus=2"));
        for part in ["", "GE", "GET /metrics HTTP/1.1\r\n", "GET /metrics HTTP/1.1\r\nHost: x\r\n"] {
            assert_eq!(parse(part.as_bytes()), Ok(None), "{part:?}");
        }
    }

    #[test]
    fn garbage_is_told_for_what_it_is() {
        for (text, error) in [
            ("\u{16}\u{3}\u{1}", RequestError::Malformed),
            ("GET\n\n", RequestError::Malformed),
            ("GET  /metrics HTTP/1.1\n\n", RequestError::Malformed),
            ("GET metrics HTTP/1.1\n\n", RequestError::Malformed),
            ("get /metrics HTTP/1.1\n\n", RequestError::Malformed),
            ("GET /métrics HTTP/1.1\n\n", RequestError::Malformed),
            ("GET /metrics SPDY/3\n\n", RequestError::Malformed),
            ("GET /metrics HTTP/2.0\n\n", RequestError::Version),
            ("DELETE /metrics HTTP/1.1\n\n", RequestError::Method),
        ] {
            assert_eq!(parse(text.as_bytes()), Err(error), "{text:?}");
        }
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(MAX_TARGET));
        assert_eq!(parse(long.as_bytes()), Err(RequestError::TooLong));
        // Never a panic, and always an answer in the end, whatever the bytes.
        let mut state = 1_u32;
        for length in 0..2000 {
            let noise: Vec<u8> = (0..length % 97)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    b"GET /HTP1.\r\n\0\xff"[state as usize >> 16 & 15 & 13]
                })
                .collect();
            let _ = parse(&noise);
        }
    }

    #[tokio::test]
    async fn a_head_without_end_is_refused_at_its_limit() {
        let endless = [b"GET / HTTP/1.1\r\n".to_vec(), b"x: y\r\n".repeat(4 * MAX_HEAD / 6)].concat();
        let mut from = &endless[..];
        assert_eq!(read(&mut from).await, Err(RequestError::TooLong));
        assert_eq!(endless.len() - from.len(), MAX_HEAD);
        assert_eq!(read(&mut &vec![b'x'; MAX_HEAD + 1][..]).await, Err(RequestError::TooLong));
        assert_eq!(read(&mut &b"GET / HTTP/1.1\r\n"[..]).await, Err(RequestError::Gone));
        let mut whole = &b"GET /console HTTP/1.1\r\n\r\n"[..];
        assert_eq!(read(&mut whole).await, get("/console", "").map(Option::unwrap));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_is_not_waited_for() {
        let (_silent, mut ours) = tokio::io::duplex(64);
        assert_eq!(read(&mut ours).await, Err(RequestError::Late));
    }

    #[test]
    fn an_answer_says_its_length_or_that_it_has_none() {
        let text = head("200 OK", TEXT_TYPE, Some(3));
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.contains("\r\nContent-Length: 3\r\n"));
        assert!(text.ends_with("\r\nConnection: close\r\n\r\n"));
        assert!(!head("200 OK", TEXT_TYPE, None).contains("Length"));
    }
}
