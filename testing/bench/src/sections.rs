//! What can be measured, by the word of `--only`.

use anyhow::Result;

use crate::bench::Bench;
use crate::model::Section;
use crate::workloads::{echo, icecast, memcached, nginx, ngircd, redis};

/// One workload or one question.
pub struct Kind {
    pub name: &'static str,
    pub title: &'static str,
    pub about: &'static str,
    /// Whether the short form runs it too.
    pub in_short: bool,
    pub run: fn(&Bench, &mut Section) -> Result<()>,
}

/// In the order of the report.
pub const ALL: [Kind; 6] = [
    Kind {
        name: "echo",
        title: "Echo",
        about: "A server that sends every byte back, one request of 64 bytes at a time on each \
                connection: the floor of every answer time.",
        in_short: true,
        run: echo::run,
    },
    Kind {
        name: "ngircd",
        title: "Chat: ngircd",
        about: "Everybody in one channel; each message of 80 bytes goes to all others. Pressed: as \
                fast as messages are heard. 80 % and 50 %: those parts of what the unprotected \
                server delivers when pressed, offered to both.",
        in_short: true,
        run: ngircd::run,
    },
    Kind {
        name: "icecast",
        title: "Streaming: icecast2",
        about: "One source, many listeners at 320 kbit/s, every byte checked; and one listener as \
                fast as the server passes the stream on.",
        in_short: false,
        run: icecast::run,
    },
    Kind {
        name: "redis",
        title: "Key-value store: redis-server",
        about: "Pressed by redis-benchmark with values of 64 bytes.",
        in_short: true,
        run: redis::run,
    },
    Kind {
        name: "memcached",
        title: "Cache: memcached",
        about: "Four threads on one core, values of 100 bytes, one request at a time on each \
                connection, every answer checked.",
        in_short: false,
        run: memcached::run,
    },
    Kind {
        name: "nginx",
        title: "Web: nginx as one process",
        about: "Pressed by wrk on 20 connections.",
        in_short: false,
        run: nginx::run,
    },
];
