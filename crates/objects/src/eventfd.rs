//! eventfd counters.

use crate::methods::{Capture, Look, Means, Methods, Reading};
use crate::restored::{Phase, make_each};
use crate::watch::position_and_flags;
use crate::{Context, Error};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::Object;
use unbroken_image::object::EventCounter;
use unbroken_sys::{descriptor, event, fdinfo};

pub(crate) const METHODS: Methods = Methods {
    is_volatile: |_| true,
    look,
    ..Methods::new(
        Capture::Descriptor(|reading, fd, means| {
            reading.state = Some(Object::EventCounter(capture(fd)?));
            reading.watches.open(&means.holders)
        }),
        &[(Phase::Make, |batch, _, restored| {
            make_each(batch, restored, |_, object| match object {
                Object::EventCounter(state) => restore(state).map(Some),
                _ => Ok(None),
            })
        })],
    )
};

fn look(reading: &mut Reading, _: &mut Means<'_>) -> Result<Look, Error> {
    if !reading.watches.read()? {
        return Ok(Look::Same);
    }
    let Some(text) = reading.watches.text() else {
        return Ok(Look::Unknown);
    };
    match (&mut reading.state, position_and_flags(text)) {
        (Some(Object::EventCounter(state)), Some((_, flags))) if flags == state.flags => {
            *state = parse(text, flags)?;
            Ok(Look::Refreshed)
        }
        _ => Ok(Look::Unknown),
    }
}

/// Reads out a descriptor of ours that names an eventfd.
pub fn capture(fd: BorrowedFd<'_>) -> Result<EventCounter, Error> {
    let flags = descriptor::status_flags(fd).during("read the flags of", "an eventfd")?;
    crate::description::refuse_ownership(fd, flags, "an eventfd")?;
    let mut text = Vec::new();
    fdinfo::own_fdinfo(fd, &mut text).during("read the count of", "an eventfd")?;
    parse(&text, flags)
}

/// The state that an eventfd's fdinfo tells, of whatever process; `flags` are those of `F_GETFL`.
pub(crate) fn parse(text: &[u8], flags: i32) -> Result<EventCounter, Error> {
    let count =
        fdinfo::field(text, "eventfd-count").and_then(|value| u64::from_str_radix(value, 16).ok());
    // Linux 6.5 and later print it, and no earlier kernel is supported.
    let semaphore = fdinfo::field(text, "eventfd-semaphore").and_then(|value| match value {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    });
    match (count, semaphore) {
        (Some(count), Some(semaphore)) => Ok(EventCounter {
            flags,
            count,
            semaphore,
        }),
        _ => Err(Error::Answer {
            operation: "read the count of",
            subject: "an eventfd".to_owned(),
            answer: String::from_utf8_lossy(text).into_owned(),
        }),
    }
}

/// Makes an eventfd with that count.
pub fn restore(state: &EventCounter) -> Result<OwnedFd, Error> {
    let semaphore = if state.semaphore {
        libc::EFD_SEMAPHORE
    } else {
        0
    };
    let fd = event::counter(semaphore | libc::EFD_NONBLOCK).during("create", "an eventfd")?;
    if state.count > 0 {
        // The count of eventfd(2) itself has only 32 bits; a write has 64.
        descriptor::write(fd.as_fd(), &state.count.to_ne_bytes())
            .during("set the count of", "an eventfd")?;
    }
    descriptor::set_status_flags(fd.as_fd(), state.flags)
        .during("set the flags of", "an eventfd")?;
    Ok(fd)
}
