//! Numbers as people read them.

/// Three digits that matter, thousands set apart.
pub fn number(value: f64) -> String {
    if !value.is_finite() {
        return "-".into();
    }
    let size = value.abs();
    if size >= 1000.0 {
        let whole = value.round().abs() as u64;
        let digits = whole.to_string();
        let mut grouped = String::new();
        for (index, digit) in digits.chars().enumerate() {
            if index > 0 && (digits.len() - index).is_multiple_of(3) {
                grouped.push(',');
            }
            grouped.push(digit);
        }
        return if value < 0.0 {
            format!("-{grouped}")
        } else {
            grouped
        };
    }
    match size {
        _ if value.fract() == 0.0 => format!("{value:.0}"),
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// "1 client", "20 clients".
pub fn count(count: usize, noun: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", number(count as f64))
}

/// Microseconds in the unit that fits.
pub fn duration_us(us: f64) -> String {
    match us {
        1e6.. => format!("{} s", number(us / 1e6)),
        1e3.. => format!("{} ms", number(us / 1e3)),
        _ => format!("{} us", number(us)),
    }
}

/// Bytes in the unit that fits.
pub fn bytes(count: f64) -> String {
    match count {
        1e9.. => format!("{} GB", number(count / 1e9)),
        1e6.. => format!("{} MB", number(count / 1e6)),
        1e3.. => format!("{} kB", number(count / 1e3)),
        _ => format!("{} B", number(count)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_what_matters() {
        let shown = [1234567.8, 999.6, 99.66, 9.876, 0.0, -1500.0].map(number);
        assert_eq!(shown, ["1,234,568", "1000", "99.7", "9.88", "0", "-1,500"]);
        assert_eq!(duration_us(1250.0), "1.25 ms");
        assert_eq!(bytes(8.0), "8 B");
    }
}
