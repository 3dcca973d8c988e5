//! Generates the messages of `proto/*.proto` into `OUT_DIR`.

use std::path::PathBuf;
use std::{env, fs};

use ttrpc_codegen::{Codegen, ProtobufCustomize};

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for name in ["cri", "streaming"] {
        let proto = format!("proto/{name}.proto");
        Codegen::new()
            .out_dir(&out)
            .inputs([&proto])
            .include("proto")
            .rust_protobuf()
            .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
            .run()
            .unwrap_or_else(|e| panic!("{proto}: {e}"));
        // The generated file begins with `#![…]` and `//!` lines, which `include!` does not accept.
        let path = out.join(format!("{name}.rs"));
        let text = fs::read_to_string(&path).expect("generated as UTF-8");
        let kept: Vec<&str> =
            text.lines().filter(|line| !line.starts_with("#!") && !line.starts_with("//!")).collect();
        fs::write(path, kept.join("\n")).expect("OUT_DIR is writable");
        println!("cargo:rerun-if-changed={proto}");
    }
}
