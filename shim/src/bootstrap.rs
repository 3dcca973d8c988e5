//! What containerd says on `start`'s standard input, and what it wants to read on its standard output.
//!
//! | containerd | standard input | answer |
//! | --- | --- | --- |
//! | 1.6 | runtime options as `Any`, or nothing | the address, nothing else |
//! | 1.7 to 2.2 | the same; `MAX_SHIM_VERSION` in the environment | JSON |
//! | 2.3 and later | protobuf `BootstrapParams`, always | protobuf `BootstrapResult` |
//!
//! The bytes of an `Any` can parse as `BootstrapParams`, since both begin with two strings. What decides is whether
//! the identity in them is the one on the command line.
//!
//! 1.7 to 2.2 all announce version 2, and version 2 is what they are answered; Task v3 is served on the same socket
//! for 2.3 and later, which is answered 3.

use std::path::PathBuf;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, Message};

use crate::args::Args;

/// How a daemon wants the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// The bare address.
    Plain,
    /// `{"version":…,"address":…,"protocol":"ttrpc"}`.
    Json {
        /// Newest Task version the daemon announced, at most 3.
        version: i32,
    },
    /// `containerd.runtime.bootstrap.v1.BootstrapResult`.
    Protobuf,
}

/// What a daemon asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Bootstrap {
    /// How to answer.
    pub dialect: Dialect,
    /// Runtime options of the container.
    pub options: RuntimeOptions,
    /// Where the socket goes, if not to the default directory.
    pub socket_dir: Option<PathBuf>,
    /// Where events go, if standard input says it.
    pub ttrpc_address: Option<String>,
    /// The daemon logs at debug level.
    pub debug: bool,
}

/// `runtimeoptions.v1.Options`, which CRI and `ctr --runtime-config-path` send to a runtime that is not runc.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeOptions {
    /// Path of a configuration file.
    pub config_path: Option<PathBuf>,
    /// The configuration itself, TOML.
    pub config_body: Option<String>,
}

/// Reads `start`'s standard input. Bytes that mean nothing to us are taken for a daemon that said nothing.
pub fn read(stdin: &[u8], args: &Args, max_shim_version: Option<&str>) -> Bootstrap {
    if let Ok(params) = BootstrapParams::parse_from_bytes(stdin)
        && params.instance_id == args.id
        && params.namespace == args.namespace
    {
        let options = params.extensions.iter().find_map(|e| e.value.as_ref().and_then(runtime_options));
        return Bootstrap {
            dialect: Dialect::Protobuf,
            options: options.unwrap_or_default(),
            socket_dir: params.socket_dir.filter(|d| !d.is_empty()).map(PathBuf::from),
            ttrpc_address: Some(params.containerd_ttrpc_address).filter(|a| !a.is_empty()),
            // Negative levels are more verbose than info.
            debug: params.log_level.value() < 0,
        };
    }
    let dialect = match max_shim_version.and_then(|v| v.parse::<i32>().ok()) {
        None => Dialect::Plain,
        Some(max) => Dialect::Json { version: max.clamp(2, 3) },
    };
    let options = Any::parse_from_bytes(stdin).ok().and_then(|any| runtime_options(&any)).unwrap_or_default();
    Bootstrap { dialect, options, socket_dir: None, ttrpc_address: None, debug: false }
}

/// The answer that says where the shim listens.
pub fn answer(dialect: Dialect, address: &str) -> Vec<u8> {
    match dialect {
        Dialect::Plain => address.as_bytes().to_vec(),
        Dialect::Json { version } => {
            serde_json::json!({ "version": version, "address": address, "protocol": "ttrpc" })
                .to_string()
                .into_bytes()
        }
        Dialect::Protobuf => {
            let mut result = BootstrapResult::new();
            result.version = 3;
            result.address = address.to_owned();
            result.protocol = "ttrpc".to_owned();
            result.write_to_bytes().expect("a message of plain fields is always complete")
        }
    }
}

/// Reads `runtimeoptions.v1.Options{type_url = 1, config_path = 2, config_body = 3}`; `None` for options of another
/// kind (runc's, for one), which mean nothing to us.
pub fn runtime_options(any: &Any) -> Option<RuntimeOptions> {
    if !any.type_url.ends_with("runtimeoptions.v1.Options") {
        return None;
    }
    let mut options = RuntimeOptions::default();
    let mut input = CodedInputStream::from_bytes(&any.value);
    while let Some(tag) = input.read_raw_tag_or_eof().ok()? {
        match tag {
            TAG_CONFIG_PATH => {
                let path = input.read_string().ok()?;
                options.config_path = Some(path).filter(|p| !p.is_empty()).map(PathBuf::from);
            }
            TAG_CONFIG_BODY => {
                let body = String::from_utf8(input.read_bytes().ok()?).ok()?;
                options.config_body = Some(body).filter(|b| !b.trim().is_empty());
            }
            // Unknown fields of wire type 2, `type_url` among them; the others do not occur in this message.
            tag if tag & 7 == 2 => {
                input.read_bytes().ok()?;
            }
            _ => return None,
        }
    }
    Some(options)
}

