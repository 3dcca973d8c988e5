//! What the shim and the guest agent say to each other.
