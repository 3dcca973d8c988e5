//! Compiles the system call filters of `seccomp/*.json` to BPF, once to end the process on a breach and once to log it.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use seccompiler::{BpfMap, TargetArch, compile_from_json};

fn main() {
    let out = Path::new(&env::var_os("OUT_DIR").expect("cargo sets it")).join("filters.rs");
    let mut source = String::new();
    for role in ["vmm", "vcpu", "fs"] {
        let path = format!("seccomp/{role}.json");
        println!("cargo::rerun-if-changed={path}");
        let rules = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        for (mode, action) in [("ENFORCE", "trap"), ("LOG", "log")] {
            let filters = compile(&rules, action).unwrap_or_else(|e| panic!("{path}: {e}"));
            let name = format!("{}_{mode}", role.to_ascii_uppercase());
            writeln!(source, "static {name}: [sock_filter; {}] = [", filters["thread"].len())
                .expect("a string");
            for op in &filters["thread"] {
                let (code, jt, jf, k) = (op.code, op.jt, op.jf, op.k);
                writeln!(source, "    sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},")
                    .expect("a string");
            }
            source.push_str("];\n");
        }
    }
    fs::write(out, source).expect("OUT_DIR is ours to write");
}

/// `rules` is a list of what is allowed: calls, each with the reason it is there.
fn compile(rules: &str, otherwise: &str) -> Result<BpfMap, String> {
    let rules: serde_json::Value = serde_json::from_str(rules).map_err(|e| e.to_string())?;
    for rule in rules.as_array().ok_or("a list of rules is wanted")? {
        let reason = rule.get("comment").and_then(|c| c.as_str()).unwrap_or_default();
        if reason.is_empty() {
            return Err(format!("{rule} does not say whom it is for"));
        }
    }
    let filter = HashMap::from([(
        "thread",
        serde_json::json!({ "mismatch_action": otherwise, "match_action": "allow", "filter": rules }),
    )]);
    let json = serde_json::to_vec(&filter).expect("it came from JSON");
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it");
    let arch = TargetArch::try_from(arch.as_str()).map_err(|e| e.to_string())?;
    compile_from_json(&json[..], arch).map_err(|e| e.to_string())
}
