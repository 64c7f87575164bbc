//! Which crate may use which (docs/ARCHITECTURE.md, Crates).

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Each product crate, and the crates of ours that it may use.
const MAY_USE: [(&str, &[&str]); 9] = [
    ("unbroken-sys", &[]),
    ("unbroken-image", &[]),
    ("unbroken-core", &["unbroken-image"]),
    ("unbroken-tracee", &["unbroken-sys", "unbroken-image"]),
    ("unbroken-objects", &["unbroken-sys", "unbroken-image"]),
    // Releases packets, which takes the permits of `core`.
    (
        "unbroken-wire",
        &["unbroken-sys", "unbroken-image", "unbroken-core"],
    ),
    (
        "unbroken-link",
        &[
            "unbroken-sys",
            "unbroken-image",
            "unbroken-core",
            "unbroken-wire",
        ],
    ),
    (
        "unbroken-node",
        &[
            "unbroken-sys",
            "unbroken-image",
            "unbroken-core",
            "unbroken-tracee",
            "unbroken-objects",
            "unbroken-wire",
            "unbroken-link",
        ],
    ),
    ("unbroken", &["unbroken-sys", "unbroken-node"]),
];

/// What judges the product shares no code with it.
const JUDGES: [&str; 2] = ["unbroken-clients", "unbroken-guests"];

/// What the workspace's manifests say that these rules forbid.
pub fn trespasses() -> Result<Vec<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["metadata", "--no-deps", "--offline", "--format-version=1"])
        .output()
        .context("cannot run cargo metadata")?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    trespasses_in(&serde_json::from_slice(&output.stdout)?)
}

fn trespasses_in(metadata: &Value) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for package in list(metadata, "packages")? {
        let name = text(package, "name")?;
        let is_product = text(package, "manifest_path")?.contains("/crates/");
        let rule = MAY_USE.iter().find(|(of, _)| *of == name);
        let may_use = match rule {
            Some((_, may_use)) => *may_use,
            None if is_product => {
                found.push(format!("no rule says what {name} may use"));
                continue;
            }
            None if JUDGES.contains(&name) => &[],
            None => continue,
        };
        for dependency in list(package, "dependencies")? {
            let used = text(dependency, "name")?;
            let is_ours = MAY_USE.iter().any(|(of, _)| *of == used);
            let is_for_tests = dependency["kind"] == "dev";
            // In its tests a crate may use what lies beneath it, and what tests share.
            let is_at_home = is_for_tests && !is_ours;
            let is_of_workspace = used.starts_with("unbroken");
            if is_of_workspace && !may_use.contains(&used) && !is_at_home {
                found.push(format!("{name} uses {used}"));
            }
        }
    }
    Ok(found)
}

fn list<'a>(value: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    value[key]
        .as_array()
        .with_context(|| format!("cargo metadata has no list {key}"))
}

fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value[key]
        .as_str()
        .with_context(|| format!("cargo metadata has no text {key}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn trespasses_of(place: &str, name: &str, used: &str, kind: Option<&str>) -> Vec<String> {
        let metadata = json!({"packages": [{
            "name": name,
            "manifest_path": format!("/somewhere/{place}/Cargo.toml"),
            "dependencies": [{"name": used, "kind": kind}],
        }]});
        trespasses_in(&metadata).expect("metadata")
    }

    #[test]
    fn what_is_not_allowed_is_named() {
        let of = |name, used| trespasses_of("crates/x", name, used, None);
        assert_eq!(of("unbroken-core", "unbroken-sys").len(), 1);
        assert_eq!(of("unbroken-image", "unbroken-core").len(), 1);
        assert_eq!(of("unbroken-node", "unbroken").len(), 1);
        assert_eq!(of("unbroken-wire", "unbroken-fuzz").len(), 1);
        assert_eq!(of("unbroken-new", "libc").len(), 1);
        assert!(of("unbroken-core", "unbroken-image").is_empty());
        assert!(of("unbroken-core", "libc").is_empty());
    }

    #[test]
    fn tests_use_what_lies_beneath_and_what_tests_share() {
        let of = |used| trespasses_of("crates/wire", "unbroken-wire", used, Some("dev"));
        assert!(of("unbroken-fuzz").is_empty());
        assert!(of("unbroken-core").is_empty());
        assert_eq!(of("unbroken-node").len(), 1);
    }

    #[test]
    fn judges_share_nothing_with_what_they_judge() {
        let of = |name| trespasses_of("testing/x", name, "unbroken-sys", None);
        assert_eq!(of("unbroken-clients").len(), 1);
        assert!(of("unbroken-bench").is_empty());
    }
}
