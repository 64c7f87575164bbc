//! A ring of records in shared memory: one producer, one consumer, in two processes or two threads.
//!
//! The blocks here rely on one protocol. `published` and `consumed` count bytes since the ring was
//! made (wrapping). The bytes from `consumed` to `published` belong to the consumer, which only
//! reads them; all other bytes belong to the producer. Only the producer moves `published`, with
//! Release, after the record is whole; only the consumer moves `consumed`, with Release, after its
//! borrow of the record has ended. Each end can be claimed once (a compare-and-swap on a word in
//! the header), so no second producer or consumer exists in any process. A producer that is killed
//! at any instruction therefore leaves whole records before `published` and scrap after it.
//!
//! The data area is mapped twice in a row, so every record is contiguous wherever it begins.
#![allow(unsafe_code)]

use super::{Mapping, length_of, require_seal, sealed_object};
use crate::futex;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

/// "UBRING" and the version of the layout.
const MAGIC: u64 = 0x5542_5249_4e47_0001;
/// The header takes one page, each word of it a cache line of its own.
const HEADER_BYTES: usize = 4096;
const MAGIC_AT: usize = 0;
const PRODUCER_CLAIM_AT: usize = 64;
const CONSUMER_CLAIM_AT: usize = 128;
const PUBLISHED_AT: usize = 192;
const CONSUMED_AT: usize = 256;
const DATA_BELL_AT: usize = 320;
const DATA_SLEEPERS_AT: usize = 384;
const ROOM_BELL_AT: usize = 448;
const ROOM_SLEEPERS_AT: usize = 512;

/// In front of each record: its length and its kind, 8 bytes each.
const RECORD_HEADER_BYTES: usize = 16;
const KIND_RECORD: u64 = 1;
const KIND_PADDING: u64 = 2;

/// An empty ring begins again at its start once it has come this far, so that small records keep
/// to memory that is in the cache and has been touched before.
const REWIND_AFTER_BYTES: u64 = 512 * 1024;

/// The memory of a ring, from which each end is claimed once.
#[derive(Clone, Debug)]
pub struct RingMemory {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    mapping: Mapping,
    fd: OwnedFd,
    capacity_bytes: u64,
    /// Nobody will take anything out any more. Known to this process alone.
    abandoned: AtomicBool,
}

impl RingMemory {
    /// Makes a ring of at least `capacity_bytes` (rounded up to a power of two of pages). Memory
    /// is taken as records first touch it.
    pub fn create(name: &str, capacity_bytes: usize) -> io::Result<Self> {
        let capacity_bytes = capacity_bytes.max(HEADER_BYTES).checked_next_power_of_two();
        let capacity_bytes = capacity_bytes.ok_or(io::ErrorKind::InvalidInput)?;
        let fd = sealed_object(name, HEADER_BYTES + capacity_bytes)?;
        let memory = Self::map(fd, capacity_bytes)?;
        memory
            .shared
            .mapping
            .word64(MAGIC_AT)
            .store(MAGIC, Ordering::Release);
        Ok(memory)
    }

    /// Maps a ring that another process made, from the descriptor that it handed over.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        require_seal(fd.as_fd())?;
        let capacity_bytes = length_of(&fd)?.saturating_sub(HEADER_BYTES);
        if capacity_bytes < HEADER_BYTES || !capacity_bytes.is_power_of_two() {
            return Err(invalid("shared memory whose length is no ring's"));
        }
        let memory = Self::map(fd, capacity_bytes)?;
        if memory
            .shared
            .mapping
            .word64(MAGIC_AT)
            .load(Ordering::Acquire)
            != MAGIC
        {
            return Err(invalid(
                "shared memory that holds no ring, or one of another version",
            ));
        }
        Ok(memory)
    }

    fn map(fd: OwnedFd, capacity_bytes: usize) -> io::Result<Self> {
        let mapping = Mapping::reserve(HEADER_BYTES + 2 * capacity_bytes)?;
        mapping.place(0, fd.as_fd(), 0, HEADER_BYTES + capacity_bytes)?;
        mapping.place(
            HEADER_BYTES + capacity_bytes,
            fd.as_fd(),
            HEADER_BYTES,
            capacity_bytes,
        )?;
        let shared = Shared {
            mapping,
            fd,
            capacity_bytes: capacity_bytes as u64,
            abandoned: AtomicBool::new(false),
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Becomes the producer; `AlreadyExists` when someone ever was. A ring whose producer died is
    /// read to its end and replaced, never written again.
    pub fn producer(&self) -> io::Result<Producer> {
        self.shared.claim(PRODUCER_CLAIM_AT, "producer")?;
        Ok(Producer {
            shared: Arc::clone(&self.shared),
        })
    }

    /// Becomes the consumer; `AlreadyExists` when someone ever was.
    pub fn consumer(&self) -> io::Result<Consumer> {
        self.shared.claim(CONSUMER_CLAIM_AT, "consumer")?;
        Ok(Consumer {
            shared: Arc::clone(&self.shared),
        })
    }

    /// Makes a consumer's sleep end early: for news that does not come through the ring.
    pub fn wake_consumer(&self) -> io::Result<()> {
        self.shared.ring(DATA_BELL_AT, DATA_SLEEPERS_AT)
    }

    /// The consumer is gone: a producer of this process that waits for room wakes up, and waits no
    /// more.
    pub fn abandon(&self) -> io::Result<()> {
        self.shared.abandoned.store(true, Ordering::SeqCst);
        self.shared.ring(ROOM_BELL_AT, ROOM_SLEEPERS_AT)
    }

    /// The longest record that fits when the ring is empty.
    pub fn largest_record_bytes(&self) -> usize {
        self.shared.capacity_bytes as usize - RECORD_HEADER_BYTES
    }
}

impl AsFd for RingMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.fd.as_fd()
    }
}

