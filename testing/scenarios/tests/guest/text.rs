//! Guests whose text changes. It is left out of the looks at memory, so each test is of one way by
//! which it can change all the same, with an epoch at every place between the steps: an answer is
//! heard only when its epoch is safe.

use anyhow::{Context, Result};

use super::Guest;

/// What is told, one line an epoch. After each row the guest is moved.
const ROWS: [&[&str]; 12] = [
    &["open write close"],
    &["open", "write", "close"],
    &["open write", "close"],
    &["open", "write close"],
    // Moved while it is open, and closed by the replica.
    &["open", "write"],
    &["write", "close"],
    &[
        "open write close",
        "open write close",
        "open",
        "write",
        "write close",
    ],
    // Copied there by the kernel, which keeps to the protection of pages.
    &["overreach"],
    &["open copy close"],
    &["open", "copy", "close"],
    &["open copy", "close", "overreach"],
    &["open", "copy"],
];

#[test]
fn text_that_is_opened_to_be_written_is_what_was_written() -> Result<()> {
    let mut guest = Guest::start("text", &[])?;
    guest.tell("set up")?;
    for row in ROWS {
        for words in row {
            guest.tell(words).with_context(|| format!("in {row:?}"))?;
        }
        guest.move_on()?;
        guest
            .tell("check")
            .with_context(|| format!("after {row:?}"))?;
    }
    guest.stop()
}

/// Nobody in the service may trace another; what a child does otherwise is there when protection is
/// back.
#[test]
fn what_a_child_writes_to_its_parent_is_there() -> Result<()> {
    let mut guest = Guest::start("text", &[])?;
    guest.tell("set up")?;
    for words in ["open child", "child close", "open child close"] {
        guest.tell(words)?;
        guest.wait_protected()?;
        guest.move_on()?;
        guest
            .tell("check")
            .with_context(|| format!("after {words:?}"))?;
    }
    guest.stop()
}

#[test]
fn text_that_is_written_through_a_file_is_what_was_written() -> Result<()> {
    let mut guest = Guest::start("own_memory", &[])?;
    guest.tell("set up")?;
    for _ in 0..3 {
        guest.tell("write")?;
        guest.move_on()?;
        guest.tell("check")?;
    }
    guest.stop()
}

/// The file of its own memory that a replica is given is of the replica's own memory.
#[test]
fn the_own_memory_that_is_held_as_a_file_stays_the_own() -> Result<()> {
    let mut guest = Guest::start("own_memory", &[])?;
    guest.tell("set up")?;
    for hold in ["hold", "hold by a thread"] {
        guest.tell(hold)?;
        guest.wait_protected()?;
        for words in ["write held", "point"] {
            guest.tell(words)?;
            guest.move_on()?;
            guest
                .tell("check")
                .with_context(|| format!("{hold}: {words}"))?;
            guest.tell("read held")?;
        }
        guest.tell("write there")?;
        guest.tell("check")?;
        guest.move_on()?;
        guest.tell("check")?;
        guest.tell("let go")?;
        guest.tell("write")?;
        guest.move_on()?;
        guest.tell("check")?;
    }
    guest.stop()
}

/// The kernel's code in every process can be written to like any text, and a replica has its own.
#[test]
fn a_vdso_that_was_written_to_hinders_protection() -> Result<()> {
    let mut guest = Guest::start("own_memory", &[])?;
    guest.tell("set up")?;
    guest.tell("write to the vdso")?;
    guest.wait_unprotected("vDSO")?;
    guest.tell("renew the vdso")?;
    guest.wait_protected()?;
    guest.move_on()?;
    guest.tell("check")?;
    guest.stop()
}

/// What a replica could not open again is said, while it lasts (I6).
#[test]
fn files_of_processes_and_threads_that_end_hinder_protection() -> Result<()> {
    let mut guest = Guest::start("own_memory", &[])?;
    guest.tell("set up")?;
    for (hold, reason) in [
        ("hold memory of a child", "memory of another process"),
        ("hold state of a child", "has ended"),
        ("hold state of a thread", "has ended"),
    ] {
        guest.tell(hold)?;
        guest.wait_unprotected(reason).context(hold)?;
        guest.tell("let go")?;
        guest.wait_protected().context(hold)?;
        guest.move_on()?;
        guest
            .tell("check")
            .with_context(|| format!("after {hold:?}"))?;
    }
    // As long as the thread lives, so does its file.
    guest.tell("hold state of a living thread")?;
    for _ in 0..2 {
        guest.move_on()?;
        guest.tell("read state")?;
    }
    guest.tell("end the thread")?;
    guest.wait_unprotected("has ended")?;
    guest.tell("let go")?;
    guest.wait_protected()?;
    guest.stop()
}
