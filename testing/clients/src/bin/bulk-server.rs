//! `bulk-server PORT`: sends streams and checks streams.
fn main() -> std::process::ExitCode {
    unbroken_clients::serve::main(unbroken_clients::serve::Kind::Bulk)
}
