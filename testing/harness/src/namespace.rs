//! A network namespace of the calling thread's own, which plays the host.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};

/// Settings that let clients that connect and close all the time reuse their ports: without them
/// the client side runs out of ports (TIME_WAIT lasts a minute), which is no fault of the server.
const SETTINGS: [(&str, &str); 3] = [
    ("net/ipv4/ip_local_port_range", "10000 65000"),
    ("net/ipv4/tcp_tw_reuse", "1"),
    ("net/ipv4/ip_forward", "1"),
];

/// Moves the calling thread into a new network namespace with its loopback up. Threads and
/// processes that it starts from now on live there too; the namespace goes with the last of them.
pub fn enter_new() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)
        .context("cannot make a network namespace: run the tests as root")?;
    ip(&["link", "set", "lo", "up"])?;
    for (name, value) in SETTINGS {
        let file = Path::new("/proc/sys").join(name);
        std::fs::write(&file, value).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

/// Runs `ip` in the calling thread's namespace and returns what it printed.
pub fn ip(arguments: &[&str]) -> Result<String> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .context("cannot run ip: run `apt-get install iproute2`")?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr).trim().to_string();
        bail!("ip {}: {why}", arguments.join(" "));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What a protected service may have left in this namespace: devices, routes, packet filters.
pub fn residue() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for line in ip(&["-o", "link", "show"])?.lines() {
        let name = line.split(": ").nth(1).unwrap_or(line);
        // Kernels create these tunnel devices in every new namespace by themselves.
        let born_here = [
            "lo", "sit0", "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6tnl0",
        ];
        if !born_here.contains(&name.split('@').next().unwrap_or(name)) {
            found.push(format!("device {name}"));
        }
    }
    for family in ["-4", "-6"] {
        let routes = ip(&[family, "route", "show", "table", "all"])?;
        let foreign = routes.lines().filter(|line| !line.contains("dev lo"));
        found.extend(foreign.map(|line| format!("route {}", line.trim())));
    }
    if let Ok(output) = Command::new("nft").args(["list", "tables"]).output() {
        let tables = String::from_utf8_lossy(&output.stdout).into_owned();
        found.extend(tables.lines().map(|line| format!("nftables {line}")));
    }
    Ok(found)
}
