//! What `xtask` and the lab's PID 1 say to each other: frames over one TCP connection for each command.
//!
//! A frame is a kind (1 byte), a length (4 bytes, little endian) and that many bytes. The first frame of a
//! connection says what it is for; a command's connection lives as long as the command, and losing it kills
//! the command. There is no file transfer: `tar` at both ends does that, over a command's streams.
//!
//! ```text
//! xtask                                lab-init
//!   Exec ─────────────────────────────>  starts the command in a session of its own
//!   Stdin* StdinEof, Resize, Kill ────>
//!        <──────── Stdout* Stderr* Beat*
//!        <──────── Exit | Failed          last frame, then close
//! ```

use std::io::{self, Read, Write};

/// Longest payload of a frame, in bytes. Streams are cut into pieces of at most [`CHUNK`].
pub const MAX_PAYLOAD: usize = 1 << 20;

/// How much of a stream goes into one frame, in bytes.
pub const CHUNK: usize = 64 << 10;

/// TCP port that `lab-init` listens on inside the lab machine.
pub const PORT: u16 = 1;

/// The line `lab-init` writes to the second serial port once it accepts connections.
pub const READY: &str = "lab-ready";

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// To the lab: start a command; the payload is a [`Command`].
    Exec = 1,
    /// To the lab: bytes for the command's standard input.
    Stdin = 2,
    /// To the lab: standard input ends here.
    StdinEof = 3,
    /// To the lab: the terminal's new rows and columns, 2 bytes each.
    Resize = 4,
    /// To the lab: SIGKILL the command's process group. `Exit` still follows.
    Kill = 5,
    /// To the lab, as the first frame: write everything back and power off.
    PowerOff = 6,
    /// From the lab: bytes of the command's standard output.
    Stdout = 16,
    /// From the lab: bytes of the command's standard error.
    Stderr = 17,
    /// From the lab: the command ended; the payload is an [`Exit`].
    Exit = 18,
    /// From the lab: the command could not be started; the payload is the reason as text.
    Failed = 19,
    /// From the lab: still alive. Sent every [`Command::beat_ms`].
    Beat = 20,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        const ALL: [Kind; 11] = [
            Kind::Exec,
            Kind::Stdin,
            Kind::StdinEof,
            Kind::Resize,
            Kind::Kill,
            Kind::PowerOff,
            Kind::Stdout,
            Kind::Stderr,
            Kind::Exit,
            Kind::Failed,
            Kind::Beat,
        ];
        ALL.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it carries.
    pub kind: Kind,
    /// Its bytes, at most [`MAX_PAYLOAD`].
    pub payload: Vec<u8>,
}

impl Frame {
    /// Writes a frame with one `write`, so that frames of several threads behind a lock do not mix.
    ///
    /// # Errors
    /// What the writer returned, or `InvalidInput` when `payload` is longer than [`MAX_PAYLOAD`].
    pub fn write(to: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
        let length = u32::try_from(payload.len())
            .ok()
            .filter(|_| payload.len() <= MAX_PAYLOAD)
            .ok_or_else(|| invalid(format!("frame of {} bytes, limit {MAX_PAYLOAD}", payload.len())))?;
        let mut bytes = Vec::with_capacity(5 + payload.len());
        bytes.push(kind as u8);
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(payload);
        to.write_all(&bytes)
    }

    /// Reads one frame; `None` when the other side closed between two frames.
    ///
    /// # Errors
    /// What the reader returned; `InvalidData` for an unknown kind or a payload over [`MAX_PAYLOAD`].
    pub fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut head = [0; 5];
        if from.read(&mut head[..1])? == 0 {
            return Ok(None);
        }
        from.read_exact(&mut head[1..])?;
        let kind =
            Kind::from_byte(head[0]).ok_or_else(|| invalid(format!("frame of unknown kind {}", head[0])))?;
        let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if length > MAX_PAYLOAD {
            return Err(invalid(format!("frame of {length} bytes, limit {MAX_PAYLOAD}")));
        }
        let mut payload = vec![0; length];
        from.read_exact(&mut payload)?;
        Ok(Some(Self { kind, payload }))
    }
}

/// A command to run in the lab as root.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Command {
    /// Program (looked up in the lab's `PATH`) and arguments; at least the program.
    pub argv: Vec<String>,
    /// `NAME=value`, on top of the lab's own environment.
    pub env: Vec<String>,
    /// Working directory; `/root` when empty.
    pub cwd: String,
    /// Rows and columns when the command gets a terminal.
    pub terminal: Option<(u16, u16)>,
    /// Milliseconds between two `Beat` frames, 0 for none (exact time: a beat would be work for the guest).
    pub beat_ms: u32,
}

