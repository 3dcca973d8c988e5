//! The pod's network as the rtnetlink requests that make it in the guest.
//!
//! The kernel there is their parser: the agent sends them as they are and says what the kernel answered, so that it
//! needs to know nothing of networks. The guest has just booted, and its devices have the numbers that the kernel
//! gives in the order in which the VM has them.

use agent_api::sandbox::NetworkStep;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::neighbour::NeighbourAttribute;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteScope};

use super::Interface;

/// Number of the guest's first network device: the loopback is 1.
const FIRST_INDEX: u32 = 2;

/// What is to be done in the guest, in this order.
pub fn steps(interfaces: &[Interface]) -> Vec<NetworkStep> {
    let mut steps = Vec::new();
    let numbered = || interfaces.iter().zip(FIRST_INDEX..);
    // The kernel's names first get out of the way: eth1 may have to become eth0.
    for (_, index) in numbered().filter(|_| interfaces.len() > 1) {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes = vec![LinkAttribute::IfName(format!("ctvm{index}"))];
        steps.push(step(format!("rename device {index}"), RouteNetlinkMessage::SetLink(link), 0));
    }
    for (interface, index) in numbered() {
        let mut link = LinkMessage::default();
        link.header.index = index;
        (link.header.flags, link.header.change_mask) = (LinkFlags::Up, LinkFlags::Up);
        link.attributes =
            vec![LinkAttribute::IfName(interface.name.clone()), LinkAttribute::Mtu(interface.mtu.into())];
        let what = format!("name device {index} {} and set it up", interface.name);
        steps.push(step(what, RouteNetlinkMessage::SetLink(link), 0));
    }
    for (interface, index) in numbered() {
        for found in &interface.addresses {
            let what = format!("address {} of {}", address_text(found), interface.name);
            let message = RouteNetlinkMessage::NewAddress(address(found, index));
            steps.push(step(what, message, NLM_F_CREATE | NLM_F_REPLACE));
        }
    }
    // A gateway must be on a link before there is a route through it.
    let mut routes: Vec<_> = numbered()
        .flat_map(|(interface, index)| interface.routes.iter().map(move |route| (interface, index, route)))
        .collect();
    routes.sort_by_key(|(_, _, route)| route.header.scope != RouteScope::Link);
    for (interface, index, found) in routes {
        let what = format!("route {} over {}", route_text(found), interface.name);
        let message = RouteNetlinkMessage::NewRoute(route(found, index));
        steps.push(step(what, message, NLM_F_CREATE | NLM_F_REPLACE));
    }
    for (interface, index) in numbered() {
        for found in &interface.neighbours {
            let mut neighbour = found.clone();
            neighbour.header.ifindex = index;
            neighbour.attributes.retain(|attribute| {
                matches!(
                    attribute,
                    NeighbourAttribute::Destination(_) | NeighbourAttribute::LinkLayerAddress(_)
                )
            });
            let what = format!("neighbour of {}", interface.name);
            let message = RouteNetlinkMessage::NewNeighbour(neighbour);
            steps.push(step(what, message, NLM_F_CREATE | NLM_F_REPLACE));
        }
    }
    steps
}

/// The address for the guest. It is known to be nobody else's: the pod had it before.
fn address(found: &AddressMessage, index: u32) -> AddressMessage {
    let mut address = found.clone();
    address.header.index = index;
    address.header.flags = AddressHeaderFlags::Nodad;
    address.attributes.retain(|attribute| {
        matches!(
            attribute,
            AddressAttribute::Address(_) | AddressAttribute::Local(_) | AddressAttribute::Broadcast(_)
        )
    });
    address.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    address
}

fn route(found: &RouteMessage, index: u32) -> RouteMessage {
    let mut route = found.clone();
    route.attributes.retain(|attribute| {
        matches!(
            attribute,
            RouteAttribute::Destination(_)
                | RouteAttribute::Gateway(_)
                | RouteAttribute::Via(_)
                | RouteAttribute::PrefSource(_)
                | RouteAttribute::Priority(_)
                | RouteAttribute::Table(_)
                | RouteAttribute::Metrics(_)
                | RouteAttribute::Preference(_)
        )
    });
    route.attributes.push(RouteAttribute::Oif(index));
    route
}

