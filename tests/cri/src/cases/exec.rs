use anyhow::{Result, ensure};
use tonic::Code;

use super::{Case, Ground, case};
use crate::client::failed_as;

pub(super) const CASES: &[Case] = &[
    case("execSync brings output, errors and exit code", sync),
    case("execSync ends a command at its timeout", timeout),
    case("execSync brings a large output whole", large),
    case("execSync of a missing command fails at once", missing),
    case("several execSync at once", at_once),
];

fn sync(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let id = pod.start_forever()?;
    let done = on.cri.exec(&id, &["sh", "-c", "echo out; echo err >&2; exit 7"], 0)?;
    ensure!((done.stdout.as_str(), done.stderr.as_str(), done.code) == ("out\n", "err\n", 7), "{done:?}");
    Ok(())
}

fn timeout(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let id = pod.start_forever()?;
    let done = on.cri.exec(&id, &["sleep", "987"], 2);
    ensure!(failed_as(&done, Code::DeadlineExceeded), "{done:?}");
    let processes = on.cri.exec(&id, &["ps"], 0)?.ok()?;
    ensure!(!processes.contains("sleep 987"), "the command runs on: {processes}");
    Ok(())
}

fn large(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let id = pod.start_forever()?;
    let done = on.cri.exec(&id, &["sh", "-c", "yes 0123456789abcde | head -n 131072"], 0)?;
    ensure!(done.code == 0, "{done:?}");
    ensure!(done.stdout.len() == 16 * 131_072, "{} bytes of 2 MiB", done.stdout.len());
    ensure!(done.stdout.lines().all(|line| line == "0123456789abcde"), "the output is damaged");
    Ok(())
}

fn missing(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let id = pod.start_forever()?;
    // An error, or exit code 126 or 127: both are in use.
    match on.cri.exec(&id, &["/no/such/program"], 0) {
        Ok(done) => ensure!([126, 127].contains(&done.code), "{done:?}"),
        Err(e) => ensure!(format!("{e:#}").contains("/no/such/program"), "{e:#}"),
    }
    ensure!(on.cri.exec(&id, &["echo", "on"], 0)?.ok()? == "on", "no command runs after it");
    Ok(())
}

fn at_once(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let id = pod.start_forever()?;
    std::thread::scope(|scope| {
        let calls: Vec<_> = (0..8)
            .map(|n| {
                let (cri, id) = (on.cri.clone(), &id);
                scope.spawn(move || cri.exec(id, &["sh", "-c", &format!("sleep 1; echo {n}")], 0)?.ok())
            })
            .collect();
        for (n, call) in calls.into_iter().enumerate() {
            let text = call.join().expect("no panic")?;
            ensure!(text == n.to_string(), "{text:?} instead of {n}");
        }
        Ok(())
    })
}
