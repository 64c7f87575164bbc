//! Bytes in shared words that another process may read at any time, and whose writer may be killed
//! at any instruction.
//!
//! Two copies and a counter: the writer fills the copy that is not shown and then raises the
//! counter, which shows it. A writer that dies half-way has changed nothing; a reader that sees
//! the same counter before and after has read one whole text. One writer at a time: the primary.

use super::layout::TextPlace;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Shows `bytes`, cut to the place's room.
pub(super) fn write(words: &[AtomicU64], place: TextPlace, bytes: &[u8]) {
    let bytes = &bytes[..bytes.len().min(place.bytes)];
    let counter = &words[place.at];
    let next = counter.load(Ordering::Relaxed).wrapping_add(1);
    // Keeps the stores below behind the store of the counter that showed the other copy: a reader
    // that sees one of them must also see that its own copy is not shown any more.
    fence(Ordering::SeqCst);
    let slot = slot(words, place, next);
    slot[0].store(bytes.len() as u64, Ordering::Relaxed);
    for (word, chunk) in slot[1..].iter().zip(bytes.chunks(8)) {
        let mut value = [0; 8];
        value[..chunk.len()].copy_from_slice(chunk);
        word.store(u64::from_ne_bytes(value), Ordering::Relaxed);
    }
    counter.store(next, Ordering::Release);
}

/// The text that is shown. Tries again while writers overtake it; a reader is overtaken only when
/// two whole writes fall into one read.
pub(super) fn read(words: &[AtomicU64], place: TextPlace) -> Vec<u8> {
    let counter = &words[place.at];
    loop {
        let shown = counter.load(Ordering::Acquire);
        let slot = slot(words, place, shown);
        let length = (slot[0].load(Ordering::Relaxed) as usize).min(place.bytes);
        let mut bytes = Vec::with_capacity(length + 8);
        for word in &slot[1..=length.div_ceil(8)] {
            bytes.extend_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        bytes.truncate(length);
        fence(Ordering::SeqCst);
        if counter.load(Ordering::Relaxed) == shown {
            return bytes;
        }
    }
}

fn slot(words: &[AtomicU64], place: TextPlace, counter: u64) -> &[AtomicU64] {
    let start = place.at + 1 + (counter % 2) as usize * place.slot_words();
    &words[start..start + place.slot_words()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    const PLACE: TextPlace = TextPlace { at: 3, bytes: 64 };

    fn words() -> Vec<AtomicU64> {
        (0..32).map(|_| AtomicU64::new(0)).collect()
    }

    #[test]
    fn what_is_written_is_read() {
        let words = words();
        assert_eq!(read(&words, PLACE), b"");
        for text in ["a", "", "exactly8", "nine long", &"x".repeat(64)] {
            write(&words, PLACE, text.as_bytes());
            assert_eq!(read(&words, PLACE), text.as_bytes());
        }
        write(&words, PLACE, "y".repeat(99).as_bytes());
        assert_eq!(read(&words, PLACE), "y".repeat(64).as_bytes());
    }

    #[test]
    fn a_writer_that_dies_half_way_has_changed_nothing() {
        let words = words();
        write(&words, PLACE, b"whole");
        let hidden = slot(&words, PLACE, words[PLACE.at].load(Ordering::Relaxed) + 1);
        for word in hidden {
            word.store(u64::MAX, Ordering::Relaxed);
        }
        assert_eq!(read(&words, PLACE), b"whole");
    }

    #[test]
    fn a_reader_never_sees_a_mixture() {
        let words = words();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..20_000u32 {
                    let byte = b'a' + (round % 26) as u8;
                    write(&words, PLACE, &vec![byte; 1 + round as usize % 64]);
                }
                stop.store(true, Ordering::Relaxed);
            });
            while !stop.load(Ordering::Relaxed) {
                let seen = read(&words, PLACE);
                assert!(seen.iter().all(|byte| *byte == seen[0]), "{seen:?}");
            }
        });
    }
}
