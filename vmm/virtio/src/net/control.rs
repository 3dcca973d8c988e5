//! Commands of the control queue (virtio 1.2, 5.1.6.5).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use zerocopy::little_endian::U16;

use crate::queue::{Reader, Writer};
use crate::rate::GUEST_ERRORS;

/// A command that is not carried out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum CommandError {
    #[error("command of {0} bytes")]
    Short(usize),
    #[error("command {command} of class {class}")]
    Unknown { class: u8, command: u8 },
    #[error("{pairs} queue pairs, must be 1 to {max}")]
    Pairs { pairs: u16, max: u16 },
}

/// What a driver asked for, or `None` if it makes no sense; up to `max` pairs can be used.
pub fn pairs_set(command: Reader<'_>, max: u16) -> Option<u16> {
    parse(command, max).inspect_err(|e| GUEST_ERRORS.warn(format_args!("net: control queue: {e}"))).ok()
}

/// Writes the status of a command. False if there is no room for it.
pub fn answer(room: &mut Writer<'_>, done: bool) -> bool {
    let status = u8::try_from(if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR }).expect("0 or 1");
    room.write_obj(&status).is_ok()
}

fn parse(mut command: Reader<'_>, max: u16) -> Result<u16, CommandError> {
    let len = command.left();
    let short = |_| CommandError::Short(len);
    let [class, number]: [u8; 2] = command.read_obj().map_err(short)?;
    if (u32::from(class), u32::from(number)) != (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) {
        return Err(CommandError::Unknown { class, command: number });
    }
    match command.read_obj::<U16>().map_err(short)?.get() {
        pairs if (1..=max).contains(&pairs) => Ok(pairs),
        pairs => Err(CommandError::Pairs { pairs, max }),
    }
}
