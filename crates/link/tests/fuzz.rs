//! What a standby does with shared memory that somebody has written over: it refuses it, or reads it
//! to an end.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use unbroken_link::LocalLink;
use unbroken_wire::exchange::InputLog;

const CAPACITY_BYTES: usize = 8192;

fn link() -> LocalLink {
    LocalLink::with_capacity(CAPACITY_BYTES, CAPACITY_BYTES).expect("link")
}

fn rings(link: &LocalLink) -> [BorrowedFd<'_>; 2] {
    let [journal, inputs, _] = link.descriptors();
    [journal, inputs]
}

fn file_of(ring: BorrowedFd<'_>) -> File {
    ring.try_clone_to_owned().expect("descriptor").into()
}

fn content_of(ring: BorrowedFd<'_>) -> Vec<u8> {
    let file = file_of(ring);
    let mut content = vec![0; file.metadata().expect("length").len() as usize];
    file.read_exact_at(&mut content, 0).expect("read");
    content
}

#[test]
fn fuzz_logs() {
    let sample = link();
    let mut journal = sample.journal_writer(3).expect("writer");
    journal.reserve(60).expect("room").publish_part(40, 20);
    drop(journal.reserve(60).expect("room").publish_epoch(0, 20));
    let mut inputs = sample.input_log_writer().expect("writer");
    assert!(inputs.append(1, &[1; 70]) && inputs.append(2, &[2; 70]));
    let samples = rings(&sample).map(content_of);
    let length = samples[0].len();
    unbroken_fuzz::bytes("logs", &samples, |bytes| {
        let link = link();
        for ring in rings(&link) {
            let bytes = &bytes[..bytes.len().min(length)];
            file_of(ring).write_all_at(bytes, 0).expect("write");
        }
        read_journal(&link);
        read_inputs(&link);
    });
}

fn read_journal(link: &LocalLink) {
    let Ok(mut reader) = link.journal_reader(3) else {
        return;
    };
    for _ in 0..1000 {
        match reader.peek() {
            Ok(Some(entry)) => assert!(entry.bulk.len() + entry.structure.len() < CAPACITY_BYTES),
            _ => return,
        }
        if reader.consume().is_err() {
            return;
        }
    }
    panic!("more records than there is room for");
}

fn read_inputs(link: &LocalLink) {
    let Ok(mut reader) = link.input_log_reader() else {
        return;
    };
    for _ in 0..1000 {
        match reader.peek() {
            Ok(Some((_, frame))) => assert!(frame.len() < CAPACITY_BYTES),
            _ => return,
        }
        if reader.consume().is_err() {
            return;
        }
    }
    panic!("more records than there is room for");
}
