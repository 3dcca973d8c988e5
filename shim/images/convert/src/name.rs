//! Names of images: in a registry, or in an OCI layout folder.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Result, bail, ensure};

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageName {
    /// `oci:FOLDER` or `oci:FOLDER:NAME`.
    Layout {
        /// The folder.
        folder: PathBuf,
        /// Its name in the folder's index; the only image where there is none.
        reference: Option<String>,
    },
    /// `[http://|https://]HOST[:PORT]/REPOSITORY[:TAG|@sha256:DIGEST]`.
    Registry {
        /// `http` or `https`.
        scheme: String,
        /// Host, with its port where there is one.
        host: String,
        /// Repository.
        repository: String,
        /// Tag or digest.
        reference: String,
    },
}

impl FromStr for ImageName {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(rest) = text.strip_prefix("oci:") {
            // A name may have colons; a folder that has any cannot be named.
            let (folder, reference) = match rest.split_once(':') {
                Some((folder, name)) => (folder, Some(name.to_owned())),
                None => (rest, None),
            };
            ensure!(!folder.is_empty(), "{text}: oci: is followed by a folder");
            ensure!(reference.as_deref() != Some(""), "{text}: the name behind the folder is empty");
            return Ok(Self::Layout { folder: folder.into(), reference });
        }
        let (scheme, rest) = text.split_once("://").unwrap_or(("https", text));
        ensure!(matches!(scheme, "http" | "https"), "{text}: {scheme} is neither http nor https");
        let Some((host, path)) = rest.split_once('/') else {
            bail!("{text}: a name is HOST/REPOSITORY:TAG, or oci:FOLDER");
        };
        ensure!(
            host == "localhost" || host.contains(['.', ':']),
            "{text}: {host} is no host: short names are not completed"
        );
        let (repository, reference) = match (path.split_once('@'), path.rsplit_once(':')) {
            (Some((repository, digest)), _) => (repository.split(':').next().unwrap_or_default(), digest),
            (None, Some((repository, tag))) => (repository, tag),
            (None, None) => (path, "latest"),
        };
        ensure!(!repository.is_empty() && !reference.is_empty(), "{text}: a name is HOST/REPOSITORY:TAG");
        Ok(Self::Registry {
            scheme: scheme.into(),
            host: host.into(),
            repository: repository.into(),
            reference: reference.into(),
        })
    }
}

impl std::fmt::Display for ImageName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Layout { folder, reference: None } => write!(f, "oci:{}", folder.display()),
            Self::Layout { folder, reference: Some(name) } => write!(f, "oci:{}:{name}", folder.display()),
            Self::Registry { host, repository, reference, .. } => {
                let mark = if reference.contains(':') { '@' } else { ':' };
                write!(f, "{host}/{repository}{mark}{reference}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        let digest = format!("r.test/a@sha256:{}", "0".repeat(64));
        for (text, shown) in [
            ("http://localhost:5000/a/b:c", "localhost:5000/a/b:c"),
            ("r.test/a", "r.test/a:latest"),
            (&digest, &digest),
            ("oci:/x/y", "oci:/x/y"),
            ("oci:/x/y:name", "oci:/x/y:name"),
            ("oci:/x/y:r.test/a:1", "oci:/x/y:r.test/a:1"),
        ] {
            assert_eq!(text.parse::<ImageName>().expect("a name").to_string(), shown);
        }
        let ImageName::Registry { scheme, .. } = "r.test/a".parse().expect("a name") else {
            panic!("a registry")
        };
        assert_eq!(scheme, "https");
        for wrong in ["busybox", "library/busybox", "ftp://r.test/a", "oci:", "r.test/", "r.test/a:"] {
            assert!(wrong.parse::<ImageName>().is_err(), "{wrong}");
        }
    }
}
