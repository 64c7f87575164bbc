//! Bytes that say where they belong: any 16 of them in a row give the stream and the offset.
//!
//! A stream is a row of 8-byte words; word i of stream s is an invertible scramble of (s, i). So
//! what arrives is checked byte for byte without keeping what was sent, and bytes that arrive in
//! the wrong place can say how far they are off.

/// Sixteen bytes always contain one whole word, whatever the alignment.
pub const LOCATE_BYTES: usize = 16;
const WORD_BYTES: u64 = 8;
const INDEX_BITS: u32 = 48;
/// An odd number, so multiplication by it can be undone modulo 2^64.
const FACTOR: u64 = 0xd134_2543_de82_ef95;

/// The deterministic content of one stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    stream: u16,
}

impl Content {
    pub fn new(stream: u16) -> Self {
        Self { stream }
    }

    fn word(self, index: u64) -> [u8; 8] {
        scramble((u64::from(self.stream) << INDEX_BITS) | index).to_le_bytes()
    }

    /// Fills `buffer` with the bytes that stand at `offset`.
    pub fn fill(self, offset: u64, buffer: &mut [u8]) {
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let skip = (at % WORD_BYTES) as usize;
            let word = self.word(at / WORD_BYTES);
            let count = rest.len().min(word.len() - skip);
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&word[skip..skip + count]);
            at += count as u64;
            rest = later;
        }
    }

    /// Where `received`, which should stand at `offset`, first differs from it.
    pub fn first_difference(self, offset: u64, received: &[u8]) -> Option<usize> {
        let mut at = 0;
        while at < received.len() {
            let position = offset + at as u64;
            let skip = (position % WORD_BYTES) as usize;
            let word = self.word(position / WORD_BYTES);
            let count = (received.len() - at).min(word.len() - skip);
            let expected = &word[skip..skip + count];
            let found = &received[at..at + count];
            if expected != found {
                let inside = expected
                    .iter()
                    .zip(found)
                    .position(|(want, got)| want != got);
                return inside.map(|inside| at + inside);
            }
            at += count;
        }
        None
    }

    /// The offset at which `received` begins, if it is a piece of this stream. Looks at the first
    /// [`LOCATE_BYTES`] only; `None` when there are fewer.
    pub fn locate(self, received: &[u8]) -> Option<u64> {
        let piece = received.get(..LOCATE_BYTES)?;
        (0..WORD_BYTES).find_map(|skip| {
            let word = piece[skip as usize..].first_chunk::<8>()?;
            let value = unscramble(u64::from_le_bytes(*word));
            let (stream, index) = (value >> INDEX_BITS, value & ((1 << INDEX_BITS) - 1));
            if stream != u64::from(self.stream) {
                return None;
            }
            let offset = (index * WORD_BYTES).checked_sub(skip)?;
            self.first_difference(offset, piece)
                .is_none()
                .then_some(offset)
        })
    }
}

fn scramble(value: u64) -> u64 {
    let mixed = (value ^ (value >> 32)).wrapping_mul(FACTOR);
    let mixed = (mixed ^ (mixed >> 32)).wrapping_mul(FACTOR);
    mixed ^ (mixed >> 32)
}

fn unscramble(value: u64) -> u64 {
    let inverse = inverse_of_factor();
    let mixed = (value ^ (value >> 32)).wrapping_mul(inverse);
    let mixed = (mixed ^ (mixed >> 32)).wrapping_mul(inverse);
    mixed ^ (mixed >> 32)
}

/// Newton's iteration doubles the number of correct low bits each round: 3, 6, 12, 24, 48, 96.
const fn inverse_of_factor() -> u64 {
    let mut inverse = FACTOR;
    let mut round = 0;
    while round < 5 {
        inverse = inverse.wrapping_mul(2u64.wrapping_sub(FACTOR.wrapping_mul(inverse)));
        round += 1;
    }
    inverse
}

/// Checks that what arrives is one contiguous run of a stream, and says by how much when not.
#[derive(Debug)]
pub struct RunChecker {
    content: Content,
    /// The offset of the next byte; `None` until the first piece was located.
    next: Option<u64>,
    /// Bytes that could not be placed yet: fewer than [`LOCATE_BYTES`].
    pending: Vec<u8>,
}

/// What was wrong at one point of a run.
#[derive(Debug, PartialEq, Eq)]
pub enum Break {
    /// This many bytes are missing before `at`.
    Missing { at: u64, bytes: u64 },
    /// This many bytes, ending before `at`, came again.
    Repeated { at: u64, bytes: u64 },
    /// This many bytes belong nowhere; the run goes on after them.
    Damaged { at: u64, bytes: u64 },
}