const TAG_CONFIG_PATH: u32 = 2 << 3 | 2;
const TAG_CONFIG_BODY: u32 = 3 << 3 | 2;

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> Args {
        Args::parse("-namespace default -id web start".split(' ').map(str::to_owned)).unwrap()
    }

    /// `Any{type_url: "runtimeoptions.v1.Options", value: Options{config_path: "/etc/x.toml"}}` as 1.7 writes it.
    const ANY_1_7: &[u8] = b"\x0a\x19runtimeoptions.v1.Options\x12\x0d\x12\x0b/etc/x.toml";

    /// `BootstrapParams` as 2.3 writes it: instance_id, namespace, log_level (debug, -4), containerd_version,
    /// ttrpc and gRPC addresses, binary, one extension that holds the `Any` above, socket_dir.
    fn params_2_3() -> Vec<u8> {
        let mut bytes = b"\x0a\x03web\x12\x07default".to_vec();
        bytes.extend(b"\x18\xfc\xff\xff\xff\xff\xff\xff\xff\xff\x01");
        bytes.extend(b"\x22\x06v2.3.4");
        bytes.extend(b"\x2a\x10/run/c.sock.ttrp\x32\x0b/run/c.sock\x3a\x05/ctrd");
        bytes.push(0x42);
        bytes.push(u8::try_from(ANY_1_7.len() + 2).unwrap());
        bytes.push(0x0a);
        bytes.push(u8::try_from(ANY_1_7.len()).unwrap());
        bytes.extend(ANY_1_7);
        bytes.extend(b"\x4a\x06/run/s");
        bytes
    }

    #[test]
    fn containerd_1_6_reads_a_plain_address() {
        let asked = read(b"", &args(), None);
        assert_eq!(asked.dialect, Dialect::Plain);
        assert_eq!(answer(asked.dialect, "unix:///run/containerd/s/ab"), b"unix:///run/containerd/s/ab");
    }

    #[test]
    fn containerd_1_7_to_2_2_read_json() {
        let asked = read(ANY_1_7, &args(), Some("2"));
        assert_eq!(asked.dialect, Dialect::Json { version: 2 });
        assert_eq!(asked.options.config_path.as_deref(), Some("/etc/x.toml".as_ref()));
        let answer: serde_json::Value = serde_json::from_slice(&answer(asked.dialect, "unix:///s")).unwrap();
        assert_eq!(answer, serde_json::json!({"version": 2, "address": "unix:///s", "protocol": "ttrpc"}));
    }

    #[test]
    fn an_any_that_parses_as_params_is_still_an_any() {
        // Both are two length-delimited fields, and this value happens to be text.
        let any = b"\x0a\x04a.b.\x12\x04text";
        let params = BootstrapParams::parse_from_bytes(any).unwrap();
        assert_eq!((params.instance_id.as_str(), params.namespace.as_str()), ("a.b.", "text"));
        assert_eq!(read(any, &args(), Some("2")).dialect, Dialect::Json { version: 2 });
    }

    #[test]
    fn containerd_2_3_speaks_protobuf_both_ways() {
        let asked = read(&params_2_3(), &args(), Some("2"));
        assert_eq!(asked.dialect, Dialect::Protobuf);
        assert_eq!(asked.socket_dir.as_deref(), Some("/run/s".as_ref()));
        assert_eq!(asked.ttrpc_address.as_deref(), Some("/run/c.sock.ttrp"));
        assert_eq!(asked.options.config_path.as_deref(), Some("/etc/x.toml".as_ref()));
        assert!(asked.debug);
        assert_eq!(answer(Dialect::Protobuf, "unix:///s"), b"\x08\x03\x12\x09unix:///s\x1a\x05ttrpc");
    }

    #[test]
    fn params_of_another_sandbox_are_not_ours() {
        let mut other = args();
        other.id = "db".into();
        assert_eq!(read(&params_2_3(), &other, None).dialect, Dialect::Plain);
    }

    #[test]
    fn a_configuration_body_arrives() {
        let mut any = Any::new();
        any.type_url = "runtimeoptions.v1.Options".into();
        any.value = b"\x0a\x01t\x1a\x09vcpus = 2".to_vec();
        assert_eq!(runtime_options(&any).unwrap().config_body.as_deref(), Some("vcpus = 2"));
        any.type_url = "containerd.runc.v1.Options".into();
        assert_eq!(runtime_options(&any), None);
    }

    #[test]
    fn noise_on_standard_input_is_survived() {
        for noise in [&b"\xff\xff\xff\xff"[..], b"{}", &[0; 64], &[0x0a, 0xff]] {
            assert_eq!(read(noise, &args(), None).dialect, Dialect::Plain);
        }
    }
}
