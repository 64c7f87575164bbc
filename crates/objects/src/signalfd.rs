//! signalfds: only a mask. The signals themselves are queued at the process.

use crate::methods::{Capture, Methods};
use crate::restored::{Phase, make_each};
use crate::{Context, Error};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::Object;
use unbroken_image::object::SignalDescriptor;
use unbroken_sys::{descriptor, event, fdinfo};

pub(crate) const METHODS: Methods = Methods::new(
    Capture::Descriptor(|reading, fd, _| {
        reading.state = Some(Object::SignalDescriptor(capture(fd)?));
        Ok(())
    }),
    &[(Phase::Make, |batch, _, restored| {
        make_each(batch, restored, |_, object| match object {
            Object::SignalDescriptor(state) => restore(state).map(Some),
            _ => Ok(None),
        })
    })],
);

/// Reads out a descriptor of ours that names a signalfd.
pub fn capture(fd: BorrowedFd<'_>) -> Result<SignalDescriptor, Error> {
    let flags = descriptor::status_flags(fd).during("read the flags of", "a signalfd")?;
    crate::description::refuse_ownership(fd, flags, "a signalfd")?;
    let mut text = Vec::new();
    fdinfo::own_fdinfo(fd, &mut text).during("read the mask of", "a signalfd")?;
    let mask = fdinfo::field(&text, "sigmask")
        .and_then(|value| u64::from_str_radix(value, 16).ok())
        .ok_or_else(|| Error::Answer {
            operation: "read the mask of",
            subject: "a signalfd".to_owned(),
            answer: String::from_utf8_lossy(&text).into_owned(),
        })?;
    Ok(SignalDescriptor { flags, mask })
}

/// Makes a signalfd. Who reads it gets the reader's own signals, so any process of ours may make
/// it for the replica; but who adds it to an epoll instance ties it to the adder's signals
/// (fs/signalfd.c `signalfd_poll`), so only the replica may do that: see [`crate::epoll::plan`].
pub fn restore(state: &SignalDescriptor) -> Result<OwnedFd, Error> {
    let fd = event::signals(state.mask, 0).during("create", "a signalfd")?;
    descriptor::set_status_flags(fd.as_fd(), state.flags)
        .during("set the flags of", "a signalfd")?;
    Ok(fd)
}
