//! That this test exists also makes `cargo test` build the guests, which the scenario suite needs.

use std::process::Command;

#[test]
fn a_guest_without_a_port_says_what_it_needs() {
    let output = Command::new(env!("CARGO_BIN_EXE_denied"))
        .output()
        .expect("the guest starts");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("port"));
}
