//! containerd shim v2 and the operator's command line.