impl Command {
    /// The bytes of an `Exec` frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_list(&mut out, &self.argv);
        put_list(&mut out, &self.env);
        put_text(&mut out, &self.cwd);
        let (rows, columns) = self.terminal.unwrap_or((0, 0));
        out.push(u8::from(self.terminal.is_some()));
        out.extend_from_slice(&rows.to_le_bytes());
        out.extend_from_slice(&columns.to_le_bytes());
        out.extend_from_slice(&self.beat_ms.to_le_bytes());
        out
    }

    /// Reads what [`Command::encode`] wrote.
    ///
    /// # Errors
    /// `InvalidData` when the bytes end early, do not stop where they should, or name no program.
    pub fn decode(mut bytes: &[u8]) -> io::Result<Self> {
        let from = &mut bytes;
        let argv = take_list(from)?;
        let env = take_list(from)?;
        let cwd = take_text(from)?;
        let has_terminal = take::<1>(from)?[0] != 0;
        let rows = u16::from_le_bytes(take(from)?);
        let columns = u16::from_le_bytes(take(from)?);
        let beat_ms = u32::from_le_bytes(take(from)?);
        if !bytes.is_empty() || argv.is_empty() {
            return Err(invalid("command with no program or with bytes left over".into()));
        }
        Ok(Self { argv, env, cwd, terminal: has_terminal.then_some((rows, columns)), beat_ms })
    }
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It returned this code.
    Code(u8),
    /// This signal ended it.
    Signal(u8),
}

impl Exit {
    /// The code as a shell shows it: 128 + signal for a killed command.
    #[must_use]
    pub fn shell_code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128_u8.saturating_add(signal),
        }
    }

    /// The bytes of an `Exit` frame.
    #[must_use]
    pub fn encode(self) -> [u8; 2] {
        match self {
            Self::Code(code) => [0, code],
            Self::Signal(signal) => [1, signal],
        }
    }

    /// Reads what [`Exit::encode`] wrote.
    ///
    /// # Errors
    /// `InvalidData` for anything else.
    pub fn decode(bytes: &[u8]) -> io::Result<Self> {
        match bytes {
            [0, code] => Ok(Self::Code(*code)),
            [1, signal] => Ok(Self::Signal(*signal)),
            _ => Err(invalid(format!("exit of {} bytes, expected 2", bytes.len()))),
        }
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    let length = u32::try_from(text.len()).expect("command line texts are far below 4 GiB");
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_list(out: &mut Vec<u8>, list: &[String]) {
    let length = u32::try_from(list.len()).expect("command lines have far below 2^32 words");
    out.extend_from_slice(&length.to_le_bytes());
    for text in list {
        put_text(out, text);
    }
}

fn take<const N: usize>(from: &mut &[u8]) -> io::Result<[u8; N]> {
    let (head, rest) = from.split_first_chunk::<N>().ok_or_else(|| invalid("command ends early".into()))?;
    *from = rest;
    Ok(*head)
}

fn take_text(from: &mut &[u8]) -> io::Result<String> {
    let length = u32::from_le_bytes(take(from)?) as usize;
    let (head, rest) = from.split_at_checked(length).ok_or_else(|| invalid("command ends early".into()))?;
    *from = rest;
    String::from_utf8(head.to_vec()).map_err(|_| invalid("command is not UTF-8".into()))
}

fn take_list(from: &mut &[u8]) -> io::Result<Vec<String>> {
    let count = u32::from_le_bytes(take(from)?);
    (0..count).map(|_| take_text(from)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Command {
        Command {
            argv: vec!["echo".into(), "ä b".into(), String::new()],
            env: vec!["A=1".into()],
            cwd: "/tmp".into(),
            terminal: Some((24, 80)),
            beat_ms: 2000,
        }
    }

    #[test]
    fn command_survives_the_wire() {
        assert_eq!(Command::decode(&sample().encode()).unwrap(), sample());
    }

    #[test]
    fn command_cut_anywhere_is_refused() {
        let bytes = sample().encode();
        for length in 0..bytes.len() {
            assert!(
                Command::decode(&bytes[..length]).is_err(),
                "{length} of {} bytes were accepted",
                bytes.len()
            );
        }
    }

    #[test]
    fn frames_come_back_in_order_and_then_none() {
        let mut wire = Vec::new();
        Frame::write(&mut wire, Kind::Stdout, b"abc").unwrap();
        Frame::write(&mut wire, Kind::Exit, &Exit::Signal(9).encode()).unwrap();
        let mut from = wire.as_slice();
        assert_eq!(Frame::read(&mut from).unwrap().unwrap().payload, b"abc");
        let exit = Frame::read(&mut from).unwrap().unwrap();
        assert_eq!(Exit::decode(&exit.payload).unwrap().shell_code(), 137);
        assert_eq!(Frame::read(&mut from).unwrap(), None);
    }

    #[test]
    fn oversized_and_unknown_frames_are_refused() {
        assert!(Frame::write(&mut Vec::new(), Kind::Stdin, &vec![0; MAX_PAYLOAD + 1]).is_err());
        assert!(Frame::read(&mut [2, 0xff, 0xff, 0xff, 0xff].as_slice()).is_err());
        assert!(Frame::read(&mut [99, 0, 0, 0, 0].as_slice()).is_err());
        assert!(Frame::read(&mut [2, 4, 0].as_slice()).is_err());
    }
}
