//! Why a replica is not what it should be. Each of these makes it void: it is thrown away and
//! another is filled.

use crate::{HostTid, TraceError};
use std::io;
use unbroken_image::{FileIdentity, Pid, Tid};

#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    #[error("replica: {0}")]
    Trace(#[from] TraceError),

    #[error("replica: {call} in its thread {tid}: {source}")]
    Call {
        call: &'static str,
        tid: HostTid,
        source: io::Error,
    },

    #[error("replica: {call} in its thread {tid} returned {value:#x}, not {wanted:#x}")]
    WrongResult {
        call: &'static str,
        tid: HostTid,
        wanted: u64,
        value: u64,
    },

    #[error("replica: {operation}: {source}")]
    Own {
        operation: &'static str,
        source: io::Error,
    },

    #[error("replica: another file is mapped than {identity:?}, which the service has there")]
    WrongFile { identity: FileIdentity },

    #[error("replica: nothing refers to the file {identity:?}, which the epoch names")]
    UnknownFile { identity: FileIdentity },

    #[error("replica: the epoch names process {pid}, of which nothing is known")]
    UnknownProcess { pid: Pid },

    #[error("replica: the epoch has no {what} for thread {tid}, which is new")]
    Incomplete { what: &'static str, tid: Tid },

    #[error(
        "replica: the epoch has a page of process {pid} at {address:#x}, where nothing is mapped"
    )]
    UnmappedPage { pid: Pid, address: u64 },

    #[error("replica: the epoch names shared memory {identity:?}, which no mapping shows")]
    UnknownMemory { identity: FileIdentity },

    #[error(
        "replica: descriptors {missing} and above do not fit under the limit of {limit} open files"
    )]
    TooManyDescriptors { missing: u64, limit: u64 },

    #[error("replica: the epoch's pages and its page content differ in length")]
    WrongLength,

    #[error(
        "replica: no timer can be made under the number {number} on this kernel; boot Linux 6.15 or later"
    )]
    TimerNumber { number: i32 },

    #[error("replica: process {pid} goes on without its first thread, which no replica can")]
    LeaderGone { pid: Pid },
}

impl ReplicaError {
    pub(super) fn own(operation: &'static str) -> impl FnOnce(io::Error) -> ReplicaError {
        move |source| ReplicaError::Own { operation, source }
    }
}
