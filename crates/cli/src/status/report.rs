//! `status --json`: a contract with the scripts of others. Keys are only ever added.

use super::Service;
use serde_json::{Value, json};
use unbroken_node::status_page::{Percentiles, Totals};
use unbroken_node::steps::EpochStep;

/// One service as an object. What is not there (a standby, a takeover) is null.
pub fn json(service: &Service) -> Value {
    let page = &service.page;
    let addresses: Vec<&str> = page.address.split(", ").collect();
    json!({
        "name": page.name,
        "address": addresses.first(),
        "addresses": addresses,
        "published": page.published,
        "command": page.command,
        "state": page.state.name(),
        "reason": page.reason,
        "term": page.term,
        "epoch": page.epoch,
        "service_pids": page.service_pids,
        "front_pid": page.front_pid,
        "primary_pid": page.primary_pid,
        "standby_pid": page.standby_pid,
        "takeovers": page.takeovers,
        "last_takeover_ms": page.last_takeover_us.map(|us| us as f64 / 1e3),
        "last_takeover_cause": page.last_takeover_cause,
        "epochs_per_s": page.recent.epochs_per_s,
        "pause_us": percentiles(&page.pause),
        "hold_us": percentiles(&page.hold),
        "steps_us": steps(&page.steps),
        "dirty_pages_per_epoch": page.recent.dirty_pages_per_epoch,
        "bytes_per_epoch": page.recent.bytes_per_epoch,
        "connections": service.connections,
        "resident_bytes": service.resident_bytes,
        "unprotected_seconds": page.unprotected_total_ns as f64 / 1e9,
        "unprotected_for_seconds": page.unprotected_for_ns.map(|ns| ns as f64 / 1e9),
        "exit_code": page.exit,
    })
}

fn percentiles(times: &Percentiles) -> Value {
    let us = |ns: u64| ns as f64 / 1e3;
    json!({ "p50": us(times.p50_ns), "p99": us(times.p99_ns), "max": us(times.max_ns) })
}

/// The steps of an epoch, by name.
fn steps(steps: &[Percentiles]) -> Value {
    let named = EpochStep::ALL.into_iter().zip(steps);
    let entries = named.map(|(step, times)| (step.name().to_owned(), percentiles(times)));
    Value::Object(entries.collect())
}

/// All that was counted. The times are a list, because their order says what follows what; of each
/// the buckets that are not empty: upper bound in microseconds, and count.
pub(super) fn totals_json(totals: &Totals) -> Value {
    let buckets = |buckets: &[(u64, u64)]| -> Vec<Value> {
        let pairs = buckets.iter();
        pairs
            .map(|(upper_ns, count)| json!([*upper_ns as f64 / 1e3, count]))
            .collect()
    };
    let times: Vec<Value> = totals
        .times
        .iter()
        .map(|(name, counts)| json!({ "name": name, "us": buckets(counts) }))
        .collect();
    json!({
        "epochs": totals.epochs,
        "dirty_pages": totals.dirty_pages,
        "bytes": totals.bytes,
        "times": times,
    })
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    #[test]
    fn every_key_of_the_contract_is_there() {
        let object = json(&samples::protected());
        for key in [
            "name",
            "address",
            "command",
            "state",
            "term",
            "epoch",
            "service_pids",
            "primary_pid",
            "standby_pid",
            "takeovers",
            "last_takeover_ms",
            "last_takeover_cause",
            "epochs_per_s",
            "pause_us",
            "hold_us",
            "dirty_pages_per_epoch",
            "bytes_per_epoch",
            "connections",
            "resident_bytes",
            "unprotected_seconds",
        ] {
            assert!(!object[key].is_null(), "{key}");
        }
        for times in ["pause_us", "hold_us"] {
            for key in ["p50", "p99", "max"] {
                assert!(object[times][key].is_f64(), "{times}.{key}");
            }
        }
        assert_eq!(object["address"], "10.211.0.2");
        assert_eq!(object["addresses"], json!(["10.211.0.2", "fd75::2"]));
        assert_eq!(object["last_takeover_ms"], 0.875);
        assert_eq!(object["pause_us"]["p50"], 48.1);
        assert_eq!(object["unprotected_seconds"], 1.5);
    }

    #[test]
    fn times_are_listed_in_their_order() {
        let totals = Totals {
            epochs: 2,
            times: vec![("pause", vec![(1500, 2)]), ("hold", vec![])],
            ..Totals::default()
        };
        let object = totals_json(&totals);
        assert_eq!(object["epochs"], 2);
        assert_eq!(
            object["times"][0],
            json!({ "name": "pause", "us": [[1.5, 2]] })
        );
        assert_eq!(object["times"][1]["name"], "hold");
    }

    #[test]
    fn what_is_not_there_is_null() {
        let object = json(&samples::unprotected());
        for key in [
            "standby_pid",
            "last_takeover_ms",
            "last_takeover_cause",
            "exit_code",
        ] {
            assert!(object[key].is_null(), "{key}");
        }
        assert_eq!(object["unprotected_for_seconds"], 12.3);
    }
}
