//! What is in a pod's network namespace.

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType};
use rtnetlink::{Error, Handle, RouteMessageBuilder};

use super::{MAX_INTERFACES, NetError};

/// An interface with all that makes it usable.
#[derive(Debug, Clone, PartialEq)]
pub struct Interface {
    /// Its number in the pod's namespace.
    pub index: u32,
    /// Its name there, and in the guest.
    pub name: String,
    /// Its address, and the guest's.
    pub mac: [u8; 6],
    /// Its largest packet, bytes.
    pub mtu: u16,
    /// Addresses, as the kernel tells them.
    pub addresses: Vec<AddressMessage>,
    /// Routes over it, but for those that come with an address by themselves.
    pub routes: Vec<RouteMessage>,
    /// Neighbours that somebody set for good.
    pub neighbours: Vec<NeighbourMessage>,
}

/// Finds them all, in the order of their numbers.
pub async fn interfaces(handle: &Handle) -> Result<Vec<Interface>, NetError> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |source: Error| NetError::Netlink { what, source }
    };
    let links: Vec<_> =
        handle.link().get().execute().try_collect().await.map_err(failed("list interfaces"))?;
    let addresses: Vec<_> =
        handle.address().get().execute().try_collect().await.map_err(failed("list addresses"))?;
    let neighbours: Vec<_> =
        handle.neighbours().get().execute().try_collect().await.map_err(failed("list neighbours"))?;
    let mut routes = Vec::new();
    let v4 = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<std::net::Ipv6Addr>::new().build();
    for family in [v4, v6] {
        let found: Vec<_> =
            handle.route().get(family).execute().try_collect().await.map_err(failed("list routes"))?;
        routes.extend(found);
    }

    let mut found = Vec::new();
    for link in links {
        let Some(mut interface) = interface(&link)? else { continue };
        let index = interface.index;
        interface.addresses.extend(addresses.iter().filter(|a| a.header.index == index).cloned());
        interface.routes.extend(routes.iter().filter(|r| is_over(r, index)).cloned());
        interface.neighbours.extend(
            neighbours
                .iter()
                .filter(|n| n.header.ifindex == index && n.header.state == NeighbourState::Permanent)
                .filter(|n| n.header.kind == RouteType::Unicast)
                .cloned(),
        );
        found.push(interface);
    }
    found.sort_by_key(|interface| interface.index);
    if found.len() > MAX_INTERFACES {
        return Err(NetError::TooMany { count: found.len() });
    }
    Ok(found)
}

/// An interface without its addresses; nothing for the loopback, for those that are down (tunnel modules leave one in
/// every namespace), and for those that are parts of another, as a bond's are.
fn interface(link: &LinkMessage) -> Result<Option<Interface>, NetError> {
    let (mut name, mut mac, mut mtu, mut kind, mut part) = (String::new(), None, 0, None, false);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name.clone_from(value),
            LinkAttribute::Address(value) => mac = value.as_slice().try_into().ok(),
            LinkAttribute::Mtu(value) => mtu = *value,
            LinkAttribute::Controller(_) => part = true,
            LinkAttribute::LinkInfo(infos) => {
                kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.clone()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    let flags = link.header.flags;
    if flags.contains(LinkFlags::Loopback) || !flags.contains(LinkFlags::Up) || part {
        return Ok(None);
    }
    // A tap (of kind tun, but with frames) has somebody at its other end, who is to see the VM instead of this host.
    let wired =
        [InfoKind::Veth, InfoKind::MacVlan, InfoKind::IpVlan, InfoKind::Vlan, InfoKind::Bond, InfoKind::Tun];
    match (link.header.link_layer_type, kind, mac) {
        // No kind: a network card that was moved into the pod.
        (LinkLayerType::Ether, kind, Some(mac)) if kind.as_ref().is_none_or(|kind| wired.contains(kind)) => {
            Ok(Some(Interface {
                index: link.header.index,
                name,
                mac,
                mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
                addresses: Vec::new(),
                routes: Vec::new(),
                neighbours: Vec::new(),
            }))
        }
        (layer, kind, _) => {
            let kind = kind.map_or_else(|| format!("{layer:?}"), |kind| kind.to_string());
            Err(NetError::Kind { name, kind })
        }
    }
}

/// Whether a route is one to set in the guest for the interface `index`.
fn is_over(route: &RouteMessage, index: u32) -> bool {
    let header = &route.header;
    header.table == RouteHeader::RT_TABLE_MAIN
        && header.kind == RouteType::Unicast
        // The first come with addresses, the second from a router, which tells the guest as well.
        && ![RouteProtocol::Kernel, RouteProtocol::Ra].contains(&header.protocol)
        && route.attributes.contains(&RouteAttribute::Oif(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, flags: LinkFlags, kind: Option<InfoKind>) -> LinkMessage {
        let mut link = LinkMessage::default();
        (link.header.index, link.header.flags) = (7, flags);
        link.header.link_layer_type = LinkLayerType::Ether;
        link.attributes = vec![
            LinkAttribute::IfName(name.into()),
            LinkAttribute::Mtu(1450),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, 9]),
        ];
        link.attributes.extend(kind.map(|kind| LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)])));
        link
    }

    #[test]
    fn what_can_be_connected_is_and_the_rest_is_told() {
        let veth = interface(&link("eth0", LinkFlags::Up, Some(InfoKind::Veth))).unwrap().unwrap();
        assert_eq!((veth.index, &*veth.name, veth.mac, veth.mtu), (7, "eth0", [2, 0, 0, 0, 0, 9], 1450));
        assert!(interface(&link("ens5", LinkFlags::Up, None)).unwrap().is_some());
        let mut part = link("eth1", LinkFlags::Up, Some(InfoKind::Veth));
        part.attributes.push(LinkAttribute::Controller(3));
        assert_eq!(interface(&part).unwrap(), None);
        assert_eq!(interface(&link("lo", LinkFlags::Up | LinkFlags::Loopback, None)).unwrap(), None);
        assert_eq!(interface(&link("sit0", LinkFlags::empty(), Some(InfoKind::SitTun))).unwrap(), None);
        let error = interface(&link("wg0", LinkFlags::Up, Some(InfoKind::Wireguard))).unwrap_err();
        assert!(error.to_string().starts_with("interface wg0 is of kind wireguard;"), "{error}");
    }

    #[test]
    fn routes_that_come_by_themselves_are_left_out() {
        let mut route = RouteMessage::default();
        route.header.table = RouteHeader::RT_TABLE_MAIN;
        route.header.kind = RouteType::Unicast;
        route.attributes.push(RouteAttribute::Oif(7));
        for (protocol, wanted) in
            [(RouteProtocol::Boot, true), (RouteProtocol::Static, true), (RouteProtocol::Kernel, false)]
        {
            route.header.protocol = protocol;
            assert_eq!((is_over(&route, 7), is_over(&route, 8)), (wanted, false), "{protocol:?}");
        }
    }
}
