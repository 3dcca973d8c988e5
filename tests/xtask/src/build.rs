//! Builds of this workspace's packages, each with the flags it ships or runs with.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::steps::output;

/// The one target. With it named, flags do not reach build scripts and procedural macros, which cannot be static.
const TARGET: &str = "x86_64-unknown-linux-gnu";

const STATIC: &str = "-Ctarget-feature=+crt-static";

/// Bound to fixed addresses the agent has no relocations to do at each boot (guest-agent/README.md has the figures). A panic ends
/// it, so nobody looks through the index of its unwind tables (75 KiB).
const AGENT: [&str; 3] = [STATIC, "-Crelocation-model=static", "-Clink-arg=-Wl,--no-eh-frame-hdr"];

/// Packages whose tests run in the lab.
const LAB_PACKAGES: [&str; 2] = ["tests/e2e", "tests/cri"];

/// Of their tests those that look at the checkout: they run on this machine.
const HOST_ONLY_TESTS: [&str; 1] = ["import_edges"];

/// Every build of tests is one of the whole workspace: with another choice of packages or features, cargo would build
/// what they depend on once more.
pub const WHOLE: [&str; 3] = ["--workspace", "--features", "e2e/lab,cri/lab"];

/// The checkout's root.
pub fn workspace() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).expect("this package lies two folders below the workspace").to_path_buf()
}

/// Cargo's target folder, as the calling cargo chose it.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), |path| workspace().join(path))
}

/// The lab's PID 1, static.
pub fn lab_init() -> Result<PathBuf> {
    static_program("lab-init")
}

/// What the lab's tests run inside containers, static.
pub fn exerciser() -> Result<PathBuf> {
    static_program("exerciser")
}

fn static_program(name: &str) -> Result<PathBuf> {
    // A folder of its own: other flags in the shared one would rebuild everything at each turn.
    let folder = target().join("static");
    let mut command = cargo("build");
    command
        .args(["--package", name, "--bin", name, "--target", TARGET, "--target-dir"])
        .arg(&folder)
        .env("RUSTFLAGS", STATIC);
    run(&mut command)?;
    Ok(folder.join(TARGET).join("debug").join(name))
}

/// The guest's PID 1 as it ships, static.
pub fn agent() -> Result<PathBuf> {
    let folder = target().join("static");
    let mut command = shipped(&AGENT)?;
    command
        .args(["--package", "guest-agent", "--bin", "ctvm-agent", "--profile", "agent", "--target", TARGET])
        .arg("--target-dir")
        .arg(&folder)
        // libcontainer's C library, as an archive where libseccomp-dev puts it.
        .env("LIBSECCOMP_LINK_TYPE", "static")
        .env("LIBSECCOMP_LIB_PATH", "/usr/lib/x86_64-linux-gnu");
    run(&mut command)?;
    Ok(folder.join(TARGET).join("agent/ctvm-agent"))
}

/// The host's programs as they ship: monitor, shim, operator's command line.
pub fn host_programs() -> Result<[PathBuf; 3]> {
    run(shipped(&[])?.args(["--release", "--bins", "--package", "vmm", "--package", "shim"]))?;
    Ok(["ctvm-vmm", "containerd-shim-ctvm-v2", "ctvm"].map(|name| target().join("release").join(name)))
}

/// The node's image service, the snapshotter and the image converter as they ship.
pub fn image_programs() -> Result<[PathBuf; 5]> {
    let packages = ["images", "convert", "snapshotter"].map(|name| ["--package", name]).concat();
    run(shipped(&[])?.args(["--profile", "service", "--bins"]).args(packages))?;
    let programs = ["ctvm-images", "ctvm-convert", "ctvm-snapshotter", "ctvm-nydusd", "nydus-overlayfs"];
    Ok(programs.map(|name| target().join("service").join(name)))
}

/// The benchmark harness.
pub fn bench() -> Result<PathBuf> {
    run(shipped(&[])?.args(["--release", "--bins", "--package", "benches"]))?;
    Ok(target().join("release/ctvm-bench"))
}

/// The harness of group `pods`, in the profile of the end-to-end tests, with which it shares CRI's client.
pub fn bench_pods() -> Result<PathBuf> {
    run(cargo("build").args(["--package", "benches", "--features", "pods", "--bin", "ctvm-bench-pods"]))?;
    Ok(target().join("debug/ctvm-bench-pods"))
}

