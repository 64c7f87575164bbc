//! Clocks.
//!
//! The block relies on: `clock_gettime(2)` writes one `struct timespec`.
#![allow(unsafe_code)]

/// `CLOCK_MONOTONIC` in nanoseconds: the same line for every process in one time namespace, so a
/// value may be put into shared memory, unlike `std::time::Instant`.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is valid for the write. The call cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    #[test]
    fn goes_forward() {
        let first = super::monotonic_ns();
        assert!(super::monotonic_ns() >= first);
    }
}
