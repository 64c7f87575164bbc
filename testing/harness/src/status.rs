//! What `unbroken status --json` says of one service.

use std::net::IpAddr;

use anyhow::{Context, Result};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// Every key that the command line promises (DESIGN, "Command line").
pub const PROMISED_KEYS: [&str; 19] = [
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
    /// The steps of an epoch, in the order in which they were printed; what each holds is in the
    /// whole object's form.
    #[serde(default)]
    pub steps_us: InOrder,
    /// The whole object as it was printed.
    #[serde(skip)]
    pub whole: Value,
}

/// The entries of an object in the order in which they were printed.
#[derive(Debug, Clone, Default)]
pub struct InOrder(Vec<(String, Value)>);

impl InOrder {
    pub fn iter(&self) -> impl Iterator<Item = &(String, Value)> {
        self.0.iter()
    }
}

impl<'de> Deserialize<'de> for InOrder {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = InOrder;
            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<InOrder, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(InOrder(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl Status {
    /// From what `status NAME --json` printed: an object, or a list with one.
    pub fn parse(text: &str) -> Result<Self> {
        let printed: Value = serde_json::from_str(text)
            .with_context(|| format!("status --json printed no JSON: {text:?}"))?;
        let lacks = || format!("status --json lacks what tests need: {printed}");
        // From the text, not from the value: that has forgotten the order.
        let (whole, status) = match &printed {
            Value::Array(list) if list.len() == 1 => {
                let [status]: [Self; 1] = serde_json::from_str(text).with_context(lacks)?;
                (list[0].clone(), status)
            }
            other => (
                other.clone(),
                serde_json::from_str(text).with_context(lacks)?,
            ),
        };
        Ok(Self { whole, ..status })
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
        "standby_pid":null,"takeovers":2,"last_takeover_ms":0.8,
        "steps_us":{"stop":{"p50":1.5},"capture":{"p50":2.5}}}"#;

    #[test]
    fn an_object_and_a_list_of_one_are_the_same() {
        for text in [PRINTED.to_string(), format!("[{PRINTED}]")] {
            let status = Status::parse(&text).unwrap();
            assert!(status.is_protected());
            assert_eq!((status.takeovers, status.standby_pid), (2, None));
            let steps: Vec<&str> = status
                .steps_us
                .iter()
                .map(|(name, _)| name.as_str())
                .collect();
            assert_eq!(steps, ["stop", "capture"]);
            assert!(status.missing_keys().contains(&"pause_us.p99".to_string()));
        }
    }
}
