//! Generates the messages and the service of `proto/snapshots.proto` into `OUT_DIR`.

fn main() -> std::io::Result<()> {
    tonic_prost_build::configure().compile_protos(&["proto/snapshots.proto"], &["proto"])
}
