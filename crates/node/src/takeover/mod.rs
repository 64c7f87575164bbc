//! From a replica that follows to a service that lives.
//!
//! What if this node is killed in here? The old service is gone, so that is the second fault. What
//! if the old primary still lives? It has ordered this and releases nothing any more, or it is dead
//! (its pidfd said so), so at most one side speaks (I3).

mod epolls;
mod objects;
mod packets;

use crate::capture::Capture;
use crate::clock::now_ns;
use crate::kernel_program::KernelProgram;
use crate::log;
use crate::primary::ServiceEnds;
use crate::primary::launch::start_notifier;
use crate::primary::mailbox::Mailbox;
use crate::primary::tracer::Tracer;
use crate::stage::notifier::Announcements;
use crate::stage::rules::is_announced;
use crate::standby::follow::{FollowError, Following};
use crate::standby::image::ServiceImage;
use crate::standby::{Outcome, Predecessor};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid as HostPid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use unbroken_core::give_up::Fault;
use unbroken_core::role::{Event, Failure, RoleState};
use unbroken_image::Object;
use unbroken_link::Cause;
use unbroken_objects::file::{locks_of_process, lost_lock};
use unbroken_objects::tcp::{Heard, View};
use unbroken_objects::{Phase, Restored, Scene};
use unbroken_sys::affinity;
use unbroken_sys::bpf::DeadlineProgram;
use unbroken_tracee::Tree;
use unbroken_wire::Tuple;
use unbroken_wire::exchange::Input;
use unbroken_wire::flows::{FlowLimits, Flows, LatePacket, TableChange};
use unbroken_wire::tun::{ClientSide, ServiceSide};

impl Following {
    /// Has the service go on here, or says that it is lost.
    pub fn take_over(self, cause: Cause, mailbox: Arc<Mailbox>) -> (Outcome, Option<Tracer>) {
        let lost = |error: FollowError| {
            log!("the takeover failed: {error}");
            let (failure, why) = (Failure::TakeoverFailed, Some(error.to_string()));
            Outcome::Failed {
                failure,
                cause: cause.clone(),
                why,
            }
        };
        self.bring_to_life(cause.clone(), mailbox)
            .unwrap_or_else(|error| (lost(error), None))
    }

