//! Credentials of a registry, and what it says it wants (RFC 9110, 11.6.1; the distribution project's token specification).

use std::time::Duration;

use tokio::time::Instant;

/// What a registry asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Challenge {
    /// A name and a password.
    Basic,
    /// A token from `realm`.
    Bearer {
        /// URL of the token service.
        realm: String,
        /// For the token service.
        service: Option<String>,
        /// For the token service.
        scope: Option<String>,
    },
}

impl Challenge {
    /// Reads a `WWW-Authenticate` header.
    pub fn parse(header: &str) -> Option<Self> {
        let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Challenge::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let (mut realm, mut service, mut scope) = (None, None, None);
        for (name, value) in parameters(rest) {
            match name.to_ascii_lowercase().as_str() {
                "realm" => realm = Some(value),
                "service" => service = Some(value),
                "scope" => scope = Some(value),
                _ => {}
            }
        }
        Some(Challenge::Bearer { realm: realm?, service, scope })
    }
}

/// `name="value"` pairs, separated by commas that may also be in values.
fn parameters(mut rest: &str) -> Vec<(&str, String)> {
    let mut found = Vec::new();
    while let Some((name, after)) = rest.split_once('=') {
        let name = name.trim_matches([' ', ',', '\t']);
        let (value, behind) = if let Some(quoted) = after.trim_start().strip_prefix('"') {
            quoted.split_once('"').unwrap_or((quoted, ""))
        } else {
            after.split_once(',').unwrap_or((after, ""))
        };
        found.push((name, value.trim().to_owned()));
        rest = behind;
    }
    found
}

/// A token and its end.
#[derive(Debug, Clone)]
pub struct Token {
    /// To be sent as it is.
    pub bearer: String,
    ends: Instant,
}

impl Token {
    /// Of a token service's answer: JSON with `token` or `access_token`, and `expires_in` seconds.
    pub fn parse(answer: &[u8]) -> Option<Self> {
        let answer: serde_json::Value = serde_json::from_slice(answer).ok()?;
        let bearer = [&answer["token"], &answer["access_token"]].into_iter().find_map(|v| v.as_str())?;
        // 60 s is what the specification has for an answer without a number.
        let seconds = answer["expires_in"].as_u64().unwrap_or(60).clamp(10, 86_400);
        Some(Self { bearer: bearer.to_owned(), ends: Instant::now() + Duration::from_secs(seconds) })
    }

    /// Whether it is worth sending.
    pub fn is_fresh(&self) -> bool {
        Instant::now() + Duration::from_secs(5) < self.ends
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_as_registries_write_them() {
        let docker = "Bearer realm=\"https://auth.docker.io/token\",service=\"registry.docker.io\",\
                      scope=\"repository:a/b:pull,push\"";
        let Some(Challenge::Bearer { realm, service, scope }) = Challenge::parse(docker) else {
            panic!("bearer")
        };
        assert_eq!(realm, "https://auth.docker.io/token");
        assert_eq!(service.as_deref(), Some("registry.docker.io"));
        assert_eq!(scope.as_deref(), Some("repository:a/b:pull,push"));
        assert_eq!(Challenge::parse("basic realm=\"x\""), Some(Challenge::Basic));
        assert_eq!(Challenge::parse("Bearer service=x"), None);
        assert_eq!(Challenge::parse("Negotiate"), None);
        assert_eq!(Challenge::parse("Bearer realm=\"unended"), Challenge::parse("bearer realm=unended"));
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_end() {
        let token = Token::parse(br#"{"access_token":"t","expires_in":30}"#).expect("a token");
        assert!(token.bearer == "t" && token.is_fresh());
        tokio::time::advance(Duration::from_secs(26)).await;
        assert!(!token.is_fresh());
        assert!(Token::parse(b"{}").is_none() && Token::parse(b"x").is_none());
    }
}
