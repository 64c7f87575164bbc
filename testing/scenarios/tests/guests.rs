//! One guest a kind of kernel object (testing/guests): it sets its objects up, is moved to the
//! replica by a kill, and then moved again, to a replica of the replica.

mod guest;

use anyhow::Result;
use guest::moved_twice;

/// A test of its own for each guest, so that they have names and run in parallel.
macro_rules! guests {
    ($($test:ident: $program:literal,)*) => {
        $(
            #[test]
            fn $test() -> Result<()> {
                moved_twice($program)
            }
        )*
    };
}

guests! {
    files_keep_position_flags_and_locks: "file",
    a_directory_is_read_on: "directory",
    devices_are_what_they_were: "device",
    duplicates_share_what_they_shared: "dup",
    pipes_keep_content_borders_and_who_waits: "pipe",
    event_counters_keep_their_counts: "eventfd",
    timer_descriptors_keep_their_deadlines: "timerfd",
    signal_descriptors_keep_what_waits: "signalfd",
    epoll_sets_report_the_same: "epoll",
}
