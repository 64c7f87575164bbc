//! Bytes that are almost right, for every decoder that reads bytes from elsewhere.
//!
//! A test gives a name, real samples and the decoder. The samples, and those that are kept under
//! `corpus/NAME`, are first decoded as they are and then after edits that know what such bytes look
//! like: bits, words of every width with extreme values, numbers in texts, lines, fields, parts of
//! other samples. A decoder may refuse anything; it may not panic, hang, or take memory without
//! bound. `cargo xtask fuzz` runs all of them for a time; as tests they run for a moment.

mod edit;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::{Duration, Instant};

use edit::Edit;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::time::{ClockId, clock_gettime};
use proptest::test_runner::{Config, FileFailurePersistence, TestCaseError, TestRunner};

/// How long each decoder is fuzzed; without it only for a moment.
pub const SECONDS_VARIABLE: &str = "UNBROKEN_FUZZ_SECONDS";
/// Cases of one moment, and between two looks at the clock.
const CASES: u32 = 600;
/// Far above what any decoder needs for the longest input, and far below what a hang takes.
const SLOW: Duration = Duration::from_secs(2);
/// What a whole test may take beyond what it has: a decoder that believes a length of some
/// gigabytes fails, and one that holds its input a few times does not.
const MEMORY_BYTES: u64 = 2 << 30;

/// Fuzzes a decoder of bytes. `samples` are whole and right.
///
/// # Panics
/// When the decoder panics or is slow, with the shortest input found that makes it; the input is
/// written to `target/fuzz`, from where it belongs into the corpus once the decoder is mended.
pub fn bytes(name: &str, samples: &[Vec<u8>], decode: impl Fn(&[u8])) {
    let mut samples = samples.to_vec();
    samples.extend(corpus(name));
    assert!(!samples.is_empty(), "{name} has no sample to begin with");
    limit_memory();
    for sample in &samples {
        decode(sample);
    }
    let seconds = std::env::var(SECONDS_VARIABLE)
        .ok()
        .and_then(|text| text.parse().ok());
    let deadline = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let begun = Instant::now();
    let mut cases = 0u64;
    loop {
        run_some(name, &samples, &decode, deadline.is_some());
        cases += u64::from(CASES);
        if deadline.is_none_or(|deadline| Instant::now() >= deadline) {
            break;
        }
    }
    println!(
        "{name}: {cases} inputs in {:.1} s",
        begun.elapsed().as_secs_f64()
    );
}

/// As [`bytes`], for a decoder of text.
pub fn text(name: &str, samples: &[&str], decode: impl Fn(&str)) {
    let samples: Vec<Vec<u8>> = samples
        .iter()
        .map(|text| text.as_bytes().to_vec())
        .collect();
    bytes(name, &samples, |bytes| {
        decode(&String::from_utf8_lossy(bytes))
    });
}

fn run_some(name: &str, samples: &[Vec<u8>], decode: &impl Fn(&[u8]), remember: bool) {
    let failures = home().join("regressions").join(format!("{name}.txt"));
    let failures = failures.to_string_lossy().into_owned();
    let config = Config {
        cases: CASES,
        // A seed that failed is tried first ever after.
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(leak(failures)))),
        ..Config::default()
    };
    let last = kept(name, "last");
    let outcome = TestRunner::new(config).run(&Edit::sequences(), |edits| {
        let input = edit::apply(samples, &edits);
        if remember {
            // A decoder that is killed says nothing more.
            let _ = fs::write(&last, &input);
        }
        let begun = worked();
        decode(&input);
        match worked().saturating_sub(begun) {
            long if long > SLOW => Err(TestCaseError::fail(format!("took {long:?}"))),
            _ => Ok(()),
        }
    });
    if let Err(failure) = outcome {
        let proptest::test_runner::TestError::Fail(why, edits) = &failure else {
            panic!("{name}: {failure}");
        };
        let input = edit::apply(samples, edits);
        let place = kept(name, "failed");
        let written = fs::write(&place, &input);
        panic!(
            "{name}: {why}\n{edits:?}\ninput ({written:?} to {}): {:?}",
            place.display(),
            String::from_utf8_lossy(&input)
        );
    }
}

/// How long this thread has worked: what a busy machine makes it wait is nobody's fault.
fn worked() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// The runner wants a name for its whole life; there are a few dozen in a process.
fn leak(text: String) -> &'static str {
    Box::leak(text.into_boxed_str())
}

fn home() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn kept(name: &str, what: &str) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    let place = home().join("../..").join(target).join("fuzz");
    let _ = fs::create_dir_all(&place);
    place.join(format!("{name}.{what}"))
}

/// The samples that are kept for a decoder, in the order of their names.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(home().join("corpus").join(name));
    let entries = entries.into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
        .iter()
        .filter_map(|path| fs::read(path).ok())
        .collect()
}

/// From now on a process that wants absurd amounts of memory dies of it, and the test with it.
fn limit_memory() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mapped_pages: u64 = fs::read_to_string("/proc/self/statm")
            .ok()
            .and_then(|text| text.split(' ').next()?.parse().ok())
            .unwrap_or(0);
        if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_AS) {
            let _ = setrlimit(
                Resource::RLIMIT_AS,
                mapped_pages * 4096 + MEMORY_BYTES,
                hard,
            );
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decoder_that_trusts_a_length_is_found_out() {
        let caught = std::panic::catch_unwind(|| {
            let sample = vec![4, 0, b'a', b'b', b'c', b'd'];
            bytes("self-test", &[sample], |bytes| {
                if let [low, high, rest @ ..] = bytes {
                    let length = usize::from(u16::from_le_bytes([*low, *high]));
                    let _ = &rest[..length];
                }
            });
        });
        let _ = fs::remove_file(home().join("regressions/self-test.txt"));
        let why = caught.unwrap_err();
        let why = why.downcast_ref::<String>().unwrap();
        assert!(why.contains("self-test"), "{why}");
    }
}