    /// Brings the replica to life as the last epoch has it.
    fn bring_to_life(
        mut self,
        cause: Cause,
        mailbox: Arc<Mailbox>,
    ) -> Result<(Outcome, Option<Tracer>), FollowError> {
        let started_ns = now_ns();
        // Whoever of the old service still stands must not write to files any more. It fails only
        // when nobody does.
        let _ = pidfd_send_signal(&self.predecessor.stage, Signal::KILL);
        self.role.apply(event_of(&cause), started_ns);
        if let RoleState::Failed(failure) = self.role.state() {
            let why = None;
            return Ok((
                Outcome::Failed {
                    failure,
                    cause,
                    why,
                },
                None,
            ));
        }
        // On one machine there is nobody to ask: what brought this node here came from the kernel,
        // or from the primary itself, which releases nothing any more.
        self.role.apply(Event::LeaveGranted, started_ns);
        log!(
            "taking over from epoch {} in term {}: {cause:?}",
            self.image.sequence,
            self.role.term()
        );
        let mut laps = Laps::new(started_ns);
        laps.done("begin");
        if self.image.names_fifo() {
            // Nobody else may hold one when it is filled, and the old service does until its end.
            await_end(&self.predecessor.stage)?;
        }
        let mut restored = self.restore_objects()?;
        laps.done("objects");
        if self.holds_process_locks() {
            // Its own process takes such a lock, which the old one holds to its end.
            await_end(&self.predecessor.stage)?;
        }
        objects::complete(Phase::Mapped, &self.image.objects, &mut restored)?;
        self.install_descriptors(&mut restored)?;
        laps.done("descriptors");
        let Following { replica, .. } = self;
        let mut tree = replica.go_live(now_ns())?;
        tree.see_announced(is_announced);
        laps.done("threads");
        let announcements = Announcements::new(self.config.bounds.announcements);
        let notify = Arc::new(self.notify);
        start_notifier(
            notify.clone(),
            announcements.clone(),
            self.config.service_core,
        )?;
        epolls::restore(&mut tree, &self.image)?;
        laps.done("epoll");
        let service = ServiceSide::new(self.stage.tun().try_clone_to_owned()?);
        packets::prime_listeners(&service, &self.image.objects, &self.config.addresses)?;
        packets::inject(&service, &restored.injects)?;
        let clients = ClientSide::new(self.host_tun.try_clone()?);
        replay(
            &mut self.flows,
            &self.image,
            &restored,
            (&service, &clients),
        )?;
        laps.done("input");
        // The old service ends while the replica is prepared, on the other core.
        await_end(&self.predecessor.stage)?;
        laps.done("end of the old service");
        let phase = Phase::OldServiceEnded;
        objects::complete(phase, &self.image.objects, &mut restored)?;
        // Until here the core of the old service may be busy with its end.
        affinity::bind(0, &[self.config.service_core])?;
        bind_threads(&tree, self.config.service_core)?;
        let mut stopped = tree.stop()?;
        // A stub dies with its standby. A service outlives its primary while it is unprotected.
        stopped.set_exit_kill(false)?;
        stopped.resume()?;
        packets::resend(&clients, &restored.resends)?;
        laps.done("resume");
        let took_ns = now_ns() - started_ns;
        log!("the replica lives after {} us: {laps}", took_ns / 1000);
        let actions = self.role.apply(Event::TakeoverDone, now_ns());
        let Restored {
            outputs,
            descriptors,
            orphans,
            shortcomings,
            ..
        } = restored;
        let closings = announcements.clone();
        let capture = Capture::new(announcements, &outputs, &self.config)?;
        let bell = tree.bell();
        let host_pid = tree
            .processes()
            .first()
            .map_or(0, |process| process.host_pid.0);
        let ends = ServiceEnds {
            tun: self.stage.tun().try_clone_to_owned()?,
            outputs,
            stage: pidfd_of(self.init.host_pid)?,
            init: self.init,
            notify,
            host_pid,
            input: Input {
                flows: self.flows,
                position: self.input_position.max(self.image.input_position),
            },
        };
        // Closing the last descriptor of a device takes the kernel milliseconds.
        let (stage, predecessor) = (self.stage, self.predecessor);
        std::thread::spawn(move || {
            for (connection, socket) in orphans {
                closings.closings().add(connection, socket.as_fd());
            }
            drop((descriptors, stage, predecessor));
        });
        let outcome = Outcome::Live {
            ends: Box::new(ends),
            role: self.role,
            actions,
            bell,
            took_ns: Some(took_ns),
            cause,
            shortcomings,
        };
        let tracer = Tracer::new(
            tree,
            mailbox,
            capture,
            self.deadlines,
            self.config.spare_core,
        );
        Ok((outcome, Some(tracer)))
    }

