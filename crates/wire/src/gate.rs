//! Output waits here until the epoch that it belongs to is committed (I1).
//!
//! The gate has no way out but two: [`Gate::release`] wants a [`Committed`], which only a link's
//! commit makes, and a permit of a protected role; [`Gate::pass`] wants a permit of an unprotected
//! one. What may go is taken as [`ReleasedFrame`]s, which nothing else makes, and the clients' side
//! of the wire sends nothing but these, what `merge` joined of them, and what `craft` built.

use crate::frames::FrameQueue;
use std::collections::VecDeque;
use unbroken_core::epoch::{Committed, EpochNumber};
use unbroken_core::role::{PassPermit, ReleasePermit};

/// What a frame at the gate is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputKind {
    /// A packet to a client, virtio network header included.
    Packet = 0,
    StandardOutput = 1,
    StandardError = 2,
}

impl OutputKind {
    fn of(kind: u8) -> Self {
        match kind {
            1 => OutputKind::StandardOutput,
            2 => OutputKind::StandardError,
            _ => OutputKind::Packet,
        }
    }
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReleaseError {
    #[error("release epoch {sequence} of term {term}: this gate holds output of term {own_term}")]
    OtherTerm {
        term: u64,
        sequence: u64,
        own_term: u64,
    },
    #[error("release epoch {sequence} of term {term}: its mark was never taken at this gate")]
    NeverClosed { term: u64, sequence: u64 },
}

/// The end of an epoch's output: frames before this number belong to it or to earlier ones.
#[derive(Clone, Copy, Debug)]
struct Mark {
    sequence: u64,
    end: u64,
}

/// See the module. Times are nanoseconds of the caller's monotonic clock.
#[derive(Debug)]
pub struct Gate {
    frames: FrameQueue,
    open: EpochNumber,
    /// Closed epochs that are not released, oldest first.
    marks: VecDeque<Mark>,
    /// Frames before this number may go.
    released_end: u64,
}

impl Gate {
    /// A gate that holds at most `capacity_bytes`. Epoch 1 of `term` is open.
    pub fn new(capacity_bytes: usize, term: u64) -> Self {
        Self {
            frames: FrameQueue::with_capacity(capacity_bytes),
            open: EpochNumber { term, sequence: 1 },
            marks: VecDeque::with_capacity(64),
            released_end: 0,
        }
    }

    /// Whether a frame of `most_bytes` fits. When not, leave output where it is: the kernel holds
    /// it, and what is read later belongs to a later epoch, which is always safe.
    pub fn has_room(&self, most_bytes: usize) -> bool {
        self.frames.has_room(most_bytes)
    }

    /// Holds a frame as output of the open epoch; false when there is no room.
    #[must_use]
    pub fn hold(&mut self, kind: OutputKind, now_ns: u64, bytes: &[u8]) -> bool {
        self.frames.push(kind as u8, now_ns, bytes)
    }

    /// Lets `read` put a frame of up to `most_bytes` straight into the gate, and shows it. `None`
    /// when there is no room or `read` had nothing.
    pub fn hold_with<E>(
        &mut self,
        kind: OutputKind,
        now_ns: u64,
        most_bytes: usize,
        read: impl FnOnce(&mut [u8]) -> Result<Option<usize>, E>,
    ) -> Result<Option<&[u8]>, E> {
        self.frames.push_with(kind as u8, now_ns, most_bytes, read)
    }

    /// Takes the mark: all output held so far belongs to the epoch returned or to earlier ones,
    /// all that follows to the next. Call it while the service is stopped, after its output is
    /// drained.
    pub fn close_epoch(&mut self) -> EpochNumber {
        let closed = self.open;
        self.marks.push_back(Mark {
            sequence: closed.sequence,
            end: self.frames.pushed(),
        });
        self.open.sequence += 1;
        closed
    }

    /// Takes the newest mark back, because its epoch was never published: its output belongs to
    /// the next one. Panics when no epoch is closed.
    pub fn reopen_epoch(&mut self) -> EpochNumber {
        let mark = self
            .marks
            .pop_back()
            .expect("only a closed epoch can be opened again");
        self.open.sequence = mark.sequence;
        self.open
    }

    /// Begins epoch 1 of a new standby under `term`, which is no older than the gate's. Output that
    /// waits stays; closed epochs are forgotten, as no commit of theirs can come any more.
    pub fn restart(&mut self, term: u64) {
        self.marks.clear();
        self.open = EpochNumber {
            term: term.max(self.open.term),
            sequence: 1,
        };
    }

    /// Lets the output of a committed epoch go, and of those before it.
    pub fn release(
        &mut self,
        committed: Committed,
        permit: ReleasePermit<'_>,
    ) -> Result<(), ReleaseError> {
        let EpochNumber { term, sequence } = committed.epoch();
        if term != self.open.term || term != permit.term() {
            return Err(ReleaseError::OtherTerm {
                term,
                sequence,
                own_term: self.open.term,
            });
        }
        if sequence >= self.open.sequence {
            return Err(ReleaseError::NeverClosed { term, sequence });
        }
        while let Some(mark) = self.marks.front().filter(|mark| mark.sequence <= sequence) {
            self.released_end = self.released_end.max(mark.end);
            self.marks.pop_front();
        }
        Ok(())
    }

    /// Lets all output go that is held now, because the service is unprotected.
    pub fn pass(&mut self, _permit: PassPermit<'_>) {
        self.released_end = self.frames.pushed();
    }

    /// What may go and has not gone yet, oldest first.
    pub fn released(&mut self) -> Released<'_> {
        Released { gate: self }
    }

    /// Whether output waits that no closed epoch covers: the open epoch should be closed soon.
    pub fn open_epoch_has_output(&self) -> bool {
        let closed_end = self.marks.back().map_or(self.released_end, |mark| mark.end);
        self.frames.pushed() > closed_end.max(self.released_end)
    }
}

/// A frame that may go. Only a gate makes one, after a commit or with a permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReleasedFrame<'a> {
    kind: OutputKind,
    bytes: &'a [u8],
}

impl<'a> ReleasedFrame<'a> {
    pub fn kind(&self) -> OutputKind {
        self.kind
    }

    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

/// Takes released frames off the gate. One that could not be written stays for the next time.
#[derive(Debug)]
pub struct Released<'a> {
    gate: &'a mut Gate,
}

impl Released<'_> {
    /// The oldest released frame.
    pub fn peek(&self) -> Option<ReleasedFrame<'_>> {
        if self.gate.frames.popped() >= self.gate.released_end {
            return None;
        }
        let frame = self.gate.frames.front()?;
        Some(ReleasedFrame {
            kind: OutputKind::of(frame.kind),
            bytes: frame.bytes,
        })
    }

    /// All released frames, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = ReleasedFrame<'_>> {
        let count = self
            .gate
            .released_end
            .saturating_sub(self.gate.frames.popped());
        let frames = self.gate.frames.iter().take(count as usize);
        frames.map(|frame| ReleasedFrame {
            kind: OutputKind::of(frame.kind),
            bytes: frame.bytes,
        })
    }

    /// Takes off what [`peek`](Self::peek) shows, which is out as of `now_ns`, and says how long it
    /// was held, in nanoseconds. `None`, and nothing happens, when there is none.
    pub fn pop(&mut self, now_ns: u64) -> Option<u64> {
        self.peek()?;
        let held_ns = now_ns.saturating_sub(self.gate.frames.front()?.stamp);
        self.gate.frames.pop();
        Some(held_ns)
    }
}

#[cfg(test)]
mod tests;
