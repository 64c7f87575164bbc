//! The input log: every packet of the clients, before the service has it.

use crate::LinkError;
use unbroken_sys::shared::{Consumer, Producer};
use unbroken_wire::exchange::InputLog;

const INPUT_LOG: &str = "the input log";

/// In front of each frame of the input log: its position.
const INPUT_HEADER_BYTES: usize = 8;

/// The writing end of the input log.
#[derive(Debug)]
pub struct InputLogWriter {
    producer: Producer,
}

impl InputLogWriter {
    pub(crate) fn new(producer: Producer) -> Self {
        Self { producer }
    }
}

impl InputLog for InputLogWriter {
    fn has_room(&self, most_bytes: usize) -> bool {
        self.producer.room_bytes() >= INPUT_HEADER_BYTES + most_bytes
    }

    fn append(&mut self, position: u64, frame: &[u8]) -> bool {
        let length_bytes = INPUT_HEADER_BYTES + frame.len();
        let Some(mut room) = self.producer.reserve(length_bytes) else {
            return false;
        };
        room[..INPUT_HEADER_BYTES].copy_from_slice(&position.to_le_bytes());
        room[INPUT_HEADER_BYTES..length_bytes].copy_from_slice(frame);
        room.publish(length_bytes);
        true
    }
}

/// The reading end of the input log.
#[derive(Debug)]
pub struct InputLogReader {
    consumer: Consumer,
}

impl InputLogReader {
    pub(crate) fn new(consumer: Consumer) -> Self {
        Self { consumer }
    }

    /// The oldest frame that was not consumed, and its position.
    pub fn peek(&mut self) -> Result<Option<(u64, &[u8])>, LinkError> {
        let ring_error = |source| LinkError::Ring {
            log: INPUT_LOG,
            source,
        };
        let Some(record) = self.consumer.peek().map_err(ring_error)? else {
            return Ok(None);
        };
        match record.split_first_chunk::<INPUT_HEADER_BYTES>() {
            Some((position, frame)) => Ok(Some((u64::from_le_bytes(*position), frame))),
            None => Err(LinkError::Malformed {
                log: INPUT_LOG,
                length_bytes: record.len(),
            }),
        }
    }

    pub fn consume(&mut self) -> Result<(), LinkError> {
        self.consumer.consume().map_err(|source| LinkError::Ring {
            log: INPUT_LOG,
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unbroken_sys::shared::RingMemory;

    fn ends() -> (InputLogWriter, InputLogReader) {
        let ring = RingMemory::create("unbroken-input-log-test", 1 << 16).unwrap();
        (
            InputLogWriter::new(ring.producer().unwrap()),
            InputLogReader::new(ring.consumer().unwrap()),
        )
    }

    #[test]
    fn positions_and_frames_come_back() {
        let (mut writer, mut reader) = ends();
        assert!(writer.append(41, b"first") && writer.append(42, b"second"));
        assert_eq!(reader.peek().unwrap(), Some((41, &b"first"[..])));
        reader.consume().unwrap();
        assert_eq!(reader.peek().unwrap(), Some((42, &b"second"[..])));
        reader.consume().unwrap();
        assert_eq!(reader.peek().unwrap(), None);
    }

    #[test]
    fn a_full_log_refuses_and_has_room_again_later() {
        let (mut writer, mut reader) = ends();
        let frame = vec![7; 40_000];
        assert!(writer.append(1, &frame));
        assert!(!writer.has_room(frame.len()) && !writer.append(2, &frame));
        reader.consume().unwrap();
        assert!(writer.has_room(frame.len()) && writer.append(2, &frame));
    }
}
