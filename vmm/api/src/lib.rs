//! What the shim and the VMM say to each other.
