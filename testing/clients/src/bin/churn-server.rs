//! `churn-server PORT`: answers one line and closes first or last, as the line asks.
fn main() -> std::process::ExitCode {
    unbroken_clients::serve::main(unbroken_clients::serve::Kind::Churn)
}
