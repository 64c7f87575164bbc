//! The interests of epoll instances, added by the replica itself: an entry is filed under the
//! number that its adder used.

use crate::standby::follow::FollowError;
use crate::standby::image::ServiceImage;
use std::collections::BTreeMap;
use std::io;
use unbroken_image::Pid;
use unbroken_objects::epoll::{Slots, Step, plan};
use unbroken_tracee::{Batch, HostTid, Stopped, Tree};

/// Gives every epoll instance its entries. All descriptors are in place.
pub fn restore(tree: &mut Tree, image: &ServiceImage) -> Result<(), FollowError> {
    let tables: BTreeMap<Pid, &Slots> = image
        .processes
        .iter()
        .map(|(&pid, process)| (pid, &process.descriptors))
        .collect();
    let steps = plan(&image.objects, &tables)?;
    if steps.is_empty() {
        return Ok(());
    }
    let mut stopped = tree.stop()?;
    let mut rest = &steps[..];
    while let Some((pid, _)) = rest.first() {
        let leader = stopped.process(*pid)?.leader();
        let count = rest.iter().take_while(|(other, _)| other == pid).count();
        run_all(&mut stopped, leader, &rest[..count])?;
        rest = &rest[count..];
    }
    stopped.stay();
    Ok(())
}

fn run_all(
    stopped: &mut Stopped<'_>,
    leader: HostTid,
    steps: &[(Pid, Step)],
) -> Result<(), FollowError> {
    let mut rest = steps;
    while !rest.is_empty() {
        let mut batch = stopped.remote(leader);
        let mut slots = Vec::new();
        let mut taken = 0;
        while let Some((_, step)) = rest.get(taken)
            && batch.calls_left() >= 2
        {
            // Its second call depends on the first.
            if let Step::Disarm { .. } = step
                && taken > 0
            {
                break;
            }
            slots.push((*step, add(&mut batch, *step)?));
            taken += 1;
            if matches!(step, Step::Disarm { .. }) {
                break;
            }
        }
        let results = batch.run()?;
        let mut narrow = None;
        for (step, slot) in slots {
            match (step, results.get(slot)) {
                (
                    Step::Disarm {
                        epoll,
                        fd,
                        events,
                        data,
                    },
                    Ok(0),
                ) => {
                    narrow = Some((epoll, fd, events, data));
                }
                (_, Ok(_)) => {}
                (step, Err(error)) => {
                    let text = format!("{step:?} in the replica: {error}");
                    return Err(io::Error::new(error.kind(), text).into());
                }
            }
        }
        if let Some((epoll, fd, events, data)) = narrow {
            let mut batch = stopped.remote(leader);
            control(&mut batch, libc::EPOLL_CTL_MOD, epoll.0, fd.0, events, data)?;
            batch.run()?;
        }
        rest = &rest[taken..];
    }
    Ok(())
}

fn add(
    batch: &mut Batch<'_, '_>,
    step: Step,
) -> Result<unbroken_tracee::BatchedCall, unbroken_tracee::TraceError> {
    match step {
        Step::Duplicate {
            from,
            to,
            close_on_exec,
        } => {
            let flags = if close_on_exec { libc::O_CLOEXEC } else { 0 };
            batch.call(libc::SYS_dup3, &[from.0 as u64, to.0 as u64, flags as u64])
        }
        Step::Add {
            epoll,
            fd,
            events,
            data,
        } => control(batch, libc::EPOLL_CTL_ADD, epoll.0, fd.0, events, data),
        Step::Disarm { epoll, .. } => {
            let event = batch.reserve(16)?;
            batch.call(libc::SYS_epoll_wait, &[epoll.0 as u64, event.0, 1, 0])
        }
        Step::Close { fd } => batch.call(libc::SYS_close, &[fd.0 as u64]),
    }
}

fn control(
    batch: &mut Batch<'_, '_>,
    operation: i32,
    epoll: i32,
    fd: i32,
    events: u32,
    data: u64,
) -> Result<unbroken_tracee::BatchedCall, unbroken_tracee::TraceError> {
    // struct epoll_event is packed on x86-64 (include/uapi/linux/eventpoll.h).
    let mut event = [0; 12];
    event[..4].copy_from_slice(&events.to_ne_bytes());
    event[4..].copy_from_slice(&data.to_ne_bytes());
    let event = batch.scratch(&event)?;
    let arguments = [epoll as u64, operation as u64, fd as u64, event.0];
    batch.call(libc::SYS_epoll_ctl, &arguments)
}
