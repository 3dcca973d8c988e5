//! Credit: who may still send how much (virtio 1.2, 5.10.6.3). All counts are modulo 2^32.

/// Room that the guest has for bytes of ours.
#[derive(Debug, Clone, Copy, Default)]
pub struct Credit {
    allocated: u32,
    forwarded: u32,
    sent: u32,
}

impl Credit {
    /// Takes over what a packet of the guest says.
    pub fn learn(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.allocated = buf_alloc;
        self.forwarded = fwd_cnt;
    }

    /// Bytes that may be sent now. A guest that claims to have passed on more than it got, or that shrinks its
    /// buffer below what is under way, gets nothing.
    pub fn left(&self) -> u32 {
        self.allocated.saturating_sub(self.sent.wrapping_sub(self.forwarded))
    }

    /// `count` bytes were sent.
    pub fn spend(&mut self, count: u32) {
        debug_assert!(count <= self.left());
        self.sent = self.sent.wrapping_add(count);
    }
}

/// The guest sent more than it had credit for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes sent into a window with {left} bytes left")]
pub struct Overrun {
    /// Bytes sent.
    pub len: u32,
    /// Bytes it might have sent.
    pub left: u32,
}

/// Room that we have for bytes of the guest.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    size: u32,
    received: u32,
    forwarded: u32,
    told: u32,
}

impl Window {
    /// An empty window of `size` bytes.
    pub fn new(size: u32) -> Self {
        Window { size, received: 0, forwarded: 0, told: 0 }
    }

    /// Its size in bytes.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// `len` bytes came. They count until they are passed on.
    pub fn receive(&mut self, len: u32) -> Result<(), Overrun> {
        let left = self.size - self.received.wrapping_sub(self.forwarded);
        if len > left {
            return Err(Overrun { len, left });
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// `count` of the bytes that came were passed on.
    pub fn forward(&mut self, count: u32) {
        debug_assert!(count <= self.received.wrapping_sub(self.forwarded));
        self.forwarded = self.forwarded.wrapping_add(count);
    }

    /// `buf_alloc` and `fwd_cnt` for a packet that is now sent.
    pub fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (self.size, self.forwarded)
    }

    /// Whether so much was passed on since the guest last heard of it that it should hear now. Half the window: a
    /// guest that sends in its largest packets then goes on sending while the update is under way; and one that
    /// has used its window up cannot miss the update, as the whole window passes by before it could stall.
    pub fn update_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= self.size / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credit_is_what_the_guest_has_room_for_beyond_what_is_under_way() {
        let mut credit = Credit::default();
        assert_eq!(credit.left(), 0);
        credit.learn(100, 0);
        credit.spend(60);
        assert_eq!(credit.left(), 40);
        credit.learn(100, 50);
        assert_eq!(credit.left(), 90);
        credit.learn(5, 50);
        assert_eq!(credit.left(), 0, "shrunk below what is under way");
        credit.learn(100, 61);
        assert_eq!(credit.left(), 0, "passed on more than was sent");
    }

    #[test]
    fn counts_wrap() {
        let near = u32::MAX - 10;
        let mut credit = Credit { allocated: 100, forwarded: near, sent: near };
        credit.spend(20);
        assert_eq!(credit.left(), 80);
        credit.learn(100, 9);
        assert_eq!(credit.left(), 100);

        let mut window = Window { size: 100, received: near, forwarded: near, told: near };
        window.receive(100).unwrap();
        window.forward(60);
        assert!(window.update_due());
        assert_eq!(window.tell(), (100, 49));
        assert_eq!(window.receive(61), Err(Overrun { len: 61, left: 60 }));
        window.receive(60).unwrap();
    }

    #[test]
    fn window_tells_when_half_of_it_was_passed_on() {
        let mut window = Window::new(64);
        window.receive(64).unwrap();
        assert_eq!(window.receive(1), Err(Overrun { len: 1, left: 0 }));
        window.forward(31);
        assert!(!window.update_due());
        window.forward(1);
        assert!(window.update_due());
        window.tell();
        assert!(!window.update_due());
    }

    #[test]
    fn a_length_that_would_wrap_is_an_overrun() {
        let mut window = Window::new(64);
        window.receive(64).unwrap();
        assert_eq!(window.receive(u32::MAX), Err(Overrun { len: u32::MAX, left: 0 }));
    }
}
