//! `unbroken status`.

mod kernel;
mod report;
mod table;

pub use report::json;
use report::totals_json;
pub use table::{detail, overview};

use crate::exit::{Exit, Failure};
use std::path::Path;
use unbroken_node::board::{Board, Snapshot, State};
use unbroken_node::clock::now_ns;
use unbroken_node::directory::{RUN_ROOT, RunDirectory, ServiceName};

/// What is known about one service.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    pub board: Snapshot,
    pub connections: u64,
    pub resident_bytes: u64,
}

/// The service of that name.
///
/// # Errors
/// [`Exit::NoService`] when there is none; [`Exit::Internal`] when its board cannot be read.
pub fn one(name: &ServiceName) -> Result<Service, Failure> {
    let directory = RunDirectory::new(name.clone());
    look(&directory)?.ok_or_else(|| {
        Failure::new(
            Exit::NoService,
            format!("no service {name} is running; `unbroken status` lists those that are"),
        )
    })
}

/// All that was counted of the service of that name.
///
/// # Errors
/// As [`one`].
pub fn totals(name: &ServiceName) -> Result<serde_json::Value, Failure> {
    one(name)?;
    let directory = RunDirectory::new(name.clone());
    let board = Board::open_to_read(&directory);
    let board = board.map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
    Ok(totals_json(&board.totals()))
}

/// All services by name, and what could not be read.
pub fn all() -> (Vec<Service>, Vec<Failure>) {
    let directories = match RunDirectory::all(Path::new(RUN_ROOT)) {
        Ok(directories) => directories,
        Err(error) => {
            let message = format!("cannot list {RUN_ROOT}: {error}");
            return (Vec::new(), vec![Failure::new(Exit::Internal, message)]);
        }
    };
    let mut services = Vec::new();
    let mut failures = Vec::new();
    for directory in directories {
        match look(&directory) {
            Ok(service) => services.extend(service),
            Err(failure) => failures.push(failure),
        }
    }
    (services, failures)
}

/// `None` when there is no board: nothing was started yet, or everything has just ended.
fn look(directory: &RunDirectory) -> Result<Option<Service>, Failure> {
    let failed = |message: String| Failure::new(Exit::Internal, message);
    if !directory.board().exists() {
        return Ok(None);
    }
    let board = Board::open_to_read(directory).map_err(|error| failed(error.to_string()))?;
    let alive = directory.is_alive().map_err(|error| {
        let path = directory.path().display();
        failed(format!("cannot see whether {path} is in use: {error}"))
    })?;
    let mut board = board.snapshot(now_ns());
    if !alive && directory.exists() {
        bury(&mut board);
    }
    Ok(Some(Service {
        connections: kernel::connections(&board.service_pids),
        resident_bytes: kernel::resident_bytes(&board.service_pids),
        board,
    }))
}

/// What the board of a service says after every process of ours was killed is about the dead; its
/// pids may be strangers' by now.
fn bury(board: &mut Snapshot) {
    if board.state != State::Failed {
        board.state = State::Failed;
        board.reason = format!(
            "every process of unbroken for it is gone; `unbroken run --name {}` starts it anew",
            board.name
        );
    }
    board.service_pids.clear();
    board.front_pid = None;
    board.primary_pid = None;
    board.standby_pid = None;
    board.unprotected_for_ns = None;
}

#[cfg(test)]
mod samples {
    use super::*;
    use unbroken_node::board::{Percentiles, Recent};

    /// A service with a value in every field.
    pub(super) fn protected() -> Service {
        Service {
            board: Snapshot {
                name: "chat".into(),
                command: "/bin/server --flag".into(),
                address: "10.211.0.2, fd75::2".into(),
                published: "6667".into(),
                state: State::Protected,
                reason: String::new(),
                term: 3,
                epoch: 4711,
                front_pid: Some(100),
                primary_pid: Some(101),
                standby_pid: Some(102),
                service_pids: vec![103, 104],
                takeovers: 2,
                last_takeover_us: Some(875),
                last_takeover_cause: Some("the service was killed by signal 9".into()),
                recent: Recent {
                    epochs_per_s: 210.4,
                    dirty_pages_per_epoch: 12.5,
                    bytes_per_epoch: 51_200.0,
                },
                pause: Percentiles {
                    samples: 9,
                    p50_ns: 48_100,
                    p99_ns: 190_000,
                    max_ns: 1_200_000,
                },
                hold: Percentiles {
                    samples: 9,
                    p50_ns: 90_000,
                    p99_ns: 380_000,
                    max_ns: 2_000_000,
                },
                steps: Default::default(),
                unprotected_for_ns: None,
                unprotected_total_ns: 1_500_000_000,
                exit: None,
            },
            connections: 20,
            resident_bytes: 9_437_184,
        }
    }

    pub(super) fn unprotected() -> Service {
        let mut service = protected();
        service.board.name = "web-server-1".into();
        service.board.state = State::Unprotected;
        service.board.reason = "the standby was killed by signal 9".into();
        service.board.standby_pid = None;
        service.board.takeovers = 0;
        service.board.last_takeover_us = None;
        service.board.last_takeover_cause = None;
        service.board.unprotected_for_ns = Some(12_300_000_000);
        service.board.pause = Percentiles::default();
        service.board.hold = Percentiles::default();
        service
    }

    #[test]
    fn the_dead_are_reported_as_such() {
        let mut board = unprotected().board;
        bury(&mut board);
        assert_eq!(board.state, State::Failed);
        assert!(board.reason.contains("is gone"));
        assert!(board.service_pids.is_empty());
        assert_eq!(board.primary_pid, None);
    }
}
