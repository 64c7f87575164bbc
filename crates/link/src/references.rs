//! References to files on their way: what a name of a record means, whatever becomes of the name.
//!
//! A reference is a descriptor of the file itself (`O_PATH`), which no shared memory can hold: it
//! goes as a message of its own, ahead of the record that names it, through a socket that holds what
//! was sent when the sender has died. The record says how many messages belong to it, so a standby
//! makes no call for a record that has none, and never waits: what is not there when the record is
//! was not sent. Messages that no record counts, of a primary that died in between, end with the
//! link.

use crate::LinkError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use unbroken_image::FileIdentity;
use unbroken_sys::channel::{Channel, DESCRIPTORS_MAX};

/// The file that an identity means. Whoever sends it may have the descriptor for other ends, too.
pub type Reference = (FileIdentity, Arc<OwnedFd>);

/// In a message, for each of its descriptors: device and inode.
const KEY_BYTES: usize = 16;

/// The sending end. Nothing is sent but with a room in the journal, whose record counts it.
#[derive(Debug)]
pub(crate) struct ReferenceWriter {
    channel: Channel,
    /// Messages that no record has counted yet.
    pub(crate) uncounted: u64,
}

impl ReferenceWriter {
    pub(crate) fn new(channel: Channel) -> Self {
        Self {
            channel,
            uncounted: 0,
        }
    }

