//! Counters of a socket device.

/// Counts since the device was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Metrics {
    /// Connections opened by the guest.
    pub accepted: u64,
    /// Connections opened by the host.
    pub connected: u64,
    /// Connections refused to the guest: no such port, too many, or no descriptors left.
    pub refused: u64,
    /// Dials of the host that the guest refused, or that were cancelled.
    pub unanswered: u64,
    /// Connections that the guest reset.
    pub reset_by_guest: u64,
    /// Connections that were reset because the guest broke the protocol.
    pub violations: u64,
    /// Packets that make no sense whatever connection they are about, and buffers too small for any packet.
    pub malformed: u64,
    /// Packets about connections that do not exist (any more).
    pub strays: u64,
    /// Packets of the guest.
    pub packets_from_guest: u64,
    /// Packets to the guest.
    pub packets_to_guest: u64,
    /// Bytes handed to the host.
    pub bytes_to_host: u64,
    /// Bytes handed to the guest.
    pub bytes_to_guest: u64,
    /// Bytes of the guest that the host did not want any more.
    pub bytes_discarded: u64,
    /// Times that the host had bytes for which the guest had no room.
    pub credit_stalls: u64,
    /// Times that the guest had bytes which the host did not take at once.
    pub host_stalls: u64,
    /// Times that there was something to send and no buffer of the guest to put it in.
    pub buffer_stalls: u64,
}

impl Metrics {
    /// Name and value of each.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("accepted", self.accepted),
            ("connected", self.connected),
            ("refused", self.refused),
            ("unanswered", self.unanswered),
            ("reset_by_guest", self.reset_by_guest),
            ("violations", self.violations),
            ("malformed", self.malformed),
            ("strays", self.strays),
            ("packets_from_guest", self.packets_from_guest),
            ("packets_to_guest", self.packets_to_guest),
            ("bytes_to_host", self.bytes_to_host),
            ("bytes_to_guest", self.bytes_to_guest),
            ("bytes_discarded", self.bytes_discarded),
            ("credit_stalls", self.credit_stalls),
            ("host_stalls", self.host_stalls),
            ("buffer_stalls", self.buffer_stalls),
        ]
    }
}
