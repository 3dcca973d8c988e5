//! An 8250 for debugging: output only, two exits a byte.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard};

use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// The serial port `ttyS0`.
pub struct Serial {
    port: Mutex<vm_superio::Serial<Line, NoEvents, Output>>,
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial").finish_non_exhaustive()
    }
}

impl Serial {
    /// Ports of the device.
    pub const PORTS: u64 = 8;

    /// A port whose bytes go to `output`, and which interrupts by `line`.
    pub fn new(output: File, line: EventFd) -> Self {
        Serial { port: Mutex::new(vm_superio::Serial::new(Line(line), Output { file: output, dropped: 0 })) }
    }

    fn lock(&self) -> MutexGuard<'_, vm_superio::Serial<Line, NoEvents, Output>> {
        self.port.lock().expect("no thread panics while it holds this lock")
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut port = self.lock();
        for byte in data {
            *byte = port.read(register(offset));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut port = self.lock();
        for byte in data {
            if let Err(e) = port.write(register(offset), *byte) {
                log::debug!("serial port: {e}");
            }
        }
    }
}

fn register(offset: u64) -> u8 {
    u8::try_from(offset).expect("the bus gives offsets below PORTS")
}

struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Takes every byte: a guest does not stop, or fail, since nobody reads its debug output.
struct Output {
    file: File,
    dropped: u64,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Err(e) = self.file.write_all(bytes) {
            if self.dropped == 0 {
                log::warn!("serial output is being dropped: {e}");
            }
            self.dropped += bytes.len() as u64;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        // A file has no buffer here.
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, SeekFrom};

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn bytes_come_out_and_the_line_is_always_ready() {
        let mut file = tempfile::tempfile().unwrap();
        let serial = Serial::new(file.try_clone().unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
        serial.write(0, b"ok");
        let mut status = [0];
        serial.read(5, &mut status);
        // Transmitter holding register empty.
        assert_eq!(status[0] & 0x20, 0x20);
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "ok");
    }

    #[test]
    fn a_dead_reader_does_not_stop_the_guest() {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let file = File::from(std::os::fd::OwnedFd::from(writer));
        Serial::new(file, EventFd::new(EFD_NONBLOCK).unwrap()).write(0, b"x");
    }
}
