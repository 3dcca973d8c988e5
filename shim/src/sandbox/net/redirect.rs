//! Interface and tap, each redirected to the other (tc-mirred(8), "egress redirect" at the ingress of each).

use std::os::fd::OwnedFd;

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::tc::TcHandle;
use rtnetlink::{Error, Handle, LinkUnspec};
use rustix::io::Errno;

use super::{Interface, NetError};

/// `ETH_P_ALL`: every protocol.
const ALL_PROTOCOLS: u16 = 0x0003;

/// What the kernel says of a queueing discipline that is not there, or of an interface without any.
const NONE: [i32; 2] = [Errno::NOENT.raw_os_error(), Errno::INVAL.raw_os_error()];

fn netlink(what: impl Into<String>) -> impl FnOnce(Error) -> NetError {
    let what = what.into();
    move |source| NetError::Netlink { what, source }
}

/// Makes the tap `name` with so many queues and connects `interface` with it.
pub async fn through_tap(
    handle: &Handle,
    interface: &Interface,
    name: &str,
    queues: usize,
) -> Result<Vec<OwnedFd>, NetError> {
    let taps = tap::open(name, queues).map_err(|source| NetError::Tap { name: name.to_owned(), source })?;
    let index = index_of(handle, name).await?.ok_or_else(|| NetError::Tap {
        name: name.to_owned(),
        source: std::io::ErrorKind::NotFound.into(),
    })?;
    let up = LinkUnspec::new_with_index(index).mtu(interface.mtu.into()).up().build();
    handle.link().set(up).execute().await.map_err(netlink(format!("set {name} up")))?;
    redirect(handle, interface.index, index)
        .await
        .map_err(netlink(format!("redirect {} to {name}", interface.name)))?;
    redirect(handle, index, interface.index)
        .await
        .map_err(netlink(format!("redirect {name} to {}", interface.name)))?;
    Ok(taps)
}

async fn redirect(handle: &Handle, from: u32, to: u32) -> Result<(), Error> {
    let from = i32::try_from(from).map_err(|_| Error::RequestFailed)?;
    // One that is left of a sandbox that was killed is made anew.
    handle.qdisc().replace(from).ingress().execute().await?;
    let filter = handle.traffic_filter(from).add();
    filter
        .parent(u32::from(TcHandle::from(0xffff_0000)))
        .protocol(ALL_PROTOCOLS.to_be())
        .redirect(to)?
        .execute()
        .await
}

/// Takes the redirection of the interface `name` away, if it has one.
pub async fn undo(handle: &Handle, name: &str) -> Result<(), NetError> {
    let Some(index) = index_of(handle, name).await? else { return Ok(()) };
    let index = i32::try_from(index).unwrap_or(0);
    let mut request = handle.qdisc().del(index);
    let message = request.message_mut();
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = TcHandle::from(0xffff_0000);
    match request.execute().await {
        Ok(()) => Ok(()),
        Err(Error::NetlinkError(e)) if NONE.contains(&-e.raw_code()) => Ok(()),
        Err(e) => Err(netlink(format!("take the redirection of {name} away"))(e)),
    }
}

async fn index_of(handle: &Handle, name: &str) -> Result<Option<u32>, NetError> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    match links.try_next().await {
        Ok(link) => Ok(link.map(|link| link.header.index)),
        Err(Error::NetlinkError(e)) if -e.raw_code() == Errno::NODEV.raw_os_error() => Ok(None),
        Err(e) => Err(netlink(format!("look for interface {name}"))(e)),
    }
}
