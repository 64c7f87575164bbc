//! Comparison of 32-bit numbers that wrap: TCP sequence numbers and timestamps (RFC 9293, 3.4).

/// Whether `a` comes after `b`.
pub fn is_after(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) > 0
}

/// The later of two.
pub fn later(a: u32, b: u32) -> u32 {
    if is_after(a, b) { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wrap_is_no_step_back() {
        assert!(is_after(5, u32::MAX - 5));
        assert!(!is_after(u32::MAX - 5, 5));
        assert!(!is_after(7, 7));
        assert_eq!(later(u32::MAX, 3), 3);
    }
}
