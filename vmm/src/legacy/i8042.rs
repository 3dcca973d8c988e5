//! The keyboard controller, as far as a kernel with `reboot=k` needs it: a command that resets the machine.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::vcpu::{End, Ends};

/// Offset of the command and status register from port 0x60.
const COMMAND: u64 = 4;
/// Command: pulse the reset line.
const RESET: u8 = 0xfe;

/// Always idle: nothing to read, ready for a command.
#[derive(Debug)]
pub struct I8042 {
    ends: Arc<Ends>,
}

impl I8042 {
    /// Ports of the device, from 0x60.
    pub const PORTS: u64 = 5;

    /// A controller whose reset line reports to `ends`.
    pub fn new(ends: Arc<Ends>) -> Self {
        I8042 { ends }
    }
}

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data == [RESET] {
            self.ends.report(End::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let ends = Arc::new(Ends::new().unwrap());
        let device = I8042::new(Arc::clone(&ends));
        device.write(COMMAND, &[0xd1]);
        device.write(0, &[RESET]);
        device.write(COMMAND, &[RESET, RESET]);
        assert_eq!(ends.get(), None);
        let mut status = [0xff];
        device.read(COMMAND, &mut status);
        assert_eq!(status, [0]);
        device.write(COMMAND, &[RESET]);
        assert_eq!(ends.get(), Some(&End::Reset));
    }
}
