//! Servers that put themselves in the background: the process that was started has ended, and
//! another one serves. It is who it was in every replica, and `unbroken run` means it.

use anyhow::{Context, Result, ensure};
use unbroken_harness::{Ended, Signal};

use super::Guest;

/// A way to leave, through deaths of the server and of ours; then a signal that was sent to `run`,
/// and the last word.
fn left(way: &str) -> Result<()> {
    let mut guest = Guest::start_as("background", &[way], &[])?;
    guest.set_up_and_check()?;
    guest.outlive_primaries()?;
    guest.tell("check")?;
    guest.signal(Signal::SIGUSR1)?;
    guest.tell("signalled")?;
    let ended = guest.end_by("exit 7")?;
    ensure!(ended == Ended::Exit(7), "{ended:?}");
    Ok(())
}

#[test]
fn a_server_that_forked_once_is_protected() -> Result<()> {
    left("once")
}

/// It stays in the session and the group of the process that has ended.
#[test]
fn a_server_that_forked_and_opened_no_session_is_protected() -> Result<()> {
    left("same-session")
}

/// Its session is that of a process in between, which has ended, too.
#[test]
fn a_server_that_forked_twice_is_protected() -> Result<()> {
    left("twice")
}

/// The session of one process that has ended, the group of another.
#[test]
fn a_server_in_the_group_of_one_that_ended_is_protected() -> Result<()> {
    left("other-group")
}

/// Both of processes that have ended, and neither of the first.
#[test]
fn a_server_that_forked_thrice_is_protected() -> Result<()> {
    left("thrice")
}

/// The first process has ended before anybody else does anything.
#[test]
fn a_server_whose_first_process_did_not_wait_is_protected() -> Result<()> {
    left("at-once")
}

#[test]
fn a_server_with_a_high_number_is_protected() -> Result<()> {
    left("high")
}

/// It is protected, moved, and leaves its first process only then, which takes its time to end.
#[test]
fn a_server_that_goes_to_the_background_late_is_protected_again() -> Result<()> {
    let mut guest = Guest::start_as("background", &["stay"], &[])?;
    guest.set_up_and_check()?;
    for round in 0..3 {
        guest.tell("leave")?;
        guest.wait_unprotected("2 processes")?;
        guest.wait_protected()?;
        guest
            .tell("check")
            .with_context(|| format!("round {round}"))?;
        guest.move_on()?;
        guest
            .tell("check")
            .with_context(|| format!("round {round}"))?;
    }
    let ended = guest.end_by("exit 0")?;
    ensure!(ended == Ended::Exit(0), "{ended:?}");
    Ok(())
}

/// The service is the whole tree: that its first process failed says nothing while another serves.
#[test]
fn a_first_process_that_fails_does_not_end_the_service() -> Result<()> {
    let mut guest = Guest::start_as("background", &["fail"], &[])?;
    guest.set_up_and_check()?;
    let ended = guest.end_by("exit 0")?;
    ensure!(ended == Ended::Exit(0), "{ended:?}");
    Ok(())
}

/// A request to stop reaches whoever serves, also when that is no longer the one that was asked.
#[test]
fn a_server_that_leaves_while_it_is_stopped_is_stopped() -> Result<()> {
    let mut guest = Guest::start_as("background", &["stay"], &[])?;
    guest.tell("set up")?;
    guest.tell("leave when asked to end")?;
    let ended = guest.end_by_stop()?;
    // 128 + SIGTERM: it was not killed for lack of an answer.
    ensure!(ended == Ended::Exit(143), "{ended:?}");
    Ok(())
}