    /// Takes hold of the service, which outlived its primary: nothing of the replica is used.
    pub fn adopt(
        mut self,
        mailbox: Arc<Mailbox>,
    ) -> Result<(Outcome, Option<Tracer>), FollowError> {
        let service_alive = !has_ended(&self.predecessor.stage)?;
        let actions = self
            .role
            .apply(Event::PrimaryDied { service_alive }, now_ns());
        if let RoleState::Failed(failure) = self.role.state() {
            return Ok((
                Outcome::Failed {
                    failure,
                    cause: Cause::PrimaryDied,
                    why: None,
                },
                None,
            ));
        }
        let Following {
            replica,
            stage,
            init,
            notify,
            predecessor,
            ..
        } = self;
        let Predecessor {
            init: service_init,
            stage: service_stage,
            tun,
            notify: service_notify,
            outputs,
        } = predecessor;
        // Until somebody hears of them the service's announced calls stand, and until it is traced
        // a signal with a handler ends such a call with EINTR: nothing else comes first.
        let announcements = Announcements::new(self.config.bounds.announcements);
        let service_notify = Arc::new(service_notify);
        start_notifier(
            service_notify.clone(),
            announcements.clone(),
            self.config.service_core,
        )?;
        let of_stage = service_init.host_pid;
        let mut tree = Tree::seize_below(of_stage)?;
        tree.see_announced(is_announced);
        log!("adopting the running service: {actions:?}");
        drop(replica);
        std::thread::spawn(move || drop((init, stage, notify)));
        affinity::bind(0, &[self.config.service_core])?;
        let capture = Capture::new(announcements, &outputs, &self.config)?;
        let flows = Flows::of_primary(FlowLimits::default());
        let bell = tree.bell();
        let host_pid = tree
            .processes()
            .first()
            .map_or(0, |process| process.host_pid.0);
        let ends = ServiceEnds {
            tun,
            outputs,
            init: service_init,
            stage: service_stage,
            notify: service_notify,
            host_pid,
            input: Input {
                flows,
                position: self.input_position,
            },
        };
        let cause = Cause::PrimaryDied;
        let outcome = Outcome::Live {
            ends: Box::new(ends),
            role: self.role,
            actions,
            bell,
            took_ns: None,
            cause,
            shortcomings: Vec::new(),
        };
        let mut deadlines = KernelProgram::Unasked;
        deadlines.ask_for(self.config.spare_core, move || {
            DeadlineProgram::load(of_stage)
        });
        let tracer = Tracer::new(tree, mailbox, capture, deadlines, self.config.spare_core);
        Ok((outcome, Some(tracer)))
    }

    /// Everything that descriptors name, made inside the replica's namespaces.
    fn restore_objects(&mut self) -> Result<Restored, FollowError> {
        let objects = std::mem::take(&mut self.image.objects);
        let named = self.image.named_objects();
        let mut views = HashMap::new();
        let mut memory_files = BTreeMap::new();
        for (&id, object) in &objects {
            match object {
                Object::TcpConnection(connection) => {
                    let tuple = Tuple::from(connection);
                    let client = self.flows.client(tuple);
                    let view = View {
                        heard: client.and_then(|client| {
                            Some(Heard {
                                acknowledgement: client.acknowledged?,
                                window: client.window,
                            })
                        }),
                        client_timestamp: client
                            .and_then(|client| client.timestamps)
                            .map_or(0, |timestamps| timestamps.value),
                        clock_offset_ns: 0,
                    };
                    views.insert(id, view);
                }
                Object::MemoryFile(file) => {
                    if let Some(memory) = self.replica.shared_memory(file.identity) {
                        memory_files.insert(id, memory.try_clone_to_owned()?);
                    }
                }
                _ => {}
            }
        }
        let scene = Scene {
            named,
            views,
            memory_files,
            references: self.files.take(),
        };
        let (restored, objects) = self
            .stage
            .run(move || (objects::restore(&objects, &scene), objects))?;
        self.image.objects = objects;
        Ok(restored?)
    }

    fn holds_process_locks(&self) -> bool {
        let mut processes = self.image.processes.iter();
        processes.any(|(&pid, process)| {
            let table = &process.descriptors;
            !locks_of_process(pid, table, &self.image.objects).is_empty()
        })
    }

    fn install_descriptors(&mut self, restored: &mut Restored) -> Result<(), FollowError> {
        for (&pid, process) in &self.image.processes {
            let mut slots = Vec::with_capacity(process.descriptors.len());
            for (&fd, slot) in &process.descriptors {
                let descriptor = restored.descriptors.get(&slot.object).ok_or_else(|| {
                    io::Error::other(format!("descriptor {fd} names an object that is not there"))
                })?;
                slots.push((fd, descriptor.as_fd(), slot.close_on_exec));
            }
            self.replica.install_descriptors(pid, &mut slots)?;
            let (table, objects) = (&process.descriptors, &self.image.objects);
            let locks = locks_of_process(pid, table, objects);
            for (fd, _) in self.replica.lock_ranges(pid, &locks)? {
                let file = table.get(&fd).and_then(|slot| objects.get(&slot.object));
                if let Some(Object::RegularFile(state)) = file {
                    let shortcoming = lost_lock(&state.path);
                    log!("{shortcoming}");
                    restored.shortcomings.push(shortcoming);
                }
            }
        }
        Ok(())
    }
}

