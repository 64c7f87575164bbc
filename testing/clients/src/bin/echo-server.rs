//! `echo-server PORT`: sends every byte back.
fn main() -> std::process::ExitCode {
    unbroken_clients::serve::main(unbroken_clients::serve::Kind::Echo)
}