impl Shared {
    fn claim(&self, offset: usize, what: &str) -> io::Result<()> {
        let owner = std::process::id();
        self.mapping
            .word32(offset)
            .compare_exchange(0, owner, Ordering::AcqRel, Ordering::Acquire)
            .map(|_| ())
            .map_err(|holder| {
                let message = format!("the ring has had a {what} already, process {holder}");
                io::Error::new(io::ErrorKind::AlreadyExists, message)
            })
    }

    fn published(&self) -> &AtomicU64 {
        self.mapping.word64(PUBLISHED_AT)
    }

    fn consumed(&self) -> &AtomicU64 {
        self.mapping.word64(CONSUMED_AT)
    }

    fn offset_of(&self, position: u64) -> u64 {
        position & (self.capacity_bytes - 1)
    }

    /// Where `position` lies in the first mapping of the data.
    fn address(&self, position: u64, length_bytes: usize) -> *mut u8 {
        let offset = HEADER_BYTES + self.offset_of(position) as usize;
        self.mapping.at(offset, length_bytes, 1).as_ptr()
    }

    /// Wakes whoever sleeps on a bell; free when nobody does.
    fn ring(&self, bell_at: usize, sleepers_at: usize) -> io::Result<()> {
        // Orders the store of the position before the load of the sleepers; `sleep` has the
        // mirror image. Without it both sides could miss each other.
        fence(Ordering::SeqCst);
        if self.mapping.word32(sleepers_at).load(Ordering::SeqCst) != 0 {
            let bell = self.mapping.word32(bell_at);
            bell.fetch_add(1, Ordering::SeqCst);
            futex::wake(bell, i32::MAX)?;
        }
        Ok(())
    }

    /// Sleeps on a bell until `ready` says yes or the time is over; returns what it says.
    fn sleep(
        &self,
        (bell_at, sleepers_at): (usize, usize),
        timeout: Option<Duration>,
        ready: impl Fn() -> bool,
    ) -> io::Result<bool> {
        if ready() {
            return Ok(true);
        }
        let bell: &AtomicU32 = self.mapping.word32(bell_at);
        let sleepers = self.mapping.word32(sleepers_at);
        // One sleeper a bell. A sleeper that is killed leaves its 1 behind, which costs the other
        // side a needless wake and nothing else.
        sleepers.store(1, Ordering::SeqCst);
        let seen = bell.load(Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let outcome = if ready() {
            Ok(())
        } else {
            futex::wait(bell, seen, timeout).map(|_| ())
        };
        sleepers.store(0, Ordering::SeqCst);
        outcome.map(|()| ready())
    }
}

/// The writing end.
#[derive(Debug)]
pub struct Producer {
    shared: Arc<Shared>,
}

impl Producer {
    /// Takes room for a record of up to `most_bytes`; `None` while the consumer is too far behind
    /// (or for ever, when `most_bytes` is above [`RingMemory::largest_record_bytes`]). Nothing is
    /// visible to the consumer before [`Reservation::publish`]; dropping it gives the room back.
    pub fn reserve(&mut self, most_bytes: usize) -> Option<Reservation<'_>> {
        let head = self.shared.published().load(Ordering::Relaxed);
        let used = head.wrapping_sub(self.shared.consumed().load(Ordering::Acquire));
        let needed = record_bytes(most_bytes)?;
        if needed > self.shared.capacity_bytes.checked_sub(used)? {
            return None;
        }
        let offset = self.shared.offset_of(head);
        let rewind = used == 0 && offset >= REWIND_AFTER_BYTES && needed <= offset;
        let start = if rewind {
            self.pad_to_the_start(head, offset)
        } else {
            head
        };
        Some(Reservation {
            producer: self,
            start,
            most_bytes,
        })
    }

