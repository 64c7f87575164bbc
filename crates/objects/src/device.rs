//! Character devices without state: `/dev/null` and the like.

use crate::methods::{Capture, Methods, Pollable};
use crate::restored::{Phase, make_each};
use crate::{Context, Error};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use unbroken_image::Object;
use unbroken_image::object::CharacterDevice;
use unbroken_sys::{descriptor, fdinfo};

pub(crate) const METHODS: Methods = Methods {
    pollable: Pollable::Unknown,
    ..Methods::new(
        Capture::Descriptor(|reading, fd, _| {
            reading.state = Some(Object::CharacterDevice(capture(fd)?));
            Ok(())
        }),
        &[(Phase::Make, |batch, _, restored| {
            make_each(batch, restored, |_, object| match object {
                Object::CharacterDevice(state) => restore(state).map(Some),
                _ => Ok(None),
            })
        })],
    )
};

/// Reads out a descriptor of ours that names such a device.
pub fn capture(fd: BorrowedFd<'_>) -> Result<CharacterDevice, Error> {
    let status = descriptor::status(fd).during("look at", "a device")?;
    let path = crate::description::path_of(fd)?;
    let flags = descriptor::status_flags(fd).during("read the flags of", &path)?;
    Ok(CharacterDevice {
        path,
        device: status.special_device,
        flags,
    })
}

/// Opens the device of the calling thread's mount namespace.
///
/// # Errors
/// [`Error::Differs`] when the path leads to another device here.
pub fn restore(state: &CharacterDevice) -> Result<OwnedFd, Error> {
    let path = fdinfo::c_path(&state.path).during("open", &state.path)?;
    let fd = descriptor::open(None, &path, crate::description::open_flags(state.flags))
        .during("open", &state.path)?;
    let status = descriptor::status(fd.as_fd()).during("look at", &state.path)?;
    if status.special_device != state.device {
        return Err(Error::differs(&state.path, "it is another device here"));
    }
    Ok(fd)
}
