//! The system call filters that threads have in the VMM.

/// Filters this thread. What is not on the list ends the test, so each test also proves the list complete.
pub fn confine(role: &str) {
    let list = format!("{}/../seccomp/{role}.json", env!("CARGO_MANIFEST_DIR"));
    let rules: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(list).unwrap()).unwrap();
    let filter = serde_json::json!({
        "thread": { "mismatch_action": "kill_process", "match_action": "allow", "filter": rules }
    });
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filters = seccompiler::compile_from_json(filter.to_string().as_bytes(), arch).unwrap();
    seccompiler::apply_filter(&filters["thread"]).unwrap();
}
