//! virtio 1.2 queues, MMIO transport and devices; knows no KVM.
