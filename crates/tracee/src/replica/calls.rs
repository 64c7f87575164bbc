//! Batches of calls in a process of the replica, with what each must return.

use super::ReplicaError;
use crate::{Batch, BatchedCall, HostTid, RemoteAddr, Stopped, TraceError};

/// What a call must return for the replica to be what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expect {
    Success,
    Value(u64),
    /// Whatever it returns: the caller looks, or it does not matter.
    Anything,
}

/// A batch in the making.
pub(super) struct Calls<'stopped, 'tree> {
    batch: Batch<'stopped, 'tree>,
    expected: Vec<(BatchedCall, Expect, &'static str)>,
    tid: HostTid,
}

/// Calls that one item may add.
const CALLS_FOR_AN_ITEM: usize = 10;

impl<'stopped, 'tree> Calls<'stopped, 'tree> {
    pub(super) fn new(stopped: &'stopped mut Stopped<'tree>, tid: HostTid) -> Self {
        let batch = stopped.remote(tid).in_stub();
        Calls {
            batch,
            expected: Vec::new(),
            tid,
        }
    }

    pub(super) fn add(
        &mut self,
        name: &'static str,
        number: i64,
        arguments: &[u64],
        expect: Expect,
    ) -> Result<BatchedCall, ReplicaError> {
        let batched = self.batch.call(number, arguments)?;
        self.expected.push((batched, expect, name));
        Ok(batched)
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Result<RemoteAddr, ReplicaError> {
        Ok(self.batch.scratch(bytes)?)
    }

    pub(super) fn words(&mut self, words: &[u64]) -> Result<RemoteAddr, ReplicaError> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.bytes(&bytes)
    }

    pub(super) fn string(&mut self, text: &[u8]) -> Result<RemoteAddr, ReplicaError> {
        Ok(self.batch.scratch_string(text)?)
    }

    pub(super) fn reserve(&mut self, length_bytes: usize) -> Result<RemoteAddr, ReplicaError> {
        Ok(self.batch.reserve(length_bytes)?)
    }

    /// Makes the calls. The values of all, in order, if each returned what it must.
    pub(super) fn run(self) -> Result<Vec<u64>, ReplicaError> {
        let tid = self.tid;
        if self.expected.is_empty() {
            return Ok(Vec::new());
        }
        let results = self.batch.run()?;
        let mut values = Vec::with_capacity(self.expected.len());
        for (batched, expect, call) in self.expected {
            let result = results.get(batched);
            match (expect, result) {
                (Expect::Anything, Err(error)) => {
                    values.push(-i64::from(error.raw_os_error().unwrap_or(0)) as u64);
                }
                (_, Err(source)) => return Err(ReplicaError::Call { call, tid, source }),
                (Expect::Value(wanted), Ok(value)) if value != wanted => {
                    return Err(ReplicaError::WrongResult {
                        call,
                        tid,
                        wanted,
                        value,
                    });
                }
                (_, Ok(value)) => values.push(value),
            }
        }
        Ok(values)
    }
}

/// Makes calls for every item, in as few batches as their room allows. `add` must put its bytes
/// in place before its first call, so that an item that does not fit leaves nothing half done.
pub(super) fn for_each<T>(
    stopped: &mut Stopped<'_>,
    tid: HostTid,
    items: &[T],
    add: impl FnMut(&mut Calls<'_, '_>, &T) -> Result<(), ReplicaError>,
) -> Result<(), ReplicaError> {
    values_of_each(stopped, tid, items, add).map(drop)
}

/// As [`for_each`], and returns the values of all calls, in order.
pub(super) fn values_of_each<T>(
    stopped: &mut Stopped<'_>,
    tid: HostTid,
    items: &[T],
    mut add: impl FnMut(&mut Calls<'_, '_>, &T) -> Result<(), ReplicaError>,
) -> Result<Vec<u64>, ReplicaError> {
    let (mut next, mut values) = (0, Vec::new());
    while next < items.len() {
        let mut calls = Calls::new(stopped, tid);
        let first = next;
        while next < items.len() && calls.batch.calls_left() >= CALLS_FOR_AN_ITEM {
            match add(&mut calls, &items[next]) {
                Ok(()) => next += 1,
                Err(ReplicaError::Trace(TraceError::BatchFull { .. })) if next > first => break,
                Err(error) => return Err(error),
            }
        }
        values.append(&mut calls.run()?);
    }
    Ok(values)
}