    /// Sends from the end of `waiting` what there is room for, and takes it out.
    pub(crate) fn send(&mut self, waiting: &mut Vec<Reference>) -> io::Result<()> {
        while !waiting.is_empty() {
            let message = &waiting[waiting.len().saturating_sub(DESCRIPTORS_MAX)..];
            let mut keys = Vec::with_capacity(message.len() * KEY_BYTES);
            for (FileIdentity { device, inode }, _) in message {
                keys.extend(device.to_le_bytes());
                keys.extend(inode.to_le_bytes());
            }
            let descriptors: Vec<BorrowedFd<'_>> =
                message.iter().map(|(_, file)| file.as_fd()).collect();
            match self.channel.try_send(&keys, &descriptors) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                sent => sent?,
            }
            self.uncounted += 1;
            waiting.truncate(waiting.len() - descriptors.len());
        }
        Ok(())
    }

    /// Waits until there is room again, at most `timeout`; returns whether there is.
    pub(crate) fn wait_for_room(&self, timeout: Duration) -> io::Result<bool> {
        let mut watched = [PollFd::new(&self.channel, PollFlags::OUT)];
        let timeout = Timespec {
            tv_sec: timeout.as_secs().cast_signed(),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        match poll(&mut watched, Some(&timeout)) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// The receiving end.
#[derive(Debug)]
pub struct ReferenceReader {
    channel: Channel,
}

impl ReferenceReader {
    pub(crate) fn new(channel: Channel) -> Self {
        Self { channel }
    }

    /// What came with a record that counts `messages`, in the order in which records are read.
    pub fn receive(&self, messages: u64) -> Result<Vec<(FileIdentity, OwnedFd)>, LinkError> {
        let mut references = Vec::new();
        for _ in 0..messages {
            let mut keys = [0; DESCRIPTORS_MAX * KEY_BYTES];
            let received = self.channel.try_receive(&mut keys);
            let received = received.map_err(|source| LinkError::References { source })?;
            let (keys, rest) = keys[..received.length_bytes].as_chunks::<KEY_BYTES>();
            if !rest.is_empty() || keys.len() != received.descriptors.len() || keys.is_empty() {
                let source = io::ErrorKind::InvalidData.into();
                return Err(LinkError::References { source });
            }
            let identities = keys.iter().map(identity_of);
            references.extend(identities.zip(received.descriptors));
        }
        Ok(references)
    }
}

fn identity_of(key: &[u8; KEY_BYTES]) -> FileIdentity {
    let key = u128::from_le_bytes(*key);
    FileIdentity {
        device: key as u64,
        inode: (key >> 64) as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LocalLink;
    use std::fs::File;

    fn link() -> LocalLink {
        LocalLink::with_capacity(1 << 16, 1 << 12).unwrap()
    }

    fn files(inodes: impl Iterator<Item = u64>) -> Vec<Reference> {
        let file = |inode| {
            let identity = FileIdentity { device: 5, inode };
            (identity, Arc::new(File::open("/dev/null").unwrap().into()))
        };
        inodes.map(file).collect()
    }

    fn inodes(references: &[(FileIdentity, OwnedFd)]) -> Vec<u64> {
        let mut inodes: Vec<u64> = references.iter().map(|(file, _)| file.inode).collect();
        inodes.sort_unstable();
        inodes
    }

    #[test]
    fn what_came_with_a_record_is_taken_with_it_and_others_need_no_call() {
        let link = link();
        let mut writer = link.journal_writer(1).unwrap();
        let (mut reader, arrivals) = (
            link.journal_reader(1).unwrap(),
            link.reference_reader().unwrap(),
        );
        for sent in [0, 1, 300, 0] {
            let mut room = writer.reserve(10).unwrap();
            let mut waiting = files(0..sent);
            room.attach(&mut waiting).unwrap();
            assert!(waiting.is_empty());
            room.publish_part(0, 0);
        }
        for (sent, messages) in [(0, 0), (1, 1), (300, 2), (0, 0)] {
            let entry = reader.peek().unwrap().unwrap();
            assert_eq!(entry.messages, messages);
            let came = arrivals.receive(messages).unwrap();
            assert_eq!(inodes(&came), (0..sent).collect::<Vec<u64>>());
            assert!(came.iter().all(|(file, _)| file.device == 5));
            reader.consume().unwrap();
        }
    }

    /// The primary dies, or fails, between the sending and the publication.
    #[test]
    fn what_was_sent_ahead_of_nothing_belongs_to_no_record() {
        let link = link();
        let mut writer = link.journal_writer(1).unwrap();
        let (mut reader, arrivals) = (
            link.journal_reader(1).unwrap(),
            link.reference_reader().unwrap(),
        );
        writer.reserve(10).unwrap().publish_part(0, 0);
        let room = writer.reserve(10);
        room.unwrap().attach(&mut files(7..8)).unwrap();
        drop(writer);
        assert_eq!(reader.peek().unwrap().unwrap().messages, 0);
        reader.consume().unwrap();
        assert!(reader.peek().unwrap().is_none());
        drop(link);
        // Still there, and dropped with the link.
        assert_eq!(inodes(&arrivals.receive(1).unwrap()), [7]);
    }

    /// A record that is given up leaves what was sent ahead of it to the next, so that none is taken
    /// for another's.
    #[test]
    fn what_was_sent_ahead_of_a_record_that_was_given_up_comes_with_the_next() {
        let link = link();
        let mut writer = link.journal_writer(1).unwrap();
        let (mut reader, arrivals) = (
            link.journal_reader(1).unwrap(),
            link.reference_reader().unwrap(),
        );
        let given_up = writer.reserve(10);
        given_up.unwrap().attach(&mut files(7..8)).unwrap();
        assert!(writer.owes_record());
        let mut room = writer.reserve(10).unwrap();
        room.attach(&mut files(8..9)).unwrap();
        room.publish_part(0, 0);
        assert!(!writer.owes_record());
        let messages = reader.peek().unwrap().unwrap().messages;
        assert_eq!(inodes(&arrivals.receive(messages).unwrap()), [7, 8]);
    }

    #[test]
    fn what_a_full_socket_does_not_take_goes_with_the_next_record() {
        const ALL: u64 = 20_000;
        let link = link();
        let mut writer = link.journal_writer(1).unwrap();
        let (mut reader, arrivals) = (
            link.journal_reader(1).unwrap(),
            link.reference_reader().unwrap(),
        );
        // One descriptor would do, but not for the kernel, which counts those on their way.
        let mut waiting = files(0..ALL / 20);
        let (mut came, mut records, mut sent) = (Vec::new(), 0, waiting.len() as u64);
        while !waiting.is_empty() || sent < ALL {
            if waiting.len() < 500 && sent < ALL {
                waiting.extend(files(sent..sent + 500));
                sent += 500;
            }
            let mut room = writer.reserve(10).unwrap();
            let before = waiting.len();
            room.attach(&mut waiting).unwrap();
            room.publish_part(0, 0);
            if before == waiting.len() {
                assert!(!writer.wait_for_reference_room(Duration::ZERO).unwrap());
                take_all(&mut reader, &arrivals, &mut came);
                assert!(writer.wait_for_reference_room(Duration::ZERO).unwrap());
                records += 1;
            }
        }
        take_all(&mut reader, &arrivals, &mut came);
        assert!(records > 0, "the socket was never full");
        assert_eq!(came.len() as u64, ALL);
    }

    fn take_all(
        reader: &mut crate::JournalReader,
        arrivals: &ReferenceReader,
        came: &mut Vec<u64>,
    ) {
        while let Some(messages) = reader.peek().unwrap().map(|entry| entry.messages) {
            came.extend(inodes(&arrivals.receive(messages).unwrap()));
            reader.consume().unwrap();
        }
    }

    #[test]
    fn what_is_not_there_is_not_waited_for() {
        let arrivals = link().reference_reader().unwrap();
        assert!(matches!(
            arrivals.receive(1),
            Err(LinkError::References { .. })
        ));
    }
}
