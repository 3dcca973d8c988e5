//! Generates the Sandbox service from `proto/sandbox.proto` into `OUT_DIR`.

use std::path::{Path, PathBuf};
use std::{env, fs};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/sandbox.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()
        .expect("proto/sandbox.proto is valid");
    for name in ["sandbox.rs", "sandbox_ttrpc.rs"] {
        strip_inner_attributes(&out.join(name));
    }
    println!("cargo:rerun-if-changed=proto/sandbox.proto");
}

/// The generated files begin with `#![…]` and `//!` lines, which `include!` does not accept.
fn strip_inner_attributes(path: &Path) {
    let text = fs::read_to_string(path).expect("generated as UTF-8");
    let kept: Vec<&str> =
        text.lines().filter(|line| !line.starts_with("#!") && !line.starts_with("//!")).collect();
    fs::write(path, kept.join("\n")).expect("OUT_DIR is writable");
}
