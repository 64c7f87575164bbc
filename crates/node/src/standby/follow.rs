//! The standby's tracer thread: it follows the journal, and at the end brings the replica to life
//! or lets it go.

use super::{Outcome, Predecessor, Watch};
use crate::channel;
use crate::clock::now_ns;
use crate::config::Config;
use crate::kernel_program::KernelProgram;
use crate::log;
use crate::primary::Notice;
use crate::primary::mailbox::Mailbox;
use crate::primary::tracer::Tracer;
use crate::stage::launch::{Init, InitRole};
use crate::stage::{Stage, StageConfig};
use crate::standby::files::StandbyFiles;
use crate::standby::image::ServiceImage;
use std::io::{self, ErrorKind::BrokenPipe, ErrorKind::ConnectionReset};
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use unbroken_core::role::{Event, Role, RoleState};
use unbroken_image::{Epoch, decode};
use unbroken_link::{Cause, InputLogReader, JournalReader, LinkError, LocalLink, Record};
use unbroken_sys::bpf::DeadlineProgram;
use unbroken_sys::channel::Channel;
use unbroken_sys::{affinity, descriptor};
use unbroken_tracee::replica::{Replica, ReplicaError, Stub};
use unbroken_wire::flows::{ConnectionChange, Connections, FlowLimits, Flows, TableChange};