    /// Bytes that one record could take right now.
    pub fn room_bytes(&self) -> usize {
        let head = self.shared.published().load(Ordering::Relaxed);
        let used = head.wrapping_sub(self.shared.consumed().load(Ordering::Acquire));
        let room = self.shared.capacity_bytes.saturating_sub(used) as usize;
        room.saturating_sub(RECORD_HEADER_BYTES)
    }

    /// Whether the consumer has taken everything.
    pub fn is_drained(&self) -> bool {
        let head = self.shared.published().load(Ordering::Relaxed);
        self.shared.consumed().load(Ordering::Acquire) == head
    }

    /// Wakes a consumer that sleeps in [`Consumer::wait_or`]. Apart from publishing, because a wake
    /// costs more than a record and need not happen while the service is stopped.
    pub fn wake_consumer(&self) -> io::Result<()> {
        self.shared.ring(DATA_BELL_AT, DATA_SLEEPERS_AT)
    }

    /// Whether the consumer is gone, as [`RingMemory::abandon`] was told.
    pub fn is_abandoned(&self) -> bool {
        self.shared.abandoned.load(Ordering::SeqCst)
    }

    /// Sleeps until a record of `bytes` fits or the ring is abandoned, at most `timeout`; returns
    /// whether it fits. May come back early with false.
    pub fn wait_for_room(&self, bytes: usize, timeout: Option<Duration>) -> io::Result<bool> {
        let bell = (ROOM_BELL_AT, ROOM_SLEEPERS_AT);
        let fits = || self.room_bytes() >= bytes;
        self.shared
            .sleep(bell, timeout, || fits() || self.is_abandoned())?;
        Ok(fits())
    }

    fn pad_to_the_start(&mut self, head: u64, offset: u64) -> u64 {
        let padding = self.shared.capacity_bytes - offset;
        self.write_header(head, padding as usize - RECORD_HEADER_BYTES, KIND_PADDING);
        head.wrapping_add(padding)
    }

    fn write_header(&mut self, position: u64, length_bytes: usize, kind: u64) {
        let address = self
            .shared
            .address(position, RECORD_HEADER_BYTES)
            .cast::<u64>();
        // SAFETY: the address is inside the mapping and aligned (positions are multiples of 16),
        // and the bytes at and after `published` belong to this producer alone.
        unsafe {
            address.write(length_bytes as u64);
            address.add(1).write(kind);
        }
    }
}

/// Room for one record: a contiguous piece of the ring that derefs to its bytes, which hold
/// whatever was there before.
#[derive(Debug)]
pub struct Reservation<'a> {
    producer: &'a mut Producer,
    start: u64,
    most_bytes: usize,
}

impl<'a> Reservation<'a> {
    /// Makes the first `length_bytes` the next record, all at once, and shows it once more. Panics
    /// when that is more than was reserved.
    pub fn publish(self, length_bytes: usize) -> &'a [u8] {
        assert!(
            length_bytes <= self.most_bytes,
            "a record longer than its reservation"
        );
        let data = self.data();
        self.producer
            .write_header(self.start, length_bytes, KIND_RECORD);
        let end = self
            .start
            .wrapping_add(padded(length_bytes) + RECORD_HEADER_BYTES as u64);
        self.producer
            .shared
            .published()
            .store(end, Ordering::Release);
        // SAFETY: the range is inside the mapping. The consumer only reads it; the one who could
        // write it again is the producer, which stays borrowed for `'a`.
        unsafe { std::slice::from_raw_parts(data, length_bytes) }
    }

    fn data(&self) -> *mut u8 {
        let position = self.start.wrapping_add(RECORD_HEADER_BYTES as u64);
        self.producer.shared.address(position, self.most_bytes)
    }
}

