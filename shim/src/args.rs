//! The shim's command line, as containerd writes it: Go's `flag` style (`-id X`, `-id=X`, `--id X`), then one word.
//!
//! Not `clap`: it has no single-dash long options, and this binary should stay small.

use std::path::PathBuf;

/// What the process was started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Make a sandbox's serving process (or find the one of its pod) and print its address.
    Start,
    /// Clean up after a dead sandbox.
    Delete,
    /// Serve one sandbox; started by `Start` only.
    Serve,
    /// Print version.
    Version,
    /// Print a protobuf `RuntimeInfo`.
    Info,
}

/// The command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Args {
    /// What to do.
    pub action: Action,
    /// containerd namespace.
    pub namespace: String,
    /// Container id; for [`Action::Serve`] the sandbox's.
    pub id: String,
    /// containerd's gRPC address. Part of the socket's name.
    pub address: String,
    /// The containerd binary; unused, events go over ttrpc.
    pub publish_binary: String,
    /// The bundle, for [`Action::Delete`]; otherwise it is the working directory.
    pub bundle: Option<PathBuf>,
    /// Log more.
    pub debug: bool,
    /// Configuration file in place of the default one; from `Start` to `Serve` only.
    pub config: Option<PathBuf>,
    /// `CLOCK_MONOTONIC` at the begin of `Start`, in microseconds; from `Start` to `Serve` only.
    pub started_us: u64,
}

/// A command line that cannot be right.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgsError {
    /// Not a flag of ours.
    #[error("flag provided but not defined: -{0}")]
    Unknown(String),
    /// A flag at the end of the line.
    #[error("flag needs an argument: -{0}")]
    NoValue(String),
    /// A word where none belongs, or an action we do not have.
    #[error("unknown command {0:?}; there are start and delete")]
    UnknownAction(String),
    /// Neither an action nor `-v` nor `-info`.
    #[error("no command given; there are start and delete")]
    NoAction,
    /// The action needs it.
    #[error("-{0} must be given")]
    Missing(&'static str),
    /// Ids and namespaces become file names.
    #[error(
        "-{flag} {value:?} is not 1 to {MAX_NAME} letters, digits, '.', '_' and '-' that begin with a letter or digit"
    )]
    BadName {
        /// Which flag.
        flag: &'static str,
        /// Its value.
        value: String,
    },
    /// Not a number.
    #[error("-{flag} {value:?} is not a number")]
    BadNumber {
        /// Which flag.
        flag: &'static str,
        /// Its value.
        value: String,
    },
}

/// Longest id or namespace: it has to be a file name with a suffix.
pub const MAX_NAME: usize = 200;

impl Args {
    /// Reads a command line without its first word.
    ///
    /// # Errors
    /// See [`ArgsError`].
    pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Self, ArgsError> {
        let mut args = Args {
            action: Action::Serve,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            publish_binary: String::new(),
            bundle: None,
            debug: false,
            config: None,
            started_us: 0,
        };
        let mut action = None;
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                let next = match word.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    "serve" => Action::Serve,
                    _ => return Err(ArgsError::UnknownAction(word)),
                };
                if action.replace(next).is_some() {
                    return Err(ArgsError::UnknownAction(word));
                }
                continue;
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (flag.to_owned(), None),
            };
            match name.as_str() {
                "debug" => args.debug = inline.as_deref() != Some("false"),
                "v" => action = Some(Action::Version),
                "info" => action = Some(Action::Info),
                _ => {
                    let mut value = || {
                        inline
                            .clone()
                            .or_else(|| words.next())
                            .ok_or_else(|| ArgsError::NoValue(name.clone()))
                    };
                    match name.as_str() {
                        "namespace" => args.namespace = value()?,
                        "id" => args.id = value()?,
                        "address" => args.address = value()?,
                        "publish-binary" => args.publish_binary = value()?,
                        "bundle" => args.bundle = Some(value()?.into()),
                        "config" => args.config = Some(value()?.into()),
                        "started-us" => {
                            let value = value()?;
                            args.started_us = value
                                .parse()
                                .map_err(|_| ArgsError::BadNumber { flag: "started-us", value })?;
                        }
                        // Go's shim library knows these two; containerd does not pass them.
                        "socket" | "debug-socket" => {
                            value()?;
                        }
                        _ => return Err(ArgsError::Unknown(name)),
                    }
                }
            }
        }
        args.action = action.ok_or(ArgsError::NoAction)?;
        args.check()?;
        Ok(args)
    }

    fn check(&self) -> Result<(), ArgsError> {
        if matches!(self.action, Action::Version | Action::Info) {
            return Ok(());
        }
        for (flag, value) in [("namespace", &self.namespace), ("id", &self.id)] {
            if value.is_empty() {
                return Err(ArgsError::Missing(flag));
            }
            if !is_name(value) {
                return Err(ArgsError::BadName { flag, value: value.clone() });
            }
        }
        Ok(())
    }
}

/// Whether `name` is fit to be a file name of ours: containerd's identifiers, and nothing that could leave a
/// directory.
pub fn is_name(name: &str) -> bool {
    name.len() <= MAX_NAME
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, ArgsError> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn start_as_containerd_writes_it() {
        let args = parse(
            "-namespace default -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd \
             -id web-1 -debug start",
        )
        .unwrap();
        assert_eq!(args.action, Action::Start);
        assert_eq!((args.namespace.as_str(), args.id.as_str()), ("default", "web-1"));
        assert_eq!(args.address, "/run/containerd/containerd.sock");
        assert!(args.debug);
    }

    #[test]
    fn delete_as_containerd_writes_it() {
        let args = parse(
            "-namespace k8s.io -address a -publish-binary b -id x -bundle /run/containerd/io.containerd.runtime.v2.task/k8s.io/x delete",
        )
        .unwrap();
        assert_eq!(args.action, Action::Delete);
        assert!(args.bundle.unwrap().ends_with("k8s.io/x"));
    }

    #[test]
    fn both_dashes_and_both_ways_to_give_a_value() {
        let args = parse("--namespace=default -id=x --debug=false start").unwrap();
        assert_eq!((args.namespace.as_str(), args.id.as_str(), args.debug), ("default", "x", false));
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
    }

    #[test]
    fn wrong_lines_are_named() {
        assert_eq!(parse("-id x start").unwrap_err(), ArgsError::Missing("namespace"));
        assert_eq!(parse("-namespace default start").unwrap_err(), ArgsError::Missing("id"));
        assert_eq!(parse("-namespace a -id x").unwrap_err(), ArgsError::NoAction);
        assert_eq!(parse("-frob x start").unwrap_err(), ArgsError::Unknown("frob".into()));
        assert_eq!(parse("-namespace a -id").unwrap_err(), ArgsError::NoValue("id".into()));
        assert_eq!(parse("-namespace a -id x stop").unwrap_err(), ArgsError::UnknownAction("stop".into()));
    }

    #[test]
    fn an_id_cannot_leave_its_directory() {
        for id in ["..", "a/b", ".hidden", "-x", "a b"] {
            assert!(!is_name(id), "{id:?}");
        }
        assert!(!is_name(&"x".repeat(MAX_NAME + 1)));
        assert!(is_name("cri-containerd_0.1"));
    }
}