#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    #[error(transparent)]
    Stage(#[from] crate::stage::Error),
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Decode(#[from] unbroken_image::DecodeError),
    #[error(transparent)]
    Restore(#[from] unbroken_objects::Error),
    #[error(transparent)]
    Trace(#[from] unbroken_tracee::TraceError),
    #[error(transparent)]
    Capture(#[from] crate::capture::CaptureError),
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// What the tracer thread of a standby begins with.
pub struct Follower {
    pub config: Config,
    pub role: Role,
    pub link: LocalLink,
    pub host_tun: OwnedFd,
    pub predecessor: Predecessor,
    /// To the primary.
    pub tell: Arc<Channel>,
    pub watch: Arc<Watch>,
    pub mailbox: Arc<Mailbox>,
}

/// A replica that follows.
pub struct Following {
    pub config: Config,
    pub role: Role,
    pub stage: Stage,
    pub init: Init,
    pub notify: OwnedFd,
    pub replica: Replica,
    /// Of the replica, which it sees from its first moment.
    pub deadlines: KernelProgram<DeadlineProgram>,
    pub image: ServiceImage,
    pub files: StandbyFiles,
    pub flows: Flows,
    pub inputs: InputLogReader,
    pub input_position: u64,
    pub host_tun: OwnedFd,
    pub predecessor: Predecessor,
    /// Parts that came ahead of an epoch.
    parts: Vec<(Record, Vec<u8>)>,
}

/// Why a standby stops to follow.
enum End {
    TakeOver(Cause),
    PrimaryDied,
    Retired,
}

impl Follower {
    /// Follows until the end, and says on `sender` what came of it. When the replica lives, the
    /// thread goes on as the tracer of a primary.
    pub fn run(self, sender: &mpsc::Sender<Outcome>) {
        let watch = self.watch.clone();
        let (outcome, tracer) = self.follow().unwrap_or_else(|error| {
            log!("the standby fails: {error}");
            (Outcome::Void, None)
        });
        let sent = sender.send(outcome).is_ok();
        let _ = rustix::io::write(&watch.bell, &1u64.to_ne_bytes());
        if let (true, Some(tracer)) = (sent, tracer) {
            tracer.run();
        }
    }

    fn follow(self) -> Result<(Outcome, Option<Tracer>), FollowError> {
        let watch = self.watch.clone();
        let (tell, mailbox) = (self.tell.clone(), self.mailbox.clone());
        let term = self.role.term();
        let mut reader = self.link.journal_reader(term)?;
        let mut following = Following::prepare(self)?;
        say(&tell, &Notice::Empty)?;
        let end = match following.read_on(&mut reader, &watch, &tell) {
            Ok(end) => end,
            Err(error) => {
                let _ = say(&tell, &Notice::Refused(error.to_string()));
                return Err(error);
            }
        };
        match end {
            End::Retired => Ok((Outcome::Void, None)),
            End::TakeOver(cause) => Ok(following.take_over(cause, mailbox)),
            End::PrimaryDied if following.role.state() == RoleState::Warm => {
                Ok(following.take_over(Cause::PrimaryDied, mailbox))
            }
            End::PrimaryDied => following.adopt(mailbox),
        }
    }
}

/// Tells the primary. One that is gone hears nothing, which is no reason to give up: its pidfd says
/// so, and the service is this node's to hold then. One that lives and does not hear would wait for
/// ever.
fn say(tell: &Channel, notice: &Notice) -> io::Result<()> {
    match channel::send(tell, notice, &[]) {
        Err(error) if matches!(error.kind(), BrokenPipe | ConnectionReset) => {
            log!("{notice:?} was not heard: {error}");
            Ok(())
        }
        result => result,
    }
}

impl Following {
    /// The stage and the empty replica.
    fn prepare(follower: Follower) -> Result<Following, FollowError> {
        let config = follower.config;
        let stage = Stage::create(StageConfig {
            addresses: config.addresses,
            mtu_bytes: config.mtu_bytes,
        })?;
        let root = stage.run(|| descriptor::open(None, c"/", libc::O_PATH | libc::O_CLOEXEC))??;
        let (init, pending, _) = stage.spawn_init(InitRole::Stub)?;
        affinity::bind(pending.host_pid, &[config.spare_core])?;
        let stub = Stub::seize(pending.host_pid)?;
        let notify = pending.install_filter()?;
        // It sees a namespace, of which stage init is there for as long as anybody.
        let of_stage = init.host_pid;
        let mut deadlines = KernelProgram::Unasked;
        deadlines.ask_for(config.spare_core, move || DeadlineProgram::load(of_stage));
        let replica = stub.into_replica(pending.into_channel())?;
        Ok(Following {
            stage,
            init,
            notify,
            replica,
            deadlines,
            image: ServiceImage::default(),
            files: StandbyFiles::new(follower.link.reference_reader()?, root),
            flows: Flows::of_standby(FlowLimits::default()),
            inputs: follower.link.input_log_reader()?,
            input_position: 1,
            host_tun: follower.host_tun,
            predecessor: follower.predecessor,
            parts: Vec::new(),
            role: follower.role,
            config,
        })
    }

    fn read_on(
        &mut self,
        reader: &mut JournalReader,
        watch: &Watch,
        tell: &Channel,
    ) -> Result<End, FollowError> {
        loop {
            // Read before the journal: what was published before the primary died is applied.
            let primary_died = watch.primary_died.load(Ordering::SeqCst);
            while let Some(entry) = reader.peek()? {
                if entry.messages > 0 {
                    self.files.receive(entry.messages)?;
                }
                let record = decode("a record of the journal", entry.structure)?;
                let end = self.take(record, entry.bulk, tell)?;
                reader.consume()?;
                if end.is_some() {
                    self.read_inputs()?;
                }
                if let Some(end) = end {
                    return Ok(end);
                }
            }
            self.read_inputs()?;
            if primary_died {
                return Ok(End::PrimaryDied);
            }
            reader.wait_or(None, || watch.primary_died.load(Ordering::SeqCst))?;
        }
    }

    fn take(
        &mut self,
        record: Record,
        bulk: &[u8],
        tell: &Channel,
    ) -> Result<Option<End>, FollowError> {
        match record {
            part @ (Record::Birth(_) | Record::Memory { .. })
                if self.role.state() == RoleState::Filling =>
            {
                self.take_part(&part, bulk)?;
            }
            part @ (Record::Birth(_) | Record::Memory { .. }) => {
                self.parts.push((part, bulk.to_vec()));
            }
            Record::References => {}
            Record::Epoch {
                epoch,
                connections,
                released,
            } => {
                self.take_epoch(*epoch, bulk, connections, tell)?;
                self.files.release(&released);
            }
            Record::TakeOver(cause) => return Ok(Some(End::TakeOver(cause))),
            Record::Retire => return Ok(Some(End::Retired)),
        }
        Ok(None)
    }

    /// What comes ahead of an epoch.
    fn take_part(&mut self, part: &Record, bulk: &[u8]) -> Result<(), ReplicaError> {
        match part {
            Record::Birth(birth) => self.replica.bear(*birth),
            Record::Memory { pid, memory } => {
                let files = self.files.files();
                self.replica.apply_memory(*pid, memory, bulk, files)
            }
            _ => Ok(()),
        }
    }

    fn take_epoch(
        &mut self,
        epoch: Epoch,
        bulk: &[u8],
        connections: Connections,
        tell: &Channel,
    ) -> Result<(), FollowError> {
        for (part, bulk) in std::mem::take(&mut self.parts) {
            self.take_part(&part, &bulk)?;
        }
        self.replica.apply(&epoch, bulk, self.files.files())?;
        // The input before the mark must be known before the commit drops it.
        self.read_inputs()?;
        let first = self.image.sequence == 0;
        let change = self.image.apply(epoch);
        self.commit_flows(first, &change, connections);
        if first {
            self.role.apply(Event::StandbyReady, now_ns());
            say(tell, &Notice::Warm)?;
        }
        Ok(())
    }

    fn commit_flows(&mut self, first: bool, change: &ConnectionChange, connections: Connections) {
        let Connections { accepted, known } = connections;
        let (input_position, now) = (self.image.input_position, now_ns());
        if first {
            let standing = self.image.connections();
            // Of those that stand, too, it is known now what their clients said before this log: a
            // connection that the service has closed has moved on since it was read.
            self.flows.adopt_known(&known, now);
            self.flows
                .commit_survey(&standing, &accepted, input_position, now);
        } else {
            let change = TableChange {
                gone: &change.gone,
                stood: &change.stood,
                accepted: &accepted,
                input_position,
            };
            self.flows.commit(change, now);
        }
    }

    /// Takes in the input that the primary has logged so far.
    pub fn read_inputs(&mut self) -> Result<(), FollowError> {
        let now = now_ns();
        while let Some((position, frame)) = self.inputs.peek()? {
            self.flows.input(position, frame, now);
            self.input_position = position + 1;
            self.inputs.consume()?;
        }
        Ok(())
    }
}
