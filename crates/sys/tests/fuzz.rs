//! What the decoders of this crate do with bytes that are almost right.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use unbroken_sys::shared::RingMemory;
use unbroken_sys::{fdinfo, remote_code};

#[test]
fn fuzz_fdinfo() {
    unbroken_fuzz::bytes("fdinfo", &[b"pos:\t0\nflags:\t02\n".to_vec()], |text| {
        for name in ["pos", "flags", "lock", "tfd", ""] {
            assert!(fdinfo::fields(text, name).count() <= text.len() + 1);
        }
    });
}

#[test]
fn fuzz_slot_code() {
    let code = remote_code::slot::code([0x48, 0xb8], 7, 0x7fff_0000_1000);
    unbroken_fuzz::bytes("slot-code", &[code.to_vec()], |code| {
        let _ = remote_code::slot::parse(code);
    });
}

/// A ring in shared memory that somebody has written over: records may be refused, and reading
/// comes to an end.
#[test]
fn fuzz_ring() {
    const CAPACITY_BYTES: usize = 8192;
    let ring = RingMemory::create("fuzz", CAPACITY_BYTES).expect("ring");
    let mut producer = ring.producer().expect("producer");
    for length in [0, 1, 40, 700] {
        producer.reserve(length).expect("room").publish(length);
    }
    let sample = content_of(&ring);
    unbroken_fuzz::bytes("ring", std::slice::from_ref(&sample), |bytes| {
        let ring = RingMemory::create("fuzz", CAPACITY_BYTES).expect("ring");
        let file = file_of(&ring);
        file.write_all_at(&bytes[..bytes.len().min(sample.len())], 0)
            .expect("write");
        // A consumer may have been claimed by these very bytes.
        let Ok(mut consumer) = ring.consumer() else {
            return;
        };
        for _ in 0..CAPACITY_BYTES {
            match consumer.peek() {
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return,
            }
            if consumer.consume().is_err() {
                return;
            }
        }
        panic!("more records than there is room for");
    });
}

fn file_of(ring: &RingMemory) -> std::fs::File {
    ring.as_fd()
        .try_clone_to_owned()
        .expect("descriptor")
        .into()
}

fn content_of(ring: &RingMemory) -> Vec<u8> {
    let file = file_of(ring);
    let mut content = vec![0; file.metadata().expect("length").len() as usize];
    file.read_exact_at(&mut content, 0).expect("read");
    content
}
