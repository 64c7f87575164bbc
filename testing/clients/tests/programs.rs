//! The small servers as programs. That this test exists also makes `cargo test` build them, which
//! the scenario suite needs.

use std::process::Command;

#[test]
fn a_server_without_a_port_says_what_it_needs() {
    for program in [
        env!("CARGO_BIN_EXE_echo-server"),
        env!("CARGO_BIN_EXE_churn-server"),
        env!("CARGO_BIN_EXE_bulk-server"),
    ] {
        let output = Command::new(program).output().expect("the server starts");
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains("port"));
    }
}

#[test]
fn the_ticker_prints_each_line_once() {
    let output = Command::new(env!("CARGO_BIN_EXE_ticker"))
        .arg("11")
        .output()
        .expect("it starts");
    let printed = String::from_utf8_lossy(&output.stdout);
    let expected: String = (0..11).map(|number| format!("line {number}\n")).collect();
    assert_eq!(printed, expected);
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "error line 0\nerror line 10\n"
    );
    assert_eq!(output.status.code(), Some(5));
}
