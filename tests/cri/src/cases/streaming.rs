use anyhow::{Result, ensure};
use e2e::command::wait_until;
use k8s_cri::v1::{AttachRequest, ExecRequest};

use super::{Case, Ground, case};
use crate::Pod;
use crate::websocket::{Channels, RESIZE, STDERR, STDIN, STDOUT};

pub(super) const CASES: &[Case] = &[
    case("exec streams output and errors apart, and says the exit code", exec),
    case("exec streams input", exec_input),
    case("exec on a terminal, which is resized", exec_terminal),
    case("attach brings output and takes input", attach),
    case("attach to a terminal, left and taken up again", attach_terminal),
    case("port-forward reaches a server in the container", port_forward),
    case("port-forward reaches a server on 127.0.0.1 alone", port_forward_v4),
    case("port-forward reaches a server on ::1 alone", port_forward_v6),
    case("port-forward to a port where nobody listens ends", port_forward_refused),
];

fn words(command: &[&str]) -> Vec<String> {
    command.iter().map(|&word| word.to_owned()).collect()
}

fn exec(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let id = pod.start_forever()?;
    let url = on.cri.exec_url(ExecRequest {
        container_id: id,
        cmd: words(&["sh", "-c", "echo out; echo err >&2; exit 3"]),
        stdout: true,
        stderr: true,
        ..ExecRequest::default()
    })?;
    let [out, err, status] = Channels::open(&url)?.read_all()?;
    ensure!((out.as_str(), err.as_str()) == ("out\n", "err\n"), "{out:?} {err:?}");
    ensure!(status.contains("NonZeroExitCode") && status.contains('3'), "status {status:?}");
    Ok(())
}

fn exec_input(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let id = pod.start_forever()?;
    let url = on.cri.exec_url(ExecRequest {
        container_id: id,
        cmd: words(&["sh", "-c", "read line; echo got $line"]),
        stdin: true,
        stdout: true,
        ..ExecRequest::default()
    })?;
    let mut channels = Channels::open(&url)?;
    channels.send(STDIN, b"a line\n")?;
    let [out, _, status] = channels.read_all()?;
    ensure!(out == "got a line\n" && status.contains("Success"), "{out:?} {status:?}");
    Ok(())
}

fn exec_terminal(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let id = pod.start_forever()?;
    let url = on.cri.exec_url(ExecRequest {
        container_id: id,
        cmd: words(&["sh"]),
        tty: true,
        stdin: true,
        stdout: true,
        ..ExecRequest::default()
    })?;
    let mut channels = Channels::open(&url)?;
    channels.send(RESIZE, br#"{"Width":123,"Height":45}"#)?;
    // The size travels beside the input: ask until it has arrived.
    channels.send(STDIN, b"until stty size | grep '45 123'; do sleep 0.1; done; tty; exit 5\n")?;
    channels.read_until(STDOUT, "\n45 123\r")?;
    channels.read_until(STDOUT, "/dev/pts/")?;
    let [_, _, status] = channels.read_all()?;
    ensure!(status.contains('5'), "status {status:?}");
    Ok(())
}

fn attach(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let mut config =
        pod.container(&["sh", "-c", "while read line; do echo got $line; echo err $line >&2; done"]);
    config.stdin = true;
    let id = pod.start(&config)?;
    let url = on.cri.attach_url(AttachRequest {
        container_id: id,
        stdin: true,
        stdout: true,
        stderr: true,
        ..AttachRequest::default()
    })?;
    let mut channels = Channels::open(&url)?;
    channels.send(STDIN, b"one\n")?;
    channels.read_until(STDOUT, "got one\n")?;
    channels.send(STDIN, b"two\n")?;
    channels.read_until(STDERR, "err two\n")?;
    channels.read_until(STDOUT, "got two\n")?;
    channels.close()?;
    // Who attached and the log are told side by side.
    wait_until("both lines in the log", || Ok(pod.log(&config)?.0 == "got one\ngot two\n"))?;
    Ok(())
}

fn attach_terminal(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let mut config = pod.container(&["sh"]);
    (config.stdin, config.tty) = (true, true);
    let id = pod.start(&config)?;
    for turn in 0..3 {
        let url = on.cri.attach_url(AttachRequest {
            container_id: id.clone(),
            stdin: true,
            stdout: true,
            tty: true,
            ..AttachRequest::default()
        })?;
        let mut channels = Channels::open(&url)?;
        channels.send(STDIN, format!("echo turn-$(({turn}+10))\n").as_bytes())?;
        channels.read_until(STDOUT, &format!("turn-{}", turn + 10))?;
        channels.close()?;
    }
    ensure!(on.cri.exec(&id, &["echo", "alive"], 0)?.ok()? == "alive", "the container has ended");
    Ok(())
}

/// Starts a server and waits for it to listen.
fn serve(on: &Ground, pod: &Pod, command: &[&str], port: u16) -> Result<()> {
    let id = pod.start(&pod.container(command))?;
    let (hex, script) = (format!(":{port:04X} "), "cat /proc/net/tcp /proc/net/tcp6");
    wait_until("the server listens", || Ok(on.cri.exec(&id, &["sh", "-c", script], 0)?.stdout.contains(&hex)))
}

/// The data of the port is on stream 0, errors on stream 1; each begins with the port's number.
fn forward(on: &Ground, pod: &str, port: u16) -> Result<Channels> {
    let url = on.cri.port_forward_url(pod, port)?;
    let mut channels = Channels::open(&format!("{url}?port={port}"))?;
    for _ in 0..2 {
        let message = channels.receive()?;
        ensure!(message.as_ref().is_some_and(|(_, bytes)| *bytes == port.to_le_bytes()), "{message:?}");
    }
    Ok(channels)
}

fn port_forward(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    serve(on, pod, &["nc", "-ll", "-p", "8080", "-e", "cat"], 8080)?;
    for turn in 0..3 {
        let mut channels = forward(on, &pod.id, 8080)?;
        let text = format!("turn {turn}");
        channels.send(0, text.as_bytes())?;
        channels.read_until(0, &text)?;
        channels.close()?;
    }
    Ok(())
}

/// A server that listens on one loopback address alone.
fn page(on: &Ground, listen: &str, port: u16) -> Result<()> {
    let pod = on.usual()?;
    serve(on, pod, &["httpd", "-f", "-p", listen, "-h", "/etc"], port)?;
    let mut channels = forward(on, &pod.id, port)?;
    channels.send(0, b"GET /hostname HTTP/1.0\r\n\r\n")?;
    channels.read_until(0, &pod.config.hostname)?;
    channels.close()?;
    Ok(())
}

fn port_forward_v4(on: &Ground) -> Result<()> {
    page(on, "127.0.0.1:8081", 8081)
}

fn port_forward_v6(on: &Ground) -> Result<()> {
    page(on, "[::1]:8082", 8082)
}

fn port_forward_refused(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let mut channels = forward(on, &pod.id, 81)?;
    // An error on stream 1, or the end.
    while let Some((stream, bytes)) = channels.receive()? {
        ensure!(stream == 1, "data {bytes:?} from a port where nobody listens");
        if !bytes.is_empty() {
            break;
        }
    }
    Ok(())
}
