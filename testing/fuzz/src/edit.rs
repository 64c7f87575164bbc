//! Edits of samples.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

/// No input is longer than this, whatever the edits do.
const LONGEST_BYTES: usize = 256 << 10;

/// Words at which arithmetic goes wrong.
const WORDS: [u64; 16] = [
    0,
    1,
    3,
    4,
    16,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 47,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// Numbers at which texts go wrong: too large for their type, of the wrong sign, of no sense.
const NUMBERS: [&str; 14] = [
    "",
    "0",
    "-1",
    "64",
    "255",
    "65536",
    "2147483648",
    "-2147483648",
    "4294967296",
    "7fffffffffffffff",
    "18446744073709551615",
    "ffffffffffffffff",
    "99999999999999999999999",
    "1é",
];

/// One edit. An index counts in what is there when its edit is made.
#[derive(Debug, Clone)]
pub enum Edit {
    /// Goes on with another sample instead.
    Sample(Index),
    Bit(Index, u8),
    Insert(Index, Vec<u8>),
    Remove(Index, u16),
    Repeat(Index, u16),
    Cut(Index),
    /// Puts a word over what is there.
    Word {
        at: Index,
        width: u8,
        value: usize,
        big_endian: bool,
    },
    /// The end of another sample from there on.
    Splice(Index, Index, Index),
    /// The number that stands there in a text becomes another.
    Number(Index, usize),
    Line(Index, Change),
    Field(Index, Change),
}

#[derive(Debug, Clone, Copy)]
pub enum Change {
    Drop,
    Twice,
    Empty,
    ToTheEnd,
}

impl Edit {
    /// A sample and a few edits of it.
    pub fn sequences() -> impl Strategy<Value = Vec<Edit>> {
        let first = any::<Index>().prop_map(Edit::Sample);
        (first, vec(Self::any(), 1..8)).prop_map(|(first, mut rest)| {
            rest.insert(0, first);
            rest
        })
    }

    fn any() -> impl Strategy<Value = Edit> {
        let change = || {
            prop_oneof![
                Just(Change::Drop),
                Just(Change::Twice),
                Just(Change::Empty),
                Just(Change::ToTheEnd)
            ]
        };
        let word = (any::<Index>(), 0..4u8, 0..WORDS.len(), any::<bool>());
        prop_oneof![
            (any::<Index>(), 0..8u8).prop_map(|(at, bit)| Edit::Bit(at, bit)),
            (any::<Index>(), vec(any::<u8>(), 1..20))
                .prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
            (any::<Index>(), 1..64u16).prop_map(|(at, count)| Edit::Remove(at, count)),
            (any::<Index>(), 1..2000u16).prop_map(|(at, count)| Edit::Repeat(at, count)),
            any::<Index>().prop_map(Edit::Cut),
            word.prop_map(|(at, width, value, big_endian)| Edit::Word {
                at,
                width: 1 << width,
                value,
                big_endian,
            }),
            (any::<Index>(), any::<Index>(), any::<Index>())
                .prop_map(|(at, other, from)| Edit::Splice(at, other, from)),
            (any::<Index>(), 0..NUMBERS.len()).prop_map(|(at, to)| Edit::Number(at, to)),
            (any::<Index>(), change()).prop_map(|(at, change)| Edit::Line(at, change)),
            (any::<Index>(), change()).prop_map(|(at, change)| Edit::Field(at, change)),
        ]
    }
}

/// What comes of the edits.
pub fn apply(samples: &[Vec<u8>], edits: &[Edit]) -> Vec<u8> {
    let mut input = Vec::new();
    for edit in edits {
        apply_one(samples, edit, &mut input);
        input.truncate(LONGEST_BYTES);
    }
    input
}

fn apply_one(samples: &[Vec<u8>], edit: &Edit, input: &mut Vec<u8>) {
    // An index of nothing is none.
    let at = |index: &Index| index.index(input.len() + 1);
    match edit {
        Edit::Sample(index) => *input = samples[index.index(samples.len())].clone(),
        Edit::Bit(index, bit) => {
            let at = at(index);
            if let Some(byte) = input.get_mut(at) {
                *byte ^= 1 << bit;
            }
        }
        Edit::Insert(index, bytes) => {
            let at = at(index);
            input.splice(at..at, bytes.iter().copied());
        }
        Edit::Remove(index, count) => {
            let at = at(index);
            let end = (at + usize::from(*count)).min(input.len());
            input.drain(at..end);
        }
        Edit::Repeat(index, count) => {
            let at = at(index);
            let end = (at + usize::from(*count)).min(input.len());
            let piece = input[at..end].to_vec();
            input.splice(end..end, piece);
        }
        Edit::Cut(index) => input.truncate(at(index)),
        Edit::Word {
            at: index,
            width,
            value,
            big_endian,
        } => {
            let word = WORDS[*value];
            let (little, big) = (word.to_le_bytes(), word.to_be_bytes());
            let width = usize::from(*width);
            let bytes = if *big_endian {
                &big[8 - width..]
            } else {
                &little[..width]
            };
            let at = at(index);
            for (target, byte) in input[at..].iter_mut().zip(bytes) {
                *target = *byte;
            }
        }
        Edit::Splice(index, other, from) => {
            input.truncate(at(index));
            let other = &samples[other.index(samples.len())];
            input.extend_from_slice(&other[from.index(other.len() + 1)..]);
        }
        Edit::Number(index, to) => replace_number(input, index, NUMBERS[*to]),
        Edit::Line(index, change) => change_piece(input, index, b'\n', *change),
        Edit::Field(index, change) => change_piece(input, index, b' ', *change),
    }
}

fn replace_number(input: &mut Vec<u8>, index: &Index, to: &str) {
    let starts: Vec<usize> = (0..input.len())
        .filter(|&at| input[at].is_ascii_digit())
        .filter(|&at| at == 0 || !input[at - 1].is_ascii_hexdigit())
        .collect();
    if starts.is_empty() {
        return;
    }
    let start = starts[index.index(starts.len())];
    let length = input[start..]
        .iter()
        .take_while(|byte| byte.is_ascii_hexdigit())
        .count();
    input.splice(start..start + length, to.bytes());
}

fn change_piece(input: &mut Vec<u8>, index: &Index, separator: u8, change: Change) {
    let mut pieces: Vec<Vec<u8>> = input
        .split(|byte| *byte == separator)
        .map(<[u8]>::to_vec)
        .collect();
    let at = index.index(pieces.len());
    match change {
        Change::Drop => drop(pieces.remove(at)),
        Change::Twice => pieces.insert(at, pieces[at].clone()),
        Change::Empty => pieces[at].clear(),
        Change::ToTheEnd => {
            let piece = pieces.remove(at);
            pieces.push(piece);
        }
    }
    *input = pieces.join(&separator);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::test_runner::TestRunner;

    #[test]
    fn no_edit_panics_whatever_is_left_of_the_sample() {
        let samples = [Vec::new(), b"a 1\nb 22".to_vec()];
        let checked = TestRunner::default().run(&Edit::sequences(), |edits| {
            prop_assert!(apply(&samples, &edits).len() <= LONGEST_BYTES);
            Ok(())
        });
        checked.unwrap();
    }

    #[test]
    fn a_number_is_replaced_whole() {
        let checked = TestRunner::default().run(&any::<Index>(), |index| {
            let mut text = b"inode: 4711 flags".to_vec();
            replace_number(&mut text, &index, "-1");
            prop_assert_eq!(text, b"inode: -1 flags");
            Ok(())
        });
        checked.unwrap();
    }
}
