//! Whoever could say that an epoch was published or is safe could let output go that is in no state
//! (I1). The types keep everybody from making such a proof without another one; this keeps the two
//! calls that begin and complete the chain where the epoch's bytes are.

use std::fs;
use std::path::Path;

fn sources(folder: &Path, into: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("a source");
            into.push((path.display().to_string(), text));
        }
    }
}

#[test]
fn nobody_but_a_link_says_that_an_epoch_is_published_or_safe() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut found = Vec::new();
    for entry in fs::read_dir(crates).expect("the crates") {
        let folder = entry.expect("an entry").path().join("src");
        let mut all = Vec::new();
        sources(&folder, &mut all);
        for (name, text) in all {
            let product = text.split("#[cfg(test)]").next().unwrap_or_default();
            let calls = ["EpochNumbers", "into_committed"];
            if calls.iter().any(|call| product.contains(call)) && !name.ends_with("tests.rs") {
                found.push(name);
            }
        }
    }
    found.sort();
    let ends = [
        "core/src/epoch.rs",
        "link/src/commits.rs",
        "link/src/journal.rs",
    ];
    assert!(
        found.len() == ends.len()
            && found
                .iter()
                .zip(ends)
                .all(|(name, end)| name.ends_with(end)),
        "{found:#?}"
    );
}
