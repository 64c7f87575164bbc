//! What can be measured, by the word of `--only`.

use anyhow::Result;

use crate::bench::Bench;
use crate::failover;
use crate::model::Section;
use crate::stalls;
use crate::sweeps::{connections, dirty, memory, threads};
use crate::workloads::{echo, footprint, icecast, memcached, nginx, ngircd, redis};

/// One workload or one question.
pub struct Kind {
    pub name: &'static str,
    pub title: &'static str,
    pub about: &'static str,
    pub run: fn(&Bench, &mut Section) -> Result<()>,
}

/// In the order of the report.
pub const ALL: [Kind; 14] = [
    Kind {
        name: "stalls",
        title: "What the machine does by itself",
        about: "A thread on the service's core that does nothing but read the clock, and the gaps in which it could not: what a hypervisor and a kernel do to any program, protected or not. No pause can be shorter for longer than these.",
        run: stalls::run,
    },
    Kind {
        name: "echo",
        title: "Echo",
        about: "A server that sends every byte back, one request of 64 bytes at a time on each \
                connection: the floor of every answer time.",
        run: echo::run,
    },
    Kind {
        name: "ngircd",
        title: "Chat: ngircd",
        about: "Everybody in one channel; each message of 80 bytes goes to all others. Pressed: as \
                fast as messages are heard. 80 % and 50 %: those parts of what the unprotected \
                server delivered, pressed, in one window of the first round, offered to both in \
                every round.",
        run: ngircd::run,
    },
    Kind {
        name: "icecast",
        title: "Streaming: icecast2",
        about: "One source, many listeners at 320 kbit/s, every byte checked; and one listener as \
                fast as the server passes the stream on.",
        run: icecast::run,
    },
    Kind {
        name: "redis",
        title: "Key-value store: redis-server",
        about: "Pressed by redis-benchmark with values of 64 bytes.",
        run: redis::run,
    },
    Kind {
        name: "memcached",
        title: "Cache: memcached",
        about: "Four threads on one core, values of 100 bytes, one request at a time on each \
                connection, every answer checked.",
        run: memcached::run,
    },
    Kind {
        name: "nginx",
        title: "Web: nginx as one process",
        about: "Pressed by wrk on 20 connections.",
        run: nginx::run,
    },
    Kind {
        name: "footprint",
        title: "A server of middle size",
        about: "redis-server with 100 MB and 200 connections, 5,000 SET a second all together.",
        run: footprint::run,
    },
    Kind {
        name: "failover",
        title: "Around a kill",
        about: "The server is killed with SIGKILL under load, five times each: a chat of 20 clients that each hear about 1,000 messages a second, and a store with 20 connections and 20,000 SET a second all together. Every client checks everything it gets; a dot is an arrival.",
        run: failover::run,
    },
    Kind {
        name: "idle",
        title: "Sweep: open connections",
        about: "A small epoll server that echoes. One connection asks, each time as soon as it has \
                its answer; all others are open and silent.",
        run: connections::idle,
    },
    Kind {
        name: "active",
        title: "Sweep: active connections",
        about: "The same server. All connections ask, each again as soon as it has its answer.",
        run: connections::active,
    },
    Kind {
        name: "memory",
        title: "Sweep: resident memory",
        about: "Memory that was written once and is left alone, beside 300 requests a second. Filling: the standby is killed, and the time until another one protects.",
        run: memory::run,
    },
    Kind {
        name: "dirty",
        title: "Sweep: dirty pages",
        about: "A thread that writes so many pages of 64 MB each millisecond, one word each, beside 300 requests a second.",
        run: dirty::run,
    },
    Kind {
        name: "threads",
        title: "Sweep: threads",
        about: "Each thread serves connections of its own from an epoll of its own. One asked: one connection, the other threads wait. All asked: a connection for each thread.",
        run: threads::run,
    },
];
