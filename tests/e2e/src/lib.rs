//! End-to-end tests: what runs in the lab machine, and the import-edge test.
