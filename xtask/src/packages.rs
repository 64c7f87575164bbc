//! The Debian packages that a task needs: looked for by the program they bring, installed when
//! missing.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::tools::succeeds;

/// A program and the Debian package that brings it.
#[derive(Debug, Clone, Copy)]
pub struct Package {
    pub program: &'static str,
    pub name: &'static str,
}

pub const IPROUTE: Package = Package {
    program: "ip",
    name: "iproute2",
};
pub const NFTABLES: Package = Package {
    program: "nft",
    name: "nftables",
};
pub const NGIRCD: Package = Package {
    program: "ngircd",
    name: "ngircd",
};
pub const ICECAST: Package = Package {
    program: "icecast2",
    name: "icecast2",
};
pub const REDIS: Package = Package {
    program: "redis-server",
    name: "redis-server",
};

pub const REDIS_TOOLS: Package = Package {
    program: "redis-benchmark",
    name: "redis-tools",
};
pub const MEMCACHED: Package = Package {
    program: "memcached",
    name: "memcached",
};
pub const NGINX: Package = Package {
    program: "nginx",
    name: "nginx-light",
};
pub const WRK: Package = Package {
    program: "wrk",
    name: "wrk",
};

const PLACES: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];

/// Installs those of `packages` whose programs are missing, and says which.
pub fn install_missing(packages: &[Package]) -> Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .filter(|package| !is_there(package))
        .map(|package| package.name)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let line = missing.join(" ");
    println!("installing Debian packages: {line}");
    let run = |arguments: &[&str]| {
        let mut apt = Command::new("apt-get");
        apt.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
        succeeds(&mut apt).with_context(|| format!("please install {line} by hand"))
    };
    if !run(&["update", "--quiet"])? {
        bail!("apt-get update failed: see above; needed are {line}");
    }
    let mut install = vec!["install", "--yes", "--quiet", "--no-install-recommends"];
    install.extend(&missing);
    if !run(&install)? {
        bail!("apt-get install failed: see above; needed are {line}");
    }
    match packages.iter().find(|package| !is_there(package)) {
        Some(package) => bail!(
            "{} is installed but brings no {}",
            package.name,
            package.program
        ),
        None => Ok(()),
    }
}

fn is_there(package: &Package) -> bool {
    PLACES
        .iter()
        .any(|place| Path::new(place).join(package.program).exists())
}
