//! A queue of byte strings in one buffer: no allocation a frame, each frame contiguous.

/// A frame in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The caller's mark of what this is.
    pub kind: u8,
    /// The caller's number for it: a time or a position.
    pub stamp: u64,
    pub bytes: &'a [u8],
}

/// In front of each frame: stamp, length, kind.
const HEADER_BYTES: usize = 16;

/// First in, first out. Frames lie one after the other; one that does not fit before the buffer's
/// end begins at its start again.
#[derive(Debug, Default)]
pub struct FrameQueue {
    buffer: Vec<u8>,
    /// Where the oldest frame begins.
    front: usize,
    /// Where the next frame will begin.
    back: usize,
    /// Where the frames before the wrap end, when `back` has wrapped and `front` has not.
    wrapped_at: Option<usize>,
    popped: u64,
    pushed: u64,
}

impl FrameQueue {
    /// A queue of at most `capacity_bytes`, which are taken at once and never grow by themselves.
    pub fn with_capacity(capacity_bytes: usize) -> Self {
        Self {
            buffer: vec![0; capacity_bytes],
            ..Self::default()
        }
    }

    /// How many frames were ever pushed: the number of the next one.
    pub fn pushed(&self) -> u64 {
        self.pushed
    }

    /// How many frames were ever taken off: the number of the oldest one there.
    pub fn popped(&self) -> u64 {
        self.popped
    }

    pub fn is_empty(&self) -> bool {
        self.pushed == self.popped
    }

    /// Whether a frame of `most_bytes` would fit.
    pub fn has_room(&self, most_bytes: usize) -> bool {
        self.place(most_bytes).is_some()
    }

    /// Appends a frame; false when there is no room.
    #[must_use]
    pub fn push(&mut self, kind: u8, stamp: u64, bytes: &[u8]) -> bool {
        let copy = |room: &mut [u8]| -> Result<_, std::convert::Infallible> {
            room.copy_from_slice(bytes);
            Ok(Some(bytes.len()))
        };
        matches!(self.push_with(kind, stamp, bytes.len(), copy), Ok(Some(_)))
    }

    /// Lets `fill` write a frame of up to `most_bytes` in place and say how long it is; the frame,
    /// or `None` when there was no room or `fill` had nothing.
    pub fn push_with<E>(
        &mut self,
        kind: u8,
        stamp: u64,
        most_bytes: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<Option<usize>, E>,
    ) -> Result<Option<&[u8]>, E> {
        let Some(start) = self.place(most_bytes) else {
            return Ok(None);
        };
        let data = start + HEADER_BYTES;
        let Some(length_bytes) = fill(&mut self.buffer[data..data + most_bytes])? else {
            return Ok(None);
        };
        let length_bytes = length_bytes.min(most_bytes);
        self.write_header(start, kind, stamp, length_bytes);
        if start < self.back {
            self.wrapped_at = Some(self.back);
        }
        if self.is_empty() {
            (self.front, self.wrapped_at) = (start, None);
        }
        self.back = data + length_bytes;
        self.pushed += 1;
        Ok(Some(&self.buffer[data..data + length_bytes]))
    }

