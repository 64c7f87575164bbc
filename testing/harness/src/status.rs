//! What `unbroken status --json` says of one service.

use std::net::IpAddr;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

/// Every key that the command line promises (DESIGN, "Command line").
pub const PROMISED_KEYS: [&str; 20] = [
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
    "epochs_per_s",
    "pause_us",
    "hold_us",
    "steps_us",
    "dirty_pages_per_epoch",
    "bytes_per_epoch",
    "connections",
    "resident_bytes",
    "unprotected_seconds",
];

/// The part of a service's status that tests steer by.
#[derive(Debug, Clone, Deserialize)]
pub struct Status {
    pub name: String,
    pub address: IpAddr,
    pub state: String,
    pub term: u64,
    pub service_pids: Vec<i32>,
    pub primary_pid: Option<i32>,
    pub standby_pid: Option<i32>,
    pub takeovers: u64,
    pub last_takeover_ms: Option<f64>,
    /// The whole object as it was printed.
    #[serde(skip)]
    pub whole: Value,
}

impl Status {
    /// From what `status NAME --json` printed: an object, or a list with one.
    pub fn parse(text: &str) -> Result<Self> {
        let printed: Value = serde_json::from_str(text)
            .with_context(|| format!("status --json printed no JSON: {text:?}"))?;
        let whole = match printed {
            Value::Array(mut list) if list.len() == 1 => list.remove(0),
            other => other,
        };
        let mut status: Self = serde_json::from_value(whole.clone())
            .with_context(|| format!("status --json lacks what tests need: {whole}"))?;
        status.whole = whole;
        Ok(status)
    }

    pub fn is_protected(&self) -> bool {
        self.state == "protected"
    }

    /// The promised keys that are not there.
    pub fn missing_keys(&self) -> Vec<String> {
        let mut missing = Vec::new();
        for key in PROMISED_KEYS {
            if self.whole.get(key).is_none() {
                missing.push(key.to_string());
            }
        }
        for key in ["pause_us", "hold_us"] {
            for part in ["p50", "p99", "max"] {
                if self
                    .whole
                    .get(key)
                    .and_then(|object| object.get(part))
                    .is_none()
                {
                    missing.push(format!("{key}.{part}"));
                }
            }
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRINTED: &str = r#"{"name":"n","address":"10.211.0.2","command":["x"],
        "state":"protected","term":3,"epoch":9,"service_pids":[12],"primary_pid":10,
        "standby_pid":null,"takeovers":2,"last_takeover_ms":0.8}"#;

    #[test]
    fn an_object_and_a_list_of_one_are_the_same() {
        for text in [PRINTED.to_string(), format!("[{PRINTED}]")] {
            let status = Status::parse(&text).unwrap();
            assert!(status.is_protected());
            assert_eq!((status.takeovers, status.standby_pid), (2, None));
            assert!(status.missing_keys().contains(&"pause_us.p99".to_string()));
        }
    }
}
