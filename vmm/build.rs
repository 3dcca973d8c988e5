//! Compiles the system call filters of `seccomp/*.json` to BPF, once to end the process on a breach and once to log it.
//!
//! Each rule is compiled by seccompiler; the search for the rule is ours. When a filter is installed, the host's kernel
//! runs it once for every system call there is, to know which ones it may always allow: down seccompiler's list of
//! comparisons that took 0.7 to 1.4 ms a thread in exact time, down a tree a twentieth of it.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use seccompiler::{BpfProgram, TargetArch, compile_from_json, sock_filter};
use serde_json::{Value, json};

fn main() {
    let out = Path::new(&env::var_os("OUT_DIR").expect("cargo sets it")).join("filters.rs");
    let mut source = String::new();
    // A thread inherits the filter of who makes it: what the file server's threads need, their maker needs.
    for (role, lists) in [
        ("vmm", &["vmm"][..]),
        ("vcpu", &["vcpu"]),
        ("fs", &["fs"]),
        ("image", &["image"]),
        ("plug", &["plug", "fs"]),
    ] {
        let mut rules = Vec::new();
        for list in lists {
            let path = format!("seccomp/{list}.json");
            println!("cargo::rerun-if-changed={path}");
            let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
            rules.extend(parse(&text).unwrap_or_else(|e| panic!("{path}: {e}")));
        }
        let path = format!("the filter of {role}");
        for (mode, otherwise) in [("ENFORCE", "trap"), ("LOG", "log")] {
            let filter = compile(&rules, otherwise).unwrap_or_else(|e| panic!("{path}: {e}"));
            write_static(&mut source, &format!("{}_{mode}", role.to_ascii_uppercase()), &filter);
        }
    }
    fs::write(out, source).expect("OUT_DIR is ours to write");
}

fn write_static(source: &mut String, name: &str, filter: &[sock_filter]) {
    writeln!(source, "static {name}: [sock_filter; {}] = [", filter.len()).expect("a string");
    for sock_filter { code, jt, jf, k } in filter {
        writeln!(source, "    sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},")
            .expect("a string");
    }
    source.push_str("];\n");
}

/// A list of what is allowed: calls, some with conditions, each with the reason it is there.
fn parse(text: &str) -> Result<Vec<Value>, String> {
    let rules: Vec<Value> = serde_json::from_str(text).map_err(|e| e.to_string())?;
    for rule in &rules {
        if rule["comment"].as_str().is_none_or(str::is_empty) {
            return Err(format!("{rule} does not say whom it is for"));
        }
    }
    Ok(rules)
}

// Instructions (Linux, Documentation/networking/filter.rst) and places in `seccomp_data` (seccomp(2)).
const LOAD_WORD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;
const CALL_NUMBER: u32 = 0;
const JUMP: u16 = 0x05;
/// `SECCOMP_RET_ALLOW`.
const ALLOW: u32 = 0x7fff_0000;
/// `SECCOMP_RET_ERRNO`.
const ERRNO: u32 = 0x0005_0000;
/// What seccompiler's filters begin with: is it our architecture, if not end the process.
const PROLOGUE: usize = 3;

/// What is done about a call: allowed, not carried out with an error number, or decided by its arguments.
enum Verdict {
    Allow,
    Fail(u32),
    Ask(BpfProgram),
}

fn compile(rules: &[Value], otherwise: &str) -> Result<BpfProgram, String> {
    let mut by_call: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    for rule in rules {
        by_call.entry(rule["syscall"].as_str().ok_or("a rule without syscall")?).or_default().push(rule);
    }
    let mut verdicts = BTreeMap::new();
    let mut filter = BpfProgram::new();
    for (call, rules) in by_call {
        let alone = compile_alone(&rules, otherwise)?;
        filter = alone[..PROLOGUE].to_vec();
        let number = alone[PROLOGUE..].iter().find(|op| op.code == JUMP_IF_EQUAL).ok_or("no comparison")?.k;
        let errno = rules[0].get("errno").and_then(Value::as_u64);
        match rules.iter().filter(|rule| rule.get("args").is_none()).count() {
            1 if rules.len() == 1 && errno.is_some() => {
                let errno =
                    errno.and_then(|errno| u16::try_from(errno).ok()).ok_or("errno is a small number")?;
                verdicts.insert(number, Verdict::Fail(errno.into()))
            }
            0 => verdicts.insert(number, Verdict::Ask(alone)),
            1 if rules.len() == 1 => verdicts.insert(number, Verdict::Allow),
            _ => return Err(format!("{call} is there more than once")),
        };
    }
    let denied = compile_alone(&[&json!({ "syscall": "exit" })], otherwise)?;
    let deny = denied.last().expect("a filter ends with what is otherwise");
    filter.push(sock_filter { code: LOAD_WORD, jt: 0, jf: 0, k: CALL_NUMBER });
    filter.extend(search(verdicts.into_iter().collect(), deny)?);
    Ok(filter)
}