/// The program of the conformance cases.
pub fn conformance() -> Result<PathBuf> {
    run(cargo("build").args(["--bins", "--package", "cri"]))?;
    Ok(target().join("debug/ctvm-conformance"))
}

/// The end-to-end tests, by name.
pub fn lab_tests() -> Result<Vec<(String, PathBuf)>> {
    let names = lab_test_names(&metadata(&["--no-deps"])?);
    ensure!(!names.is_empty(), "the workspace has no end-to-end test");
    let chosen: Vec<&str> = names.iter().flat_map(|name| ["--test", name]).collect();
    let messages = build_tests(&chosen)?;
    let mut tests: Vec<_> = messages.iter().filter_map(lab_test).collect();
    ensure!(tests.len() == names.len(), "cargo built {} of {} end-to-end tests", tests.len(), names.len());
    tests.sort();
    Ok(tests)
}

/// The programs of unit tests, each with the folder of its package, where it is to run.
pub fn unit_tests() -> Result<Vec<(PathBuf, PathBuf)>> {
    let messages = build_tests(&[])?;
    let tests: Vec<_> = messages.iter().filter_map(unit_test).collect();
    ensure!(!tests.is_empty(), "cargo built no unit test");
    Ok(tests)
}

/// Builds tests, all or those that `which` names; the result is what cargo says of each thing that it built.
fn build_tests(which: &[&str]) -> Result<Vec<Value>> {
    let mut command = cargo("test");
    command.args(WHOLE).args(which).args(["--no-run", "--message-format=json-render-diagnostics"]);
    let output = command.stderr(Stdio::inherit()).output().context("start cargo")?;
    ensure!(output.status.success(), "cargo: {}", output.status);
    let lines = output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines.map(serde_json::from_slice).collect::<Result<_, _>>().context("read cargo's message")
}

/// Names of the end-to-end tests that cargo's `metadata` tells of.
fn lab_test_names(metadata: &Value) -> Vec<String> {
    let targets = list(&metadata["packages"]).iter().flat_map(|package| {
        let named = |target| lab_test_name(target, &package["manifest_path"]);
        list(&package["targets"]).iter().filter_map(named)
    });
    targets.map(String::from).collect()
}

/// The name of `target` of the package of `manifest` when it is an end-to-end test.
fn lab_test_name<'a>(target: &'a Value, manifest: &Value) -> Option<&'a str> {
    let is_test = target["kind"].as_array()?.iter().any(|kind| kind == "test");
    let folder = Path::new(manifest.as_str()?).parent()?;
    let name = target["name"].as_str()?;
    let in_lab = LAB_PACKAGES.iter().any(|package| folder.ends_with(package));
    (is_test && in_lab && !HOST_ONLY_TESTS.contains(&name)).then_some(name)
}

/// Name and program when `message` tells of an end-to-end test that was built.
fn lab_test(message: &Value) -> Option<(String, PathBuf)> {
    let name = lab_test_name(&message["target"], &message["manifest_path"])?;
    Some((name.to_string(), message["executable"].as_str()?.into()))
}

/// Program and its package's folder when `message` tells of a program of unit tests that was built.
fn unit_test(message: &Value) -> Option<(PathBuf, PathBuf)> {
    let program = message["executable"].as_str()?;
    let folder = Path::new(message["manifest_path"].as_str()?).parent()?;
    let is_unit_test = message["profile"]["test"].as_bool()? && lab_test(message).is_none();
    is_unit_test.then(|| (program.into(), folder.into()))
}

/// A build of what ships, with `flags` for the compiler. Programs name the places in their sources, for panics: here by
/// names that are the same on every machine, and short.
fn shipped(flags: &[&str]) -> Result<Command> {
    let flags = flags.iter().map(|flag| flag.to_string()).chain(plain_places(&metadata(&[])?));
    let mut command = cargo("build");
    // Unlike RUSTFLAGS, flags may have spaces in this.
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.collect::<Vec<_>>().join("\x1f"));
    Ok(command)
}

