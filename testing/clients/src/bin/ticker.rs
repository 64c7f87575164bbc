//! `ticker COUNT`: prints COUNT numbered lines to standard output, every tenth to standard error
//! too, one each 10 ms, and ends with exit code 5.
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

fn main() -> ExitCode {
    let count: u64 = std::env::args()
        .nth(1)
        .and_then(|text| text.parse().ok())
        .unwrap_or(100);
    for number in 0..count {
        // One write a line and a flush: what was printed before a kill is exact.
        let mut line = format!("line {number}\n");
        if std::io::stdout().write_all(line.as_bytes()).is_err() {
            return ExitCode::FAILURE;
        }
        if number % 10 == 0 {
            line.insert_str(0, "error ");
            if std::io::stderr().write_all(line.as_bytes()).is_err() {
                return ExitCode::FAILURE;
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    ExitCode::from(5)
}