/// seccompiler's own filter for the rules of one call.
fn compile_alone(rules: &[&Value], otherwise: &str) -> Result<BpfProgram, String> {
    // What is ours alone, seccompiler does not know.
    let mut rules: Vec<Value> = rules.iter().map(|rule| (*rule).clone()).collect();
    for rule in rules.iter_mut().filter_map(Value::as_object_mut) {
        rule.remove("errno");
    }
    let filter = json!({ "mismatch_action": otherwise, "match_action": "allow", "filter": rules });
    let json = serde_json::to_vec(&HashMap::from([("thread", filter)])).expect("it came from JSON");
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it");
    let arch = TargetArch::try_from(arch.as_str()).map_err(|e| e.to_string())?;
    let mut filters = compile_from_json(&json[..], arch).map_err(|e| e.to_string())?;
    Ok(filters.remove("thread").expect("the one given"))
}

/// A binary search for the call. The accumulator holds its number.
///
/// ```text
/// comparisons | allow | deny | error numbers, jumps to what follows | seccompiler's filters for calls with conditions
/// ```
///
/// A comparison reaches 255 instructions far, a jump any distance.
fn search(verdicts: Vec<(u32, Verdict)>, deny: &sock_filter) -> Result<BpfProgram, String> {
    let comparisons = 2 * verdicts.len() - 1;
    let (allow, denied) = (comparisons, comparisons + 1);
    let mut tail = vec![sock_filter { code: RETURN, jt: 0, jf: 0, k: ALLOW }, deny.clone()];
    let conditional = verdicts.iter().filter(|(_, verdict)| !matches!(verdict, Verdict::Allow)).count();
    let mut filters = BpfProgram::new();
    let mut leaves = Vec::with_capacity(verdicts.len());
    for (number, verdict) in verdicts {
        let place = comparisons + tail.len();
        match verdict {
            Verdict::Allow => leaves.push((number, allow)),
            Verdict::Fail(errno) => {
                leaves.push((number, place));
                tail.push(sock_filter { code: RETURN, jt: 0, jf: 0, k: ERRNO | errno });
            }
            Verdict::Ask(filter) => {
                leaves.push((number, place));
                let behind = 2 + conditional - tail.len() - 1 + filters.len();
                let k = u32::try_from(behind).map_err(|_| "the filter is too long".to_owned())?;
                tail.push(sock_filter { code: JUMP, jt: 0, jf: 0, k });
                filters.extend(filter);
            }
        }
    }
    tail.extend(filters);
    let mut program = BpfProgram::with_capacity(comparisons + tail.len());
    compare(&leaves, denied, &mut program)?;
    debug_assert_eq!(program.len(), comparisons);
    program.extend(tail);
    Ok(program)
}

/// Appends the comparisons among `leaves`: call numbers, ascending, and where each is answered.
fn compare(leaves: &[(u32, usize)], denied: usize, program: &mut BpfProgram) -> Result<(), String> {
    let here = program.len() + 1;
    let jump =
        |to: usize| u8::try_from(to - here).map_err(|_| "the filter is too long for its jumps".to_owned());
    if let [(number, answer)] = leaves {
        program.push(sock_filter { code: JUMP_IF_EQUAL, jt: jump(*answer)?, jf: jump(denied)?, k: *number });
        return Ok(());
    }
    let (below, above) = leaves.split_at(leaves.len() / 2);
    let right = here + 2 * below.len() - 1;
    program.push(sock_filter { code: JUMP_IF_AT_LEAST, jt: jump(right)?, jf: 0, k: above[0].0 });
    compare(below, denied, program)?;
    compare(above, denied, program)
}
