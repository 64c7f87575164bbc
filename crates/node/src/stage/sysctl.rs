//! Network settings of a stage. `/proc/sys/net` shows the network namespace of the thread that
//! opens a file there (net/sysctl_net.c), so these act on the caller's.

use super::error::Error;
use std::fs;
use std::path::Path;

/// What every stage sets, below `/proc/sys/net/ipv4`, and why.
const IPV4: &[(&str, &str)] = &[
    // Connections that no application has accepted are rebuilt from their packets: the listener
    // of the replica answers with the same cookie.
    ("tcp_syncookies", "2"),
    ("tcp_timestamps", "1"),
    ("tcp_tw_reuse", "1"),
    // No more than the wire remembers, whose limit counts up to three entries a connection.
    ("tcp_max_tw_buckets", "65536"),
    // What an epoch can have to carry for one connection.
    ("tcp_rmem", "4096 131072 2097152"),
    ("tcp_wmem", "4096 16384 1048576"),
    // Data inside a SYN has no place in a connection that is rebuilt from packets.
    ("tcp_fastopen", "0"),
    ("tcp_mtu_probing", "0"),
    // Metrics of the primary's kernel must not steer a replica, nor the reverse.
    ("tcp_no_metrics_save", "1"),
];

/// What a service expects to be as on the host; a new namespace starts with the kernel's defaults.
const AS_ON_THE_HOST: &[&str] = &[
    "core/somaxconn",
    "ipv4/ip_local_port_range",
    "ipv4/ip_unprivileged_port_start",
    "ipv4/ping_group_range",
    "ipv4/tcp_ecn",
    "ipv4/tcp_fin_timeout",
    "ipv4/tcp_keepalive_intvl",
    "ipv4/tcp_keepalive_probes",
    "ipv4/tcp_keepalive_time",
    "ipv4/tcp_max_syn_backlog",
    "ipv4/tcp_retries2",
    "ipv4/tcp_syn_retries",
    "ipv6/bindv6only",
];

/// Settings of the host, read before the thread leaves its network namespace.
pub(super) struct HostSettings(Vec<(&'static str, String)>);

impl HostSettings {
    pub(super) fn read() -> HostSettings {
        let value = |name: &&'static str| {
            let text = fs::read_to_string(Path::new("/proc/sys/net").join(name)).ok()?;
            Some((*name, text.trim().to_owned()))
        };
        HostSettings(AS_ON_THE_HOST.iter().filter_map(value).collect())
    }

    /// Sets up the namespace of the calling thread.
    pub(super) fn apply(&self) -> Result<(), Error> {
        for (name, value) in &self.0 {
            write(&format!("net/{name}"), value)?;
        }
        for (name, value) in IPV4 {
            write(&format!("net/ipv4/{name}"), value)?;
        }
        // A pacing congestion control (BBR) sends by timers of its own, which no look at a quiet
        // socket would show. Reno is always there.
        write("net/ipv4/tcp_congestion_control", "cubic")
            .or_else(|_| write("net/ipv4/tcp_congestion_control", "reno"))
    }
}

/// Writes one setting, named by its path below `/proc/sys`.
pub(super) fn write(name: &str, value: &str) -> Result<(), Error> {
    fs::write(Path::new("/proc/sys").join(name), value).map_err(Error::during(format!(
        "set {} to {value}",
        name.replace('/', ".")
    )))
}
