//! The guest's network, as the shim found it on the host: rtnetlink requests, sent one by one.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use agent_api::sandbox::NetworkStep;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send, socket,
};

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
