//! Every number the README quotes.
