//! Three network namespaces on threads of their own: a client and two places for the service, of
//! which one at a time is reachable. Everything ends with the threads.
#![allow(dead_code)]

pub mod connection;
pub mod packet;

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use unbroken_sys::namespace::{Namespaces, unshare};

type Work = Box<dyn FnOnce() + Send>;

/// A thread in a network namespace of its own that runs closures.
pub struct Place {
    work: Option<mpsc::Sender<Work>>,
    thread: Option<thread::JoinHandle<()>>,
    tid: u32,
}

impl Place {
    pub fn new() -> Self {
        let (work, inbox) = mpsc::channel::<Work>();
        let (ready, tid) = mpsc::channel();
        let thread = thread::spawn(move || {
            unshare(Namespaces::NETWORK).expect("unshare needs root");
            let link = std::fs::read_link("/proc/thread-self").unwrap();
            let tid: u32 = link.file_name().unwrap().to_str().unwrap().parse().unwrap();
            ready.send(tid).unwrap();
            for work in inbox {
                work();
            }
        });
        let tid = tid.recv().unwrap();
        let place = Self {
            work: Some(work),
            thread: Some(thread),
            tid,
        };
        place.ip(&["link set lo up"]);
        place
    }

    /// Runs `work` in the namespace and waits for its result.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        let work: Work = Box::new(move || {
            let _ = done.send(work());
        });
        self.work.as_ref().unwrap().send(work).unwrap();
        result
            .recv()
            .expect("the work on the namespace's thread panicked")
    }

    /// Runs `ip` once with these lines as its batch.
    pub fn ip(&self, lines: &[&str]) {
        let batch = lines.join("\n");
        self.run(move || {
            let path = std::env::temp_dir().join(format!(
                "unbroken-ip-{}-{:?}",
                std::process::id(),
                thread::current().id()
            ));
            std::fs::write(&path, &batch).unwrap();
            let output = Command::new("ip")
                .arg("-batch")
                .arg(&path)
                .output()
                .unwrap();
            std::fs::remove_file(&path).unwrap();
            assert!(
                output.status.success(),
                "ip: {}\n{batch}",
                String::from_utf8_lossy(&output.stderr)
            );
        });
    }

    pub fn sysctl(&self, name: &'static str, value: &'static str) {
        self.run(move || {
            let path = format!("/proc/sys/net/{}", name.replace('.', "/"));
            std::fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}"));
        });
    }
}

impl Place {
    /// The kernel makes the route to a new IPv6 address later, from a queue of its own
    /// (net/ipv6/addrconf.c, addrconf_dad_work); until then what is sent there leaves by the device.
    fn wait_for_local_route(&self, address: &'static str) {
        self.run(move || {
            let deadline = Instant::now() + Duration::from_secs(20);
            let is_there = || {
                let mut list = Command::new("ip");
                list.args(["-6", "route", "show", "table", "local", address]);
                list.output().unwrap().stdout.starts_with(b"local ")
            };
            while !is_there() {
                assert!(Instant::now() < deadline, "no route to {address}");
            }
        });
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.work.take());
        let _ = self.thread.take().unwrap().join();
    }
}

/// A client, the service's place and the replica's place. Both places have the service's
/// addresses; the client's route decides.
pub struct Net {
    pub client: Place,
    pub service: Place,
    pub replica: Place,
    is_cut: Cell<bool>,
}

pub const SERVICE_V4: &str = "10.77.0.1";
pub const SERVICE_V6: &str = "fd77::1";

impl Net {
    pub fn new() -> Self {
        let net = Self {
            client: Place::new(),
            service: Place::new(),
            replica: Place::new(),
            is_cut: Cell::new(false),
        };
        net.client.ip(&[
            &format!(
                "link add c0 type veth peer name s0 netns {}",
                net.service.tid
            ),
            &format!(
                "link add c1 type veth peer name s0 netns {}",
                net.replica.tid
            ),
            // A way to nowhere, for packets that are sent and lost.
            "link add lost type veth peer name void",
            "link add closed type bridge",
            "addr add 10.77.0.2/32 dev lo",
            "addr add fd77::2/128 dev c0 nodad",
            "addr add fd77::2/128 dev c1 nodad",
            "link set c0 up",
            "link set c1 up",
            "link set void up",
            "link set lost up",
            "neigh add 10.77.0.1 lladdr 02:00:00:00:00:01 dev lost",
            "neigh add fd77::1 lladdr 02:00:00:00:00:01 dev lost",
            "route add 10.77.0.1/32 dev c0",
            "route add fd77::1/128 dev c0",
        ]);
        for place in [&net.service, &net.replica] {
            place.ip(&[
                "addr add 10.77.0.1/32 dev s0",
                "addr add fd77::1/128 dev s0 nodad",
                "link set s0 up",
                "route add 10.77.0.2/32 dev s0",
                "route add fd77::2/128 dev s0",
            ]);
        }
        for place in [&net.client, &net.service, &net.replica] {
            place.sysctl("ipv4.conf.all.rp_filter", "0");
        }
        for place in [&net.service, &net.replica] {
            place.wait_for_local_route(SERVICE_V6);
        }
        net
    }

    /// Packets between client and service are sent and lost from now on.
    pub fn cut(&self) {
        if self.is_cut.replace(true) {
            return;
        }
        self.client.ip(&[
            // A port of a bridge that is down drops what arrives, and keeps its carrier.
            "link set c0 master closed",
            "route replace 10.77.0.1/32 dev lost",
            "route del fd77::1/128 dev c0",
            "route add fd77::1/128 dev lost",
        ]);
    }

    /// What the service sends is lost from now on; the client still reaches it.
    pub fn cut_towards_client(&self) {
        self.client.ip(&["link set c0 master closed"]);
    }

    /// After a cut, the client reaches the replica.
    pub fn connect_replica(&self) {
        self.client.ip(&[
            "route replace 10.77.0.1/32 dev c1",
            "route del fd77::1/128 dev lost",
            "route add fd77::1/128 dev c1",
        ]);
    }
}

/// How the service is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
    Mapped,
}

impl Family {
    /// What the service listens on.
    pub fn listen_on(self) -> SocketAddr {
        match self {
            Family::V4 => SocketAddr::new(SERVICE_V4.parse().unwrap(), 0),
            Family::V6 => SocketAddr::new(SERVICE_V6.parse().unwrap(), 0),
            Family::Mapped => "[::]:0".parse().unwrap(),
        }
    }

    /// What the client connects to.
    pub fn address(self, port: u16) -> SocketAddr {
        let ip: IpAddr = match self {
            Family::V6 => SERVICE_V6.parse().unwrap(),
            Family::V4 | Family::Mapped => SERVICE_V4.parse().unwrap(),
        };
        SocketAddr::new(ip, port)
    }
}

/// A seeded source of test decisions (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn flip(&mut self) -> bool {
        self.next() & 0x100 != 0
    }
}

/// Bytes `from..from + length` of an endless stream that `salt` names.
pub fn stream(salt: u64, from: usize, length: usize) -> Vec<u8> {
    (from..from + length)
        .map(|index| {
            let block = (index as u64 / 7)
                .wrapping_add(salt)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (block >> (8 * (index % 7))) as u8
        })
        .collect()
}
