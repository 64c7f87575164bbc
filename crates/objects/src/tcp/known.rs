//! What others than a socket know of it while the service stands.

use std::net::SocketAddr;
use unbroken_sys::bpf::Record;

/// The two addresses of a connection, the service's first.
pub type Ends = (SocketAddr, SocketAddr);

/// Fills a buffer with the bytes that the service has sent on a connection from a sequence number
/// on, if they are so many and end where all that it sent does; otherwise leaves it as it is.
pub type Sent<'a> = &'a dyn Fn(Ends, u32, usize, &mut Vec<u8>) -> bool;

/// What is known of one connection. What is not is asked of the kernel.
#[derive(Clone, Copy)]
pub struct Known<'a> {
    /// From a pass over all sockets since the service was stopped, read in one piece.
    pub(super) record: Option<&'a Record>,
    pub(super) sent: Sent<'a>,
}

impl<'a> Known<'a> {
    pub const NOTHING: Known<'static> = Known {
        record: None,
        sent: &|_, _, _, _| false,
    };

    /// `record` is from a pass since the service was stopped.
    pub fn new(record: Option<&'a Record>, sent: Sent<'a>) -> Known<'a> {
        let record = record.filter(|record| record.is_settled());
        Known { record, sent }
    }

    /// The kernel counts unread bytes only up to an urgent one.
    pub(super) fn may_be_urgent(&self) -> bool {
        self.record.is_none_or(Record::has_urgent_data)
    }
}