fn address_text(address: &AddressMessage) -> String {
    let ip = address.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(ip) | AddressAttribute::Address(ip) => Some(ip.to_string()),
        _ => None,
    });
    format!("{}/{}", ip.unwrap_or_default(), address.header.prefix_len)
}

fn route_text(route: &RouteMessage) -> String {
    let part = |wanted: fn(&RouteAttribute) -> Option<String>| route.attributes.iter().find_map(wanted);
    let to = part(|attribute| match attribute {
        RouteAttribute::Destination(to) => Some(format!("{to:?}")),
        _ => None,
    });
    format!("to {}/{}", to.as_deref().unwrap_or("default"), route.header.destination_prefix_length)
}

fn step(what: String, message: RouteNetlinkMessage, flags: u16) -> NetworkStep {
    let mut request = NetlinkMessage::from(message);
    debug_assert!(matches!(request.payload, NetlinkPayload::InnerMessage(_)), "a request");
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    NetworkStep { what, request: bytes, ..NetworkStep::default() }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;
    use rtnetlink::packet_route::route::RouteAddress;

    fn interface(index: u32, name: &str) -> Interface {
        let mut address = AddressMessage::default();
        address.header.index = index;
        address.header.prefix_len = 24;
        address.attributes = vec![
            AddressAttribute::Local(IpAddr::V4(Ipv4Addr::new(10, 88, 0, 2))),
            AddressAttribute::Label(name.into()),
        ];
        let mut gateway = RouteMessage::default();
        gateway.attributes = vec![
            RouteAttribute::Gateway(RouteAddress::Inet(Ipv4Addr::new(10, 88, 0, 1))),
            RouteAttribute::Oif(index),
        ];
        let mut onlink = RouteMessage::default();
        onlink.header.scope = RouteScope::Link;
        onlink.attributes = vec![RouteAttribute::Oif(index)];
        Interface {
            index,
            name: name.into(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1400,
            addresses: vec![address],
            routes: vec![gateway, onlink],
            neighbours: vec![],
        }
    }

    fn parsed(step: &NetworkStep) -> RouteNetlinkMessage {
        match NetlinkMessage::deserialize(&step.request).unwrap().payload {
            NetlinkPayload::InnerMessage(message) => message,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn links_then_addresses_then_routes_on_links_then_through_gateways() {
        let steps = steps(&[interface(40, "eth0")]);
        let whats: Vec<_> = steps.iter().map(|step| step.what.as_str()).collect();
        assert_eq!(
            whats,
            [
                "name device 2 eth0 and set it up",
                "address 10.88.0.2/24 of eth0",
                "route to default/0 over eth0",
                "route to default/0 over eth0",
            ]
        );
        let RouteNetlinkMessage::NewAddress(address) = parsed(&steps[1]) else { panic!("an address") };
        assert_eq!(address.header.index, 2);
        assert!(!address.attributes.iter().any(|a| matches!(a, AddressAttribute::Label(_))));
        let RouteNetlinkMessage::NewRoute(first) = parsed(&steps[2]) else { panic!("a route") };
        assert_eq!(first.header.scope, RouteScope::Link);
        assert!(first.attributes.contains(&RouteAttribute::Oif(2)));
    }

    #[test]
    fn several_devices_are_renamed_out_of_each_others_way() {
        let steps = steps(&[interface(5, "eth1"), interface(9, "eth0")]);
        let names: Vec<_> = steps[..4]
            .iter()
            .map(|step| match parsed(step) {
                RouteNetlinkMessage::SetLink(link) => (link.header.index, link.attributes[0].clone()),
                other => panic!("{other:?}"),
            })
            .collect();
        let name = |name: &str| LinkAttribute::IfName(name.into());
        assert_eq!(names, [(2, name("ctvm2")), (3, name("ctvm3")), (2, name("eth1")), (3, name("eth0"))]);
    }
}