/// Gives the replica the input that the committed state does not hold.
fn replay(
    flows: &mut Flows,
    image: &ServiceImage,
    restored: &Restored,
    (service, clients): (&ServiceSide, &ClientSide),
) -> Result<(), FollowError> {
    let frames: Vec<Vec<u8>> = flows
        .replay_after_takeover()
        .into_iter()
        .map(|(_, frame)| frame.to_vec())
        .collect();
    let standing = restored.connections.iter();
    let standing: Vec<Tuple> = standing
        .filter_map(|id| match image.objects.get(id)? {
            Object::TcpConnection(connection) => Some(connection.into()),
            _ => None,
        })
        .collect();
    // Orphaned connections that are at their end need no socket.
    let known: HashSet<Tuple> = standing.iter().copied().collect();
    let mut over: Vec<Tuple> = image
        .connections()
        .into_iter()
        .map(|named| named.tuple)
        .collect();
    over.retain(|tuple| !known.contains(tuple));
    let finished = TableChange {
        gone: &over,
        input_position: image.input_position,
        ..TableChange::default()
    };
    flows.commit(finished, now_ns());
    flows.became_primary(&standing);
    for frame in &frames {
        // A network may lose a packet; its sender brings it again.
        match flows.answer_for_closed(frame) {
            LatePacket::ForTheKernel => drop(service.write(frame)?),
            LatePacket::Reopens(reset) => {
                let _ = service.write(reset.frame())?;
                let _ = service.write(frame)?;
            }
            LatePacket::Swallow => {}
            LatePacket::Answer(answer) => drop(clients.send_crafted(&answer)?),
        }
    }
    Ok(())
}

/// How long each part of a takeover took, for the log.
struct Laps {
    last_ns: u64,
    parts: Vec<(&'static str, u64)>,
}

impl Laps {
    fn new(started_ns: u64) -> Laps {
        Laps {
            last_ns: started_ns,
            parts: Vec::with_capacity(8),
        }
    }

    fn done(&mut self, part: &'static str) {
        let now = now_ns();
        self.parts.push((part, now - self.last_ns));
        self.last_ns = now;
    }
}

impl fmt::Display for Laps {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (part, lasted_ns)) in self.parts.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(formatter, "{comma}{part} {}", lasted_ns / 1000)?;
        }
        Ok(())
    }
}

fn event_of(cause: &Cause) -> Event {
    match cause {
        Cause::PrimaryDied => Event::PrimaryDied {
            service_alive: false,
        },
        Cause::Switchover(_) => Event::TakeoverOrdered(None),
        Cause::Killed(_) => Event::TakeoverOrdered(Some(Fault::External)),
        Cause::Crashed(_) => Event::TakeoverOrdered(Some(Fault::Own)),
    }
}

/// The replica was built on the spare core; the service runs on its own.
fn bind_threads(tree: &Tree, core: usize) -> io::Result<()> {
    for process in tree.processes() {
        for thread in process.threads() {
            affinity::bind(thread.host_tid.0, &[core])?;
        }
    }
    Ok(())
}

fn pidfd_of(pid: i32) -> io::Result<OwnedFd> {
    let pid = HostPid::from_raw(pid).ok_or_else(|| io::Error::other("no such process"))?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Blocks until the process behind a pidfd has ended.
fn await_end(process: &OwnedFd) -> io::Result<()> {
    let mut watched = [PollFd::new(process, PollFlags::IN)];
    loop {
        match poll(&mut watched, None) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn has_ended(process: &OwnedFd) -> io::Result<bool> {
    let mut watched = [PollFd::new(process, PollFlags::IN)];
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    Ok(poll(&mut watched, Some(&now))? > 0)
}
