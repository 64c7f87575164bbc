//! The service's standard output and error: pipes whose other ends are ours, so that what is written
//! leaves with its epoch. Their content is the wire's; a replica gets new ones, in the place of those
//! whose read ends the old primary had.

use crate::methods::{Capture, Means, Methods, Reading};
use crate::restored::{Batch, Phase, Restored, Scene};
use crate::{Context, Error};
use std::os::fd::{AsFd, BorrowedFd};
use unbroken_image::Object;
use unbroken_sys::{descriptor, fdinfo, pipe};

const SUBJECT: &str = "the service's output";

pub(crate) const METHODS: Methods = Methods::new(Capture::Descriptor(read), &[(Phase::Make, make)]);

fn read(reading: &mut Reading, fd: BorrowedFd<'_>, means: &mut Means<'_>) -> Result<(), Error> {
    let inode = descriptor::status(fd).during("look at", SUBJECT)?.inode;
    let output = means.outputs.iter().find(|(own, _)| *own == inode);
    let Some((_, stream)) = output else {
        return Err(Error::differs(SUBJECT, "its pipe is none of ours"));
    };
    let flags = descriptor::status_flags(fd).during("read the flags of", SUBJECT)?;
    reading.state = Some(Object::Output {
        stream: *stream,
        flags,
    });
    Ok(())
}

fn make(batch: &Batch<'_>, _: &Scene, restored: &mut Restored) -> Result<(), Error> {
    for (id, object) in batch {
        if let Object::Output { stream, flags } = object {
            let stream = usize::from(stream.saturating_sub(1));
            let Some(output) = restored.outputs.get_mut(stream) else {
                return Err(Error::differs(SUBJECT, "there is no such stream"));
            };
            let write = match output {
                // Opened once more by the service, as by way of /dev/stdout.
                Some(read) => fdinfo::reopen(read.as_fd(), libc::O_WRONLY)
                    .during("open once more", SUBJECT)?,
                None => {
                    let (read, write) = pipe::pipe(0).during("make a pipe for", SUBJECT)?;
                    // The service sees a pipe that waits when full.
                    descriptor::set_status_flags(read.as_fd(), libc::O_NONBLOCK)
                        .during("set the flags of", SUBJECT)?;
                    *output = Some(read);
                    write
                }
            };
            descriptor::set_status_flags(write.as_fd(), *flags)
                .during("set the flags of", SUBJECT)?;
            restored.descriptors.insert(*id, write);
        }
    }
    Ok(())
}