impl Deref for Reservation<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range is inside the double mapping, no longer than the ring has room, and
        // belongs to the one producer, which this reservation borrows.
        unsafe { std::slice::from_raw_parts(self.data(), self.most_bytes) }
    }
}

impl DerefMut for Reservation<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`; the borrow of the producer is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.data(), self.most_bytes) }
    }
}

/// The reading end.
#[derive(Debug)]
pub struct Consumer {
    shared: Arc<Shared>,
}

impl Consumer {
    /// The oldest record that has not been consumed; the same one until [`consume`](Self::consume).
    /// `InvalidData` when the ring is damaged, which no death of a producer can cause.
    pub fn peek(&mut self) -> io::Result<Option<&[u8]>> {
        let Some((position, length_bytes)) = self.front()? else {
            return Ok(None);
        };
        let data = position.wrapping_add(RECORD_HEADER_BYTES as u64);
        let address = self.shared.address(data, length_bytes);
        // SAFETY: the record lies between `consumed` and `published`, so the producer leaves it
        // alone until this borrow of the one consumer ends and `consume` moves `consumed`.
        Ok(Some(unsafe {
            std::slice::from_raw_parts(address, length_bytes)
        }))
    }

    /// Gives the room of the record that [`peek`](Self::peek) shows back to the producer, and
    /// wakes it if it waits for room. Nothing happens when there is no record.
    pub fn consume(&mut self) -> io::Result<()> {
        let Some((position, length_bytes)) = self.front()? else {
            return Ok(());
        };
        let end = position.wrapping_add(padded(length_bytes) + RECORD_HEADER_BYTES as u64);
        self.shared.consumed().store(end, Ordering::Release);
        self.shared.ring(ROOM_BELL_AT, ROOM_SLEEPERS_AT)
    }

    /// Whether a record is there: one load.
    pub fn is_ready(&self) -> bool {
        let consumed = self.shared.consumed().load(Ordering::Relaxed);
        self.shared.published().load(Ordering::Acquire) != consumed
    }

    /// Sleeps until a record is there or `also` holds, at most `timeout`; returns whether one of
    /// them is so. May come back early with false. Whoever makes `also` hold calls
    /// [`RingMemory::wake_consumer`] afterwards.
    pub fn wait_or(&self, timeout: Option<Duration>, also: impl Fn() -> bool) -> io::Result<bool> {
        let ready = || self.is_ready() || also();
        self.shared
            .sleep((DATA_BELL_AT, DATA_SLEEPERS_AT), timeout, ready)
    }

    /// Where the first whole record starts and how long it is, padding skipped.
    fn front(&self) -> io::Result<Option<(u64, usize)>> {
        let mut position = self.shared.consumed().load(Ordering::Relaxed);
        let published = self.shared.published().load(Ordering::Acquire);
        loop {
            let left = published.wrapping_sub(position);
            if left == 0 {
                return Ok(None);
            }
            let unaligned = !position.is_multiple_of(RECORD_HEADER_BYTES as u64);
            if unaligned || left < RECORD_HEADER_BYTES as u64 || left > self.shared.capacity_bytes {
                return Err(damaged(position));
            }
            let address = self
                .shared
                .address(position, RECORD_HEADER_BYTES)
                .cast::<u64>();
            // SAFETY: inside the mapping, aligned, between `consumed` and `published`.
            let (length, kind) = unsafe { (address.read(), address.add(1).read()) };
            let most = left - RECORD_HEADER_BYTES as u64;
            if length > most || padded(length as usize) > most {
                return Err(damaged(position));
            }
            match kind {
                KIND_RECORD => return Ok(Some((position, length as usize))),
                KIND_PADDING => {
                    let whole = padded(length as usize) + RECORD_HEADER_BYTES as u64;
                    position = position.wrapping_add(whole);
                }
                _ => return Err(damaged(position)),
            }
        }
    }
}

/// Records start at multiples of 16, so a header never crosses the end of the ring.
fn padded(length_bytes: usize) -> u64 {
    (length_bytes as u64).next_multiple_of(RECORD_HEADER_BYTES as u64)
}

/// What a record of `length_bytes` takes in the ring; `None` for absurd lengths.
fn record_bytes(length_bytes: usize) -> Option<u64> {
    (length_bytes <= isize::MAX as usize / 2)
        .then(|| padded(length_bytes) + RECORD_HEADER_BYTES as u64)
}

fn invalid(message: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

fn damaged(position: u64) -> io::Error {
    let message = format!("the ring holds no record at position {position}");
    io::Error::new(io::ErrorKind::InvalidData, message)
}
