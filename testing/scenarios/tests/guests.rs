//! One guest a kind of kernel object (testing/guests): it sets its objects up, is moved to the
//! replica by a kill, and then moved again, to a replica of the replica.

mod guest;

use anyhow::Result;
use guest::{Guest, moved, moved_with};

/// A test of its own for each guest, so that they have names and run in parallel.
macro_rules! guests {
    ($($test:ident: $program:literal,)*) => {
        $(
            #[test]
            fn $test() -> Result<()> {
                moved($program)
            }
        )*
    };
}

guests! {
    files_keep_position_flags_and_locks: "file",
    a_directory_is_read_on: "directory",
    files_are_the_same_whatever_becomes_of_their_names: "renamed",
    files_without_names_are_replicated: "unnamed",
    the_places_and_the_program_may_be_renamed_and_replaced: "places",
    devices_are_what_they_were: "device",
    duplicates_share_what_they_shared: "dup",
    pipes_keep_content_borders_and_who_waits: "pipe",
    fifos_keep_content_and_who_waits: "fifo",
    event_counters_keep_their_counts: "eventfd",
    timer_descriptors_keep_their_deadlines: "timerfd",
    signal_descriptors_keep_what_waits: "signalfd",
    epoll_sets_report_the_same: "epoll",
    memory_is_what_it_was_page_by_page: "memory",
    the_heap_ends_where_it_ended: "heap",
    stacks_keep_every_frame: "stack",
    mapped_files_are_still_mapped: "mapped_file",
    shared_memory_is_still_shared: "shared_memory",
    signal_actions_and_stacks_are_in_force: "signals",
    pending_signals_wait_in_order: "pending",
    timers_fire_when_they_should: "timers",
    clocks_never_go_back: "clock",
    vector_registers_hold_their_values: "vector",
    threads_are_who_they_were: "threads",
    a_process_is_what_it_was: "process",
    what_is_denied_stays_denied: "denied",
    datagrams_wait_to_be_read: "udp",
    an_alarm_that_repeats_goes_on: "periodic_alarm",
    a_stack_that_disarms_itself_does_so_still: "disarmed_stack",
    all_that_can_be_set_is_as_it_was_set: "attributes",
}

#[test]
fn a_service_without_rights_gets_none() -> Result<()> {
    moved_with("credentials", &["--user", "nobody"])
}

/// Signals that `run` was started with as ignored or blocked are so in every replica.
#[test]
fn what_run_was_started_with_stays_in_force() -> Result<()> {
    let starter = ["env", "--ignore-signal=HUP", "--block-signal=USR2"];
    let mut guest = Guest::start_with("attributes", |launch| launch.started_by(&starter))?;
    guest.set_up_and_check()?;
    guest.tell("inherited")?;
    guest.stop()
}

/// What one takeover loses or doubles of a fast timer may hide in what a check allows; ten add up.
#[test]
fn no_expiration_is_lost_in_ten_moves() -> Result<()> {
    let mut guest = Guest::start("timerfd", &[])?;
    guest.tell("set up")?;
    for _ in 0..10 {
        guest.move_on()?;
        guest.tell("check")?;
    }
    guest.stop()
}

/// An epoch that is larger than the journal goes in parts. The primary dies with some of them sent:
/// the replica is what it was before them (I2).
#[test]
fn half_an_epoch_is_never_applied() -> Result<()> {
    let mut guest = Guest::start("large", &[])?;
    guest.tell("set up")?;
    guest.tell("check")?;
    guest.tell_while_the_primary_dies("check")?;
    guest.tell("check")?;
    guest.stop()
}

/// A fill that waits for its standby keeps an ear on the service: a signal, or a new thread, would
/// else stop it until the standby has made room or is given up.
#[test]
fn a_fill_that_waits_does_not_stop_the_service() -> Result<()> {
    let mut guest = Guest::start("large", &[])?;
    guest.tell("set up")?;
    guest.tell("check")?;
    guest.tell_while_a_fill_waits("check")?;
    guest.tell("check")?;
    guest.stop()
}

/// Room for all of a fill is no reason to complete it: output would wait from then on for a standby
/// that has taken nothing yet.
#[test]
fn a_fill_is_not_completed_before_the_standby_has_taken_it() -> Result<()> {
    let mut guest = Guest::start("large", &[])?;
    guest.tell("set up")?;
    guest.tell("halve")?;
    guest.tell("check")?;
    guest.tell_while_a_fill_waits("check")?;
    guest.tell("check")?;
    guest.stop()
}

/// Output waits for a standby that has all it needs, and not for ever: one that hangs then is
/// given up, and clients are answered.
#[test]
fn a_standby_that_never_gets_ready_is_given_up() -> Result<()> {
    let mut guest = Guest::start("large", &[])?;
    guest.tell("set up")?;
    guest.tell("halve")?;
    guest.tell("write on")?;
    guest.tell_while_the_standby_hangs("enough")?;
    guest.tell("check")?;
    guest.stop()
}

/// A guest that no test starts proves nothing.
#[test]
fn every_guest_has_a_test() -> Result<()> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let tests = [
        include_str!("guests.rs"),
        include_str!("guest/announced.rs"),
        include_str!("guest/background.rs"),
        include_str!("guest/bounds.rs"),
        include_str!("guest/network.rs"),
        include_str!("guest/passing.rs"),
        include_str!("guest/text.rs"),
    ]
    .concat();
    for entry in std::fs::read_dir(root.join("../guests/src/bin"))? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let quoted = format!("\"{name}\"");
        anyhow::ensure!(tests.contains(&quoted), "no test starts the guest {name}");
    }
    Ok(())
}
