//! What a standby makes of records that are almost right.

use unbroken_image::{Epoch, Mark, decode, encode_into};
use unbroken_link::Record;
use unbroken_node::standby::image::ServiceImage;
use unbroken_wire::flows::Connections;

/// The corpus has records of real services.
#[test]
fn fuzz_epochs() {
    let epoch = Epoch {
        term: 1,
        sequence: 2,
        mark: Mark { input_position: 3 },
        processes: Vec::new(),
        objects: Vec::new(),
        interests: Vec::new(),
        gone: Vec::new(),
    };
    let record = Record::Epoch {
        epoch: Box::new(epoch),
        released: Vec::new(),
        connections: Connections::default(),
    };
    let mut sample = Vec::new();
    encode_into(&record, &mut sample);
    unbroken_fuzz::bytes("record", &[sample], |bytes| {
        if let Ok(Record::Epoch { epoch, .. }) = decode("a record", bytes) {
            let _ = ServiceImage::default().apply(*epoch);
        }
    });
}
