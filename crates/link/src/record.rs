//! What travels from the primary to the standby through the journal: this, encoded, behind the
//! page content that it describes.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use unbroken_image::{Birth, Epoch, FileIdentity, MemoryDelta, Pid};
use unbroken_wire::flows::Connections;

/// One step of the replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Record {
    /// A process that the service has: nothing of it comes before this. Like memory, it is taken in
    /// at once during a fill, later with the epoch that follows.
    Birth(Birth),
    /// Memory sent ahead of an epoch, while the service runs or because one record cannot hold it
    /// all. During a fill it is applied at once, later with the epoch that follows.
    Memory { pid: Pid, memory: MemoryDelta },
    /// Nothing but references, which are more than one record can bring.
    References,
    /// A committed epoch, what the wire found out since the one before, and the files of which a
    /// reference is not needed any more.
    Epoch {
        epoch: Box<Epoch>,
        connections: Connections,
        released: Vec<FileIdentity>,
    },
    /// The primary is done and releases nothing more: take over from the last epoch.
    TakeOver(Cause),
    /// The service ended by itself or goes on without this standby: the replica is void.
    Retire,
}

/// Why the standby is to take over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// Somebody killed the service with this signal.
    Killed(i32),
    /// A fault of its own ended the service with this signal.
    Crashed(i32),
    /// The user asked for it, and waits for the answer.
    Switchover(Asker),
    /// The primary died.
    PrimaryDied,
}

/// Who asked for something over the control socket: where the answer goes. Any process that holds
/// that socket may answer, so the value can be handed to the next primary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asker {
    pub path: PathBuf,
    /// Of the request.
    pub number: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use unbroken_image::{Mark, decode, encode_into};

    /// The corpus has records of real services.
    #[test]
    fn fuzz_records() {
        let epoch = Epoch {
            term: 1,
            sequence: 2,
            mark: Mark { input_position: 3 },
            processes: Vec::new(),
            objects: Vec::new(),
            interests: Vec::new(),
            gone: Vec::new(),
        };
        let records = [
            Record::Epoch {
                epoch: Box::new(epoch),
                connections: Connections::default(),
                released: vec![FileIdentity {
                    device: 1,
                    inode: 2,
                }],
            },
            Record::References,
            Record::Birth(Birth {
                pid: Pid(4),
                parent: Pid(1),
                session: Pid(3),
                process_group: Pid(3),
            }),
            Record::Memory {
                pid: Pid(2),
                memory: MemoryDelta::default(),
            },
            Record::TakeOver(Cause::Killed(9)),
            Record::Retire,
        ];
        let samples = records.map(|record| {
            let mut bytes = Vec::new();
            encode_into(&record, &mut bytes);
            bytes
        });
        unbroken_fuzz::bytes("record", &samples, |bytes| {
            let Ok(record) = decode::<Record>("a record", bytes) else {
                return;
            };
            // What was read can be written.
            encode_into(&record, &mut Vec::new());
        });
    }
}
