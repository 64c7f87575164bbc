//! Whatever is kept between two epochs has a bound, and what comes beyond it is as exact: guests with
//! all bounds so small that they are passed again and again.

use anyhow::Result;

use super::Guest;

/// Guests that change much, in every way that is followed.
const GUESTS: [&str; 8] = [
    "overflow",
    "dup",
    "epoll",
    "file",
    "heap",
    "memory",
    "shared_memory",
    "signals",
];

#[test]
fn more_than_is_kept_is_exact() -> Result<()> {
    let mut guest = Guest::start("overflow", &[])?;
    guest.set_up_and_check()?;
    for _ in 0..3 {
        // A takeover in the middle of it.
        guest.tell_through_kills("change", 1)?;
        guest.tell("check")?;
    }
    guest.stop()
}

#[test]
fn guests_are_exact_within_small_bounds() -> Result<()> {
    for program in GUESTS {
        Guest::start_with(program, unbroken_harness::Launch::within_small_bounds)?
            .go_through_all()?;
    }
    Ok(())
}

/// An epoch that is larger than the journal, and input that waits for room in its log.
#[test]
fn a_large_epoch_is_exact_within_small_bounds() -> Result<()> {
    let how = unbroken_harness::Launch::within_small_bounds;
    let mut guest = Guest::start_with("large", how)?;
    guest.tell("set up")?;
    for _ in 0..2 {
        guest.tell("check")?;
        guest.move_on()?;
    }
    guest.tell("check")?;
    guest.stop()
}