/// What has the compiler name the workspace's sources, and those of the packages in cargo's `metadata`, alike everywhere.
fn plain_places(metadata: &Value) -> Vec<String> {
    let is_fetched = |package: &&Value| !package["source"].is_null();
    let folder =
        |package: &Value| Some(Path::new(package["manifest_path"].as_str()?).ancestors().nth(2)?.to_owned());
    let fetched: BTreeSet<PathBuf> =
        list(&metadata["packages"]).iter().filter(is_fetched).filter_map(folder).collect();
    let ours = [(workspace(), ""), (target(), "target")];
    let places = ours.into_iter().chain(fetched.into_iter().map(|folder| (folder, "")));
    places.map(|(folder, name)| format!("--remap-path-prefix={}={name}", folder.display())).collect()
}

/// What cargo tells of the workspace and, without `--no-deps`, of all it depends on.
fn metadata(options: &[&str]) -> Result<Value> {
    let mut command = talkative_cargo("metadata");
    let text = output(command.args(["--format-version", "1"]).args(options))?;
    serde_json::from_str(&text).context("read cargo's metadata")
}

/// The items of a list in cargo's metadata.
pub fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A cargo command in the workspace, with the versions that are locked, that only says what is wrong.
pub fn cargo(verb: &str) -> Command {
    let mut command = talkative_cargo(verb);
    command.arg("--quiet");
    command
}

/// The same with all it has to say; `cargo test --quiet` would not name the tests it runs.
pub fn talkative_cargo(verb: &str) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace()).args([verb, "--locked"]);
    command
}

/// Runs a cargo command with its output shown.
pub fn run(command: &mut Command) -> Result<()> {
    // Ours is for results, not for a build's messages.
    let status = command.stdin(Stdio::null()).stdout(std::io::stderr()).status().context("start cargo")?;
    ensure!(status.success(), "cargo: {status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: &str, name: &str, folder: &str, test: bool) -> Value {
        serde_json::json!({
            "executable": "/t/x",
            "manifest_path": format!("{folder}/Cargo.toml"),
            "target": {"kind": [kind], "name": name},
            "profile": {"test": test},
        })
    }

    #[test]
    fn only_end_to_end_tests_go_to_the_lab() {
        let built = message("test", "vm_boot", "/w/tests/e2e", true);
        assert_eq!(lab_test(&built), Some(("vm_boot".into(), "/t/x".into())));
        assert_eq!(unit_test(&built), None);
        for not_for_the_lab in [
            message("test", "import_edges", "/w/tests/e2e", true),
            message("test", "tiny_guests", "/w/vmm", true),
            message("lib", "e2e", "/w/tests/e2e", true),
        ] {
            assert_eq!(lab_test(&not_for_the_lab), None);
            assert!(unit_test(&not_for_the_lab).is_some());
        }
        assert_eq!(lab_test(&serde_json::json!({"reason": "build-finished", "success": true})), None);
    }

    #[test]
    fn end_to_end_tests_are_found_before_they_are_built() {
        let target = |kind: &str, name: &str| serde_json::json!({"kind": [kind], "name": name});
        let package = |folder: &str, targets: &[Value]| serde_json::json!({"manifest_path": format!("{folder}/Cargo.toml"), "targets": targets});
        let metadata = serde_json::json!({"packages": [
            package("/w/tests/cri", &[target("lib", "cri"), target("test", "pods")]),
            package("/w/vmm", &[target("test", "tiny_guests")]),
        ]});
        assert_eq!(lab_test_names(&metadata), ["pods"]);
    }

    #[test]
    fn no_folder_of_this_machine_is_in_what_ships() {
        let package =
            |source: Value, manifest: &str| serde_json::json!({"source": source, "manifest_path": manifest});
        let places = plain_places(&serde_json::json!({"packages": [
            package("registry".into(), "/home/me/registry/a-1.0.0/Cargo.toml"),
            package("registry".into(), "/home/me/registry/b-1.0.0/Cargo.toml"),
            package(Value::Null, "/w/vmm/Cargo.toml"),
        ]}));
        let here = workspace();
        assert_eq!(places[0], format!("--remap-path-prefix={}=", here.display()));
        assert!(places[1].ends_with("=target"), "{}", places[1]);
        assert_eq!(places[2..], ["--remap-path-prefix=/home/me/registry="]);
    }

    #[test]
    fn unit_tests_run_where_their_package_is() {
        let built = |test: bool| message("lib", "vmm", "/w/vmm", test);
        assert_eq!(unit_test(&built(true)), Some(("/t/x".into(), "/w/vmm".into())));
        assert_eq!(unit_test(&built(false)), None);
        assert_eq!(unit_test(&serde_json::json!({"reason": "build-finished", "success": true})), None);
    }
}
