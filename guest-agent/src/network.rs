//! The guest's network, as the shim found it on the host: rtnetlink requests, sent one by one.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use agent_api::sandbox::NetworkStep;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send, socket,
};

use crate::sys;

/// A step that the kernel did not take.
#[derive(Debug, thiserror::Error)]
#[error("network: {what}")]
pub struct NetworkError {
    what: String,
    source: io::Error,
}

/// Length of `struct nlmsghdr`, bytes (netlink(7)).
const HEADER: usize = 16;
/// An answer with an error number, 0 for an acknowledgement.
const NLMSG_ERROR: u16 = 2;

/// Carries the steps out, to the first that fails.
pub fn apply(steps: &[NetworkStep]) -> Result<(), NetworkError> {
    if steps.is_empty() {
        return Ok(());
    }
    let failed = |what: &str| {
        let what = what.to_owned();
        move |source| NetworkError { what, source }
    };
    let kernel = open().map_err(failed("open an rtnetlink socket"))?;
    for step in steps {
        ask(&kernel, &step.request).map_err(failed(&step.what))?;
    }
    Ok(())
}

fn open() -> io::Result<OwnedFd> {
    let (kind, flags) = (SockType::Raw, SockFlag::SOCK_CLOEXEC);
    let kernel = socket(AddressFamily::Netlink, kind, flags, SockProtocol::NetlinkRoute)?;
    connect(kernel.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    Ok(kernel)
}

fn ask(kernel: &OwnedFd, request: &[u8]) -> io::Result<()> {
    send(kernel.as_raw_fd(), request, MsgFlags::empty())?;
    let mut answer = [0; 4096]; // an error carries the request back, cut to its header for an acknowledgement
    let length = recv(kernel.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    verdict(&answer[..length])
}

/// Has the VM's network devices use a pair of queues for each CPU. Their driver counted those that were there when it
/// found the device, which was before a VM that boots small had grown.
pub fn spread_over_cpus() {
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(1));
    if cpus == 1 {
        return;
    }
    let devices = devices(Path::new("/sys/class/net")).unwrap_or_default();
    for (name, _) in devices {
        // It works with fewer.
        if let Err(e) = sys::spread_over_queues(&name, cpus) {
            log::warn!("queues of {name} for {cpus} CPUs: {e}");
        }
    }
}

/// Moves the VM's network devices to another network namespace. They keep their numbers where these are free.
pub fn move_devices(namespace: BorrowedFd<'_>) -> Result<(), NetworkError> {
    let failed = |what: String| move |source| NetworkError { what, source };
    let devices = devices(Path::new("/sys/class/net")).map_err(failed("list devices".to_owned()))?;
    let kernel = open().map_err(failed("open an rtnetlink socket".to_owned()))?;
    for (_, index) in devices {
        let request = move_request(index, namespace.as_raw_fd());
        ask(&kernel, &request).map_err(failed(format!("move device {index} to the sandbox's namespace")))?;
    }
    Ok(())
}

/// Names and numbers of the interfaces that are devices of the machine, which a loopback is not; by their numbers.
fn devices(class: &Path) -> io::Result<Vec<(String, u32)>> {
    let mut devices = Vec::new();
    for entry in std::fs::read_dir(class)? {
        let entry = entry?;
        if entry.path().join("device").exists() {
            let text = std::fs::read_to_string(entry.path().join("ifindex"))?;
            let index = text.trim_end().parse().map_err(io::Error::other)?;
            devices.push((entry.file_name().to_string_lossy().into_owned(), index));
        }
    }
    devices.sort_unstable_by_key(|(_, index)| *index);
    Ok(devices)
}

/// `RTM_SETLINK` with an `ifinfomsg` and `IFLA_NET_NS_FD` (rtnetlink(7)).
fn move_request(index: u32, namespace: RawFd) -> Vec<u8> {
    const LENGTH: u32 = 40;
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
    let flags = u16::try_from(flags).expect("two low bits");
    let mut request = LENGTH.to_ne_bytes().to_vec();
    request.extend(libc::RTM_SETLINK.to_ne_bytes());
    request.extend(flags.to_ne_bytes());
    request.extend([0; 8]); // sequence, port
    request.extend([0; 4]); // family, padding, type
    request.extend(index.to_ne_bytes());
    request.extend([0; 8]); // flags, change
    request.extend(8_u16.to_ne_bytes());
    request.extend(libc::IFLA_NET_NS_FD.to_ne_bytes());
    request.extend(namespace.to_ne_bytes());
    request
}

/// What an answer says: header, then the negated error number.
fn verdict(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6).map(|bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
    let code = answer
        .get(HEADER..HEADER + 4)
        .map(|bytes| i32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is no acknowledgement")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(kind: u16, code: i32) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&code.to_ne_bytes());
        bytes
    }

    #[test]
    fn acknowledgements_and_errors_are_told_apart() {
        assert!(verdict(&answer(NLMSG_ERROR, 0)).is_ok());
        let error = verdict(&answer(NLMSG_ERROR, -libc::EEXIST)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EEXIST));
        assert!(verdict(&answer(3, 0)).is_err());
        assert!(verdict(&answer(NLMSG_ERROR, 0)[..HEADER]).is_err());
    }

    #[test]
    fn devices_are_told_from_a_loopback_and_moved_by_number() {
        let class = tempfile::tempdir().unwrap();
        for (name, index, device) in [("lo", 1, false), ("eth1", 3, true), ("eth0", 2, true)] {
            let dir = class.path().join(name);
            std::fs::create_dir_all(if device { dir.join("device") } else { dir.clone() }).unwrap();
            std::fs::write(dir.join("ifindex"), format!("{index}\n")).unwrap();
        }
        assert_eq!(devices(class.path()).unwrap(), [("eth0".to_owned(), 2), ("eth1".to_owned(), 3)]);
        let request = move_request(2, 9);
        assert_eq!((request.len(), request[20], request[36]), (40, 2, 9));
        // ENODEV by root, EPERM else.
        let namespace = std::fs::File::open("/proc/self/ns/net").unwrap();
        let error = ask(&open().unwrap(), &move_request(i32::MAX.cast_unsigned(), namespace.as_raw_fd()))
            .unwrap_err();
        assert!([Some(libc::ENODEV), Some(libc::EPERM)].contains(&error.raw_os_error()), "{error:?}");
    }

    #[test]
    fn the_kernel_refuses_what_is_no_request_and_the_step_is_named() {
        // A request to change a link that does not exist: header, then an `ifinfomsg`.
        let mut request = vec![0; 32];
        request[..4].copy_from_slice(&32_u32.to_ne_bytes());
        request[4..6].copy_from_slice(&libc::RTM_SETLINK.to_ne_bytes());
        request[6..8].copy_from_slice(&5_u16.to_ne_bytes()); // NLM_F_REQUEST | NLM_F_ACK
        request[20..24].copy_from_slice(&i32::MAX.to_ne_bytes());
        let step = NetworkStep { what: "set nothing up".into(), request, ..Default::default() };
        let error = apply(&[step]).unwrap_err();
        assert_eq!(error.to_string(), "network: set nothing up");
        // ENODEV by root, EPERM else.
        assert!([Some(libc::ENODEV), Some(libc::EPERM)].contains(&error.source.raw_os_error()), "{error:?}");
    }
}