impl RunChecker {
    /// A run that may begin anywhere in the stream.
    pub fn anywhere(content: Content) -> Self {
        Self {
            content,
            next: None,
            pending: Vec::new(),
        }
    }

    /// A run that must begin at `offset`.
    pub fn from(content: Content, offset: u64) -> Self {
        Self {
            content,
            next: Some(offset),
            pending: Vec::new(),
        }
    }

    /// The offset of the next byte that should arrive.
    pub fn position(&self) -> Option<u64> {
        self.next
    }

    /// Takes bytes as they arrive, in pieces of any size, and reports what does not fit.
    pub fn accept(&mut self, received: &[u8], mut report: impl FnMut(Break)) {
        let joined: Vec<u8>;
        let mut rest = received;
        if !self.pending.is_empty() {
            joined = [self.pending.as_slice(), received].concat();
            self.pending.clear();
            rest = &joined;
        }
        let mut damaged = 0;
        while !rest.is_empty() {
            if damaged == 0
                && let Some(next) = self.next
            {
                let good = self
                    .content
                    .first_difference(next, rest)
                    .unwrap_or(rest.len());
                self.next = Some(next + good as u64);
                rest = &rest[good..];
                if rest.is_empty() {
                    break;
                }
            }
            if rest.len() < LOCATE_BYTES {
                self.pending.extend_from_slice(rest);
                break;
            }
            match self.content.locate(rest) {
                Some(found) => {
                    self.jump(found, damaged, &mut report);
                    damaged = 0;
                }
                None => {
                    damaged += 1;
                    rest = &rest[1..];
                }
            }
        }
        if damaged > 0 {
            report(Break::Damaged {
                at: self.next.unwrap_or(0),
                bytes: damaged,
            });
            self.next = self.next.map(|next| next + damaged);
        }
    }

    fn jump(&mut self, found: u64, damaged: u64, report: &mut impl FnMut(Break)) {
        if let Some(next) = self.next {
            let at = next + damaged;
            if damaged > 0 {
                report(Break::Damaged {
                    at: next,
                    bytes: damaged,
                });
            }
            if found > at {
                report(Break::Missing {
                    at: found,
                    bytes: found - at,
                });
            } else if found < at {
                report(Break::Repeated {
                    at,
                    bytes: at - found,
                });
            }
        } else if damaged > 0 {
            report(Break::Damaged {
                at: found,
                bytes: damaged,
            });
        }
        self.next = Some(found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(content: Content, offset: u64, count: usize) -> Vec<u8> {
        let mut buffer = vec![0; count];
        content.fill(offset, &mut buffer);
        buffer
    }

    fn breaks(pieces: &[&[u8]]) -> Vec<Break> {
        let mut checker = RunChecker::anywhere(Content::new(3));
        let mut found = Vec::new();
        for piece in pieces {
            checker.accept(piece, |broken| found.push(broken));
        }
        found
    }

    #[test]
    fn any_sixteen_bytes_say_where_they_belong() {
        let content = Content::new(3);
        for offset in (0..64).chain(1_000_000_000..1_000_000_064) {
            assert_eq!(content.locate(&bytes(content, offset, 16)), Some(offset));
        }
        assert_eq!(content.locate(&bytes(Content::new(4), 80, 16)), None);
        assert_eq!(content.locate(&[0; 16]), None);
    }

    #[test]
    fn a_whole_run_in_odd_pieces_is_clean() {
        let run = bytes(Content::new(3), 12_345, 5_000);
        let pieces: Vec<&[u8]> = run.chunks(7).collect();
        assert_eq!(breaks(&pieces), []);
    }

    #[test]
    fn missing_repeated_and_damaged_bytes_are_told_apart() {
        let content = Content::new(3);
        let (first, later) = (bytes(content, 0, 1_000), bytes(content, 1_010, 500));
        assert_eq!(
            breaks(&[&first, &later]),
            [Break::Missing {
                at: 1_010,
                bytes: 10
            }]
        );
        let again = bytes(content, 900, 500);
        assert_eq!(
            breaks(&[&first, &again]),
            [Break::Repeated {
                at: 1_000,
                bytes: 100
            }]
        );
        let mut dirty = bytes(content, 0, 1_000);
        dirty[500] ^= 1;
        let found = breaks(&[&dirty]);
        assert!(
            matches!(found.as_slice(), [Break::Damaged { .. }]),
            "{found:?}"
        );
    }
}