    /// The oldest frame.
    pub fn front(&self) -> Option<Frame<'_>> {
        (!self.is_empty()).then(|| self.frame_at(self.front))
    }

    /// Takes the oldest frame off; nothing happens when there is none.
    pub fn pop(&mut self) {
        let Some(frame) = self.front() else { return };
        let length_bytes = frame.bytes.len();
        self.front += HEADER_BYTES + length_bytes;
        if self.wrapped_at == Some(self.front) {
            (self.front, self.wrapped_at) = (0, None);
        }
        self.popped += 1;
    }

    /// All frames, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = Frame<'_>> {
        let mut at = self.front;
        (self.popped..self.pushed).map(move |_| {
            let frame = self.frame_at(at);
            at += HEADER_BYTES + frame.bytes.len();
            if self.wrapped_at == Some(at) {
                at = 0;
            }
            frame
        })
    }

    /// Makes room for a frame of `most_bytes` by a larger buffer if need be; false when that would
    /// be more than `limit_bytes`.
    #[must_use]
    pub fn grow_for(&mut self, most_bytes: usize, limit_bytes: usize) -> bool {
        while !self.has_room(most_bytes) {
            let wanted_bytes = (self.buffer.len() * 2).max(most_bytes + HEADER_BYTES);
            if wanted_bytes > limit_bytes {
                return false;
            }
            let mut larger = Self::with_capacity(wanted_bytes);
            for frame in self.iter() {
                // At least twice the room: every frame fits.
                let _ = larger.push(frame.kind, frame.stamp, frame.bytes);
            }
            (larger.pushed, larger.popped) = (self.pushed, self.popped);
            *self = larger;
        }
        true
    }

    fn write_header(&mut self, at: usize, kind: u8, stamp: u64, length_bytes: usize) {
        let length = (length_bytes as u64) << 8 | u64::from(kind);
        self.buffer[at..at + 8].copy_from_slice(&stamp.to_le_bytes());
        self.buffer[at + 8..at + HEADER_BYTES].copy_from_slice(&length.to_le_bytes());
    }

    fn frame_at(&self, at: usize) -> Frame<'_> {
        let word = |at: usize| {
            self.buffer[at..at + 8]
                .iter()
                .rev()
                .fold(0, |word, byte| word << 8 | u64::from(*byte))
        };
        let length = word(at + 8);
        let data = at + HEADER_BYTES;
        let bytes = &self.buffer[data..data + (length >> 8) as usize];
        Frame {
            kind: length as u8,
            stamp: word(at),
            bytes,
        }
    }

    /// Where a frame of `most_bytes` would go.
    fn place(&self, most_bytes: usize) -> Option<usize> {
        let needed = most_bytes.checked_add(HEADER_BYTES)?;
        if self.is_empty() {
            return (needed <= self.buffer.len()).then_some(0);
        }
        let has_wrapped = self.wrapped_at.is_some();
        let end = if has_wrapped {
            self.front
        } else {
            self.buffer.len()
        };
        if needed <= end - self.back {
            return Some(self.back);
        }
        // A wrapped queue must not fill up to `front` exactly by wrapping again.
        (!has_wrapped && needed <= self.front).then_some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        #[test]
        fn behaves_as_a_queue_of_vectors(
            steps in proptest::collection::vec((0..10u8, 0..120usize, any::<u8>()), 0..300),
        ) {
            let mut queue = FrameQueue::with_capacity(400);
            let mut model: VecDeque<(u8, u64, Vec<u8>)> = VecDeque::new();
            for (step, (action, length, kind)) in steps.into_iter().enumerate() {
                if action < 6 {
                    let bytes = vec![kind; length];
                    let room = queue.has_room(length);
                    prop_assert_eq!(queue.push(kind, step as u64, &bytes), room);
                    prop_assert!(room || !model.is_empty());
                    if room {
                        model.push_back((kind, step as u64, bytes));
                    }
                } else {
                    queue.pop();
                    model.pop_front();
                }
                let frames: Vec<_> =
                    queue.iter().map(|f| (f.kind, f.stamp, f.bytes.to_vec())).collect();
                prop_assert!(frames.iter().eq(model.iter()));
                prop_assert_eq!(queue.pushed() - queue.popped(), model.len() as u64);
                let first = queue.front().map(|f| f.stamp);
                prop_assert_eq!(first, model.front().map(|(_, stamp, _)| *stamp));
            }
        }
    }

    #[test]
    fn growing_keeps_frames_and_their_numbers() {
        let mut queue = FrameQueue::with_capacity(64);
        assert!(queue.push(1, 10, b"one"));
        queue.pop();
        assert!(queue.push(2, 20, b"two"));
        assert!(!queue.has_room(1000) && !queue.grow_for(1000, 500));
        assert!(queue.grow_for(1000, 10_000));
        assert!(queue.push(3, 30, &[9; 1000]));
        assert_eq!((queue.popped(), queue.pushed()), (1, 3));
        assert_eq!(
            queue.front().unwrap(),
            Frame {
                kind: 2,
                stamp: 20,
                bytes: b"two"
            }
        );
    }

    #[test]
    fn a_fill_that_has_nothing_leaves_nothing() {
        let mut queue = FrameQueue::with_capacity(64);
        assert_eq!(queue.push_with(0, 0, 10, |_| Ok::<_, ()>(None)), Ok(None));
        assert_eq!(queue.push_with(0, 0, 10, |_| Err(7)), Err(7));
        assert!(queue.is_empty());
    }
}
