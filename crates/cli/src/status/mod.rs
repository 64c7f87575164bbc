//! `unbroken status`.

mod kernel;
mod report;
mod table;

pub use report::json;
use report::totals_json;
pub use table::{detail, overview};

use crate::exit::{Exit, Failure};
use std::path::Path;
use unbroken_node::clock::now_ns;
use unbroken_node::directory::{RUN_ROOT, RunDirectory, ServiceName};
use unbroken_node::status_page::{ServiceState, Snapshot, StatusPage};

/// What is known about one service.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    pub page: Snapshot,
    pub connections: u64,
    pub resident_bytes: u64,
}

/// The service of that name.
///
/// # Errors
/// [`Exit::NoService`] when there is none; [`Exit::Internal`] when its status page cannot be read.
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
    let page = StatusPage::open_to_read(&directory);
    let page = page.map_err(|error| Failure::new(Exit::Internal, error.to_string()))?;
    Ok(totals_json(&page.totals()))
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

/// `None` when there is no status page: nothing was started yet, or everything has just ended.
fn look(directory: &RunDirectory) -> Result<Option<Service>, Failure> {
    let failed = |message: String| Failure::new(Exit::Internal, message);
    if !directory.status_page().exists() {
        return Ok(None);
    }
    let page = StatusPage::open_to_read(directory).map_err(|error| failed(error.to_string()))?;
    let alive = directory.is_alive().map_err(|error| {
        let path = directory.path().display();
        failed(format!("cannot see whether {path} is in use: {error}"))
    })?;
    let mut page = page.snapshot(now_ns());
    if !alive && directory.exists() {
        bury(&mut page);
    }
    Ok(Some(Service {
        connections: kernel::connections(&page.service_pids),
        resident_bytes: kernel::resident_bytes(&page.service_pids),
        page,
    }))
}

/// What the status page of a service says after every process of ours was killed is about the dead; its
/// pids may be strangers' by now.
fn bury(page: &mut Snapshot) {
    if page.state != ServiceState::Failed {
        page.state = ServiceState::Failed;
        page.reason = format!(
            "every process of unbroken for it is gone; `unbroken run --name {}` starts it anew",
            page.name
        );
    }
    page.service_pids.clear();
    page.front_pid = None;
    page.primary_pid = None;
    page.standby_pid = None;
    page.unprotected_for_ns = None;
}

#[cfg(test)]
mod samples {
    use super::*;
    use unbroken_node::status_page::{Percentiles, Recent};

    /// A service with a value in every field.
    pub(super) fn protected() -> Service {
        Service {
            page: Snapshot {
                name: "chat".into(),
                command: "/bin/server --flag".into(),
                address: "10.211.0.2, fd75::2".into(),
                published: "6667".into(),
                state: ServiceState::Protected,
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
        service.page.name = "web-server-1".into();
        service.page.state = ServiceState::Unprotected;
        service.page.reason = "the standby was killed by signal 9".into();
        service.page.standby_pid = None;
        service.page.takeovers = 0;
        service.page.last_takeover_us = None;
        service.page.last_takeover_cause = None;
        service.page.unprotected_for_ns = Some(12_300_000_000);
        service.page.pause = Percentiles::default();
        service.page.hold = Percentiles::default();
        service
    }

    #[test]
    fn the_dead_are_reported_as_such() {
        let mut page = unprotected().page;
        bury(&mut page);
        assert_eq!(page.state, ServiceState::Failed);
        assert!(page.reason.contains("is gone"));
        assert!(page.service_pids.is_empty());
        assert_eq!(page.primary_pid, None);
    }
}
