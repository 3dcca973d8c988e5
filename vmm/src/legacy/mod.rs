//! Two leftovers of the PC: the keyboard controller's reset line, and a serial port for debugging.

pub mod i8042;
pub mod serial;
