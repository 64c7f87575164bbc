//! What the kernel knows about a service; asked only when somebody looks, so it costs the service
//! nothing.

use std::fs;

/// Connections of the service's network namespace that a client can see: established, and those
/// that one side has closed. Unix sockets and loopback inside the service count only when TCP.
pub(super) fn connections(pids: &[i32]) -> u64 {
    // All processes of a service share one network namespace: any live one will do.
    let tables = |pid: &i32| {
        let read = |file| fs::read_to_string(format!("/proc/{pid}/net/{file}")).ok();
        read("tcp").map(|ipv4| ipv4 + &read("tcp6").unwrap_or_default())
    };
    pids.iter()
        .find_map(tables)
        .map_or(0, |table| count_connections(&table))
}

/// Counts the lines of /proc/net/tcp whose state is one of a connection (proc(5);
/// include/net/tcp_states.h): ESTABLISHED 01, FIN_WAIT1 04, FIN_WAIT2 05, CLOSE_WAIT 08,
/// LAST_ACK 09, CLOSING 0B.
fn count_connections(table: &str) -> u64 {
    let is_connection = |line: &&str| {
        let state = line.split_whitespace().nth(3);
        matches!(state, Some("01" | "04" | "05" | "08" | "09" | "0B"))
    };
    table.lines().filter(is_connection).count() as u64
}

/// Resident memory of all processes together; what they share counts once for each.
pub(super) fn resident_bytes(pids: &[i32]) -> u64 {
    let resident_kib = |pid: &i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        parse_resident_kib(&status)
    };
    pids.iter().filter_map(resident_kib).sum::<u64>() * 1024
}

fn parse_resident_kib(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line?.trim().strip_suffix(" kB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_of_connections() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue\n   \
                     0: 0100007F:1A0B 00000000:0000 0A 00000000:00000000\n   \
                     1: 0100007F:1A0B 0100007F:9C40 01 00000000:00000000\n   \
                     2: 0100007F:1A0B 0100007F:9C41 08 00000000:00000000\n   \
                     3: 0100007F:1A0B 0100007F:9C42 06 00000000:00000000\n";
        assert_eq!(count_connections(table), 2);
    }

    #[test]
    fn resident_memory() {
        assert_eq!(
            parse_resident_kib("Name:\tx\nVmRSS:\t    1234 kB\n"),
            Some(1234)
        );
        assert_eq!(parse_resident_kib("Name:\tkthread\n"), None);
        assert!(resident_bytes(&[std::process::id().cast_signed()]) > 0);
    }

    #[test]
    fn fuzz_tables_of_the_kernel() {
        let samples = [
            "  sl  local_address rem_address   st\n   0: 0100007F:1A0B 00000000:0000 0A 0\n",
            "Name:\tx\nVmRSS:\t    1234 kB\n",
        ];
        unbroken_fuzz::text("net-tcp", &samples, |text| {
            let _ = count_connections(text);
            let _ = parse_resident_kib(text);
        });
    }
}
