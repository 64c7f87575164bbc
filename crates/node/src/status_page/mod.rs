//! The status page: what a service's processes tell each other and `unbroken status` about it.
//!
//! A file /run/unbroken/NAME/status-page that all of them map. It outlives each of them, so the figures
//! go on across takeovers. Everything on it is a 64-bit atomic word or a text kept twice; a writer
//! never waits, allocates or locks, and may die at any instruction. There is one writer of each
//! thing at a time: the front writes `front_pid` and, when no node is left, the end; the primary
//! everything else. What the kernel knows about the service (connections, resident memory) is not
//! kept here: who wants it asks the kernel.

mod histogram;
mod layout;
mod snapshot;
mod text;
mod totals;

pub use histogram::Percentiles;
pub use snapshot::{Recent, Snapshot};
pub use totals::Totals;

use crate::clock::now_ns;
use crate::directory::RunDirectory;
use crate::steps::EpochStep;
use layout::{TextPlace, Word};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use unbroken_sys::mapped::{Access, MappedWords};

/// Host pids that the status page has room for; the others are left out.
pub const SERVICE_PIDS_MAX: usize = 64;

/// Room for the published ports as text.
pub const PUBLISHED_BYTES_MAX: usize = 512;

/// How a service stands. The names are those of `status --json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum ServiceState {
    /// Nothing of the service runs yet.
    Starting = 1,
    /// The service runs and a standby is being filled.
    Syncing = 2,
    /// Any one fault is survived.
    Protected = 3,
    /// The service runs without a standby; the reason text says why.
    Unprotected = 4,
    /// A replica is being brought to life.
    TakingOver = 5,
    /// The service has ended for good other than by its own exit; the reason text says why.
    Failed = 6,
}

impl ServiceState {
    const ALL: [ServiceState; 6] = [
        ServiceState::Starting,
        ServiceState::Syncing,
        ServiceState::Protected,
        ServiceState::Unprotected,
        ServiceState::TakingOver,
        ServiceState::Failed,
    ];

    pub fn name(self) -> &'static str {
        match self {
            ServiceState::Starting => "starting",
            ServiceState::Syncing => "syncing",
            ServiceState::Protected => "protected",
            ServiceState::Unprotected => "unprotected",
            ServiceState::TakingOver => "taking-over",
            ServiceState::Failed => "failed",
        }
    }

    /// Whether the service runs in this state and a fault would end it.
    pub fn is_exposed(self) -> bool {
        matches!(self, ServiceState::Syncing | ServiceState::Unprotected)
    }

    fn from_word(word: u64) -> Option<ServiceState> {
        ServiceState::ALL
            .into_iter()
            .find(|state| *state as u64 == word)
    }
}

/// Why a status page cannot be made or read.
#[derive(Debug, thiserror::Error)]
pub enum StatusPageError {
    #[error("cannot {operation} {}: {cause}", .path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        cause: io::Error,
    },
    #[error("cannot read {}: it is damaged: {what}", .path.display())]
    Damaged { path: PathBuf, what: &'static str },
    #[error(
        "cannot read {}: the service was started by an `unbroken` whose page has version \
         {found} and this program knows version {known}; use the program that started it",
        .path.display()
    )]
    Version {
        path: PathBuf,
        found: u64,
        known: u64,
    },
}

/// What does not change while a service lives. Texts longer than their room (1,024 bytes for the
/// command, 128 for the address, [`PUBLISHED_BYTES_MAX`] for the ports) are cut.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    pub command: &'a str,
    /// The service's addresses, separated by ", ", first the one that users are told.
    pub address: &'a str,
    /// The published ports, separated by ", ".
    pub published: &'a str,
}

/// A mapped status page.
#[derive(Debug)]
pub struct StatusPage {
    words: MappedWords,
}

impl StatusPage {
    /// Makes the status page of a claimed directory: state `starting`, everything else 0 or empty. It
    /// appears whole under its name, so nobody opens a half-made one.
    ///
    /// # Errors
    /// What making, mapping or naming the file says.
    pub fn create(
        directory: &RunDirectory,
        identity: &Identity<'_>,
    ) -> Result<StatusPage, StatusPageError> {
        let path = directory.path().join("status-page.new");
        let failed = |operation| {
            let path = path.clone();
            move |cause| StatusPageError::Io {
                operation,
                path,
                cause,
            }
        };
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o644)
            .open(&path)
            .map_err(failed("create"))?;
        file.set_len((layout::WORDS * 8) as u64)
            .map_err(failed("set the length of"))?;
        let words =
            MappedWords::map(&file, layout::WORDS, Access::ReadWrite).map_err(failed("map"))?;
        let page = StatusPage { words };
        page.set(Word::Magic, layout::MAGIC);
        page.set(Word::Version, layout::VERSION);
        page.set(Word::Length, layout::WORDS as u64);
        page.set(Word::State, ServiceState::Starting as u64);
        page.set_text(layout::NAME, directory.name().as_str());
        page.set_text(layout::COMMAND, identity.command);
        page.set_text(layout::ADDRESS, identity.address);
        page.set_text(layout::PUBLISHED, identity.published);
        fs::rename(&path, directory.status_page()).map_err(failed("name"))?;
        Ok(page)
    }

    /// Opens the status page of a service to write to it: what every process of ours does.
    ///
    /// # Errors
    /// A missing, short, foreign or other-version file, each said as such.
    pub fn open(directory: &RunDirectory) -> Result<StatusPage, StatusPageError> {
        StatusPage::open_with(directory, Access::ReadWrite)
    }

    /// Opens the status page only to look at it; needs no more than read permission.
    ///
    /// # Errors
    /// As [`StatusPage::open`].
    pub fn open_to_read(directory: &RunDirectory) -> Result<StatusPage, StatusPageError> {
        StatusPage::open_with(directory, Access::Read)
    }

    fn open_with(directory: &RunDirectory, access: Access) -> Result<StatusPage, StatusPageError> {
        let path = directory.status_page();
        let failed = |operation, cause| StatusPageError::Io {
            operation,
            path: path.clone(),
            cause,
        };
        let damaged = |what| StatusPageError::Damaged {
            path: path.clone(),
            what,
        };
        let file = File::options()
            .read(true)
            .write(access == Access::ReadWrite)
            .open(&path)
            .map_err(|cause| failed("open", cause))?;
        let length = file
            .metadata()
            .map_err(|cause| failed("look at", cause))?
            .len();
        if length < 3 * 8 {
            return Err(damaged("it is too short"));
        }
        let header =
            MappedWords::map(&file, 3, Access::Read).map_err(|cause| failed("map", cause))?;
        let header = |word: Word| header.words()[word as usize].load(Ordering::Relaxed);
        if header(Word::Magic) != layout::MAGIC {
            return Err(damaged("it does not begin as a status page does"));
        }
        if header(Word::Version) != layout::VERSION {
            return Err(StatusPageError::Version {
                found: header(Word::Version),
                known: layout::VERSION,
                path,
            });
        }
        if header(Word::Length) != layout::WORDS as u64 || length != (layout::WORDS * 8) as u64 {
            return Err(damaged("its length is not that of its version"));
        }
        let words =
            MappedWords::map(&file, layout::WORDS, access).map_err(|cause| failed("map", cause))?;
        Ok(StatusPage { words })
    }

    fn word(&self, word: Word) -> &AtomicU64 {
        &self.words.words()[word as usize]
    }

    fn set(&self, word: Word, value: u64) {
        self.word(word).store(value, Ordering::Release);
    }

    fn get(&self, word: Word) -> u64 {
        self.word(word).load(Ordering::Acquire)
    }

    fn add(&self, word: Word, value: u64) {
        self.word(word).fetch_add(value, Ordering::Relaxed);
    }

    fn set_text(&self, place: TextPlace, value: &str) {
        let mut end = value.len().min(place.bytes);
        while !value.is_char_boundary(end) {
            end -= 1;
        }
        text::write(self.words.words(), place, &value.as_bytes()[..end]);
    }

    /// Sets the state and why it is so ("" when there is nothing to say), and keeps the account of
    /// unprotected time. The reason is cut to 256 bytes.
    pub fn set_state(&self, state: ServiceState, reason: &str) {
        let now_ns = now_ns();
        let since_ns = self.get(Word::UnprotectedSinceNs);
        match (since_ns, state.is_exposed()) {
            (0, true) => self.set(Word::UnprotectedSinceNs, now_ns),
            (1.., false) => {
                self.set(Word::UnprotectedSinceNs, 0);
                self.add(Word::UnprotectedTotalNs, now_ns.saturating_sub(since_ns));
            }
            _ => {}
        }
        self.set_text(layout::REASON, reason);
        self.set(Word::State, state as u64);
    }

    /// The state; `Failed` when the word is none of ours.
    pub fn state(&self) -> ServiceState {
        ServiceState::from_word(self.get(Word::State)).unwrap_or(ServiceState::Failed)
    }

    pub fn set_term(&self, term: u64) {
        self.set(Word::Term, term);
    }

    pub fn term(&self) -> u64 {
        self.get(Word::Term)
    }

    /// Pids as the host sees them; 0 is none.
    pub fn set_front_pid(&self, pid: i32) {
        self.set(Word::FrontPid, u64::from(pid.cast_unsigned()));
    }

    /// As [`StatusPage::set_front_pid`].
    pub fn set_primary_pid(&self, pid: i32) {
        self.set(Word::PrimaryPid, u64::from(pid.cast_unsigned()));
    }

    /// As [`StatusPage::set_front_pid`].
    pub fn set_standby_pid(&self, pid: i32) {
        self.set(Word::StandbyPid, u64::from(pid.cast_unsigned()));
    }

    /// 0 when there is none.
    pub fn front_pid(&self) -> i32 {
        self.get(Word::FrontPid) as i32
    }

    /// 0 when there is none.
    pub fn primary_pid(&self) -> i32 {
        self.get(Word::PrimaryPid) as i32
    }

    /// 0 when there is none.
    pub fn standby_pid(&self) -> i32 {
        self.get(Word::StandbyPid) as i32
    }

    /// Why the state is as it is; empty when there is nothing to say.
    pub fn reason(&self) -> String {
        self.text(layout::REASON)
    }

    /// The service's live processes as the host sees them; those after the 64th are left out.
    /// Allocates nothing.
    pub fn set_service_pids(&self, pids: &[i32]) {
        let mut bytes = [0; layout::SERVICE_PIDS.bytes];
        let count = pids.len().min(SERVICE_PIDS_MAX);
        for (pid, place) in pids.iter().zip(bytes.chunks_exact_mut(4)) {
            place.copy_from_slice(&pid.to_ne_bytes());
        }
        text::write(
            self.words.words(),
            layout::SERVICE_PIDS,
            &bytes[..count * 4],
        );
    }

    /// Counts a takeover that took so long from the death, or the order, to the first packet; `cause`
    /// is what it was for, cut to 512 bytes.
    pub fn record_takeover(&self, duration_us: u64, cause: &str) {
        self.set_text(layout::TAKEOVER_CAUSE, cause);
        self.set(Word::LastTakeoverUs, duration_us);
        self.add(Word::Takeovers, 1);
    }

    /// Counts a committed epoch. Called by the primary alone; allocates nothing.
    pub fn record_epoch(&self, sequence: u64, dirty_pages: u64, bytes: u64, now_ns: u64) {
        self.set(Word::Epoch, sequence);
        self.add(Word::Epochs, 1);
        self.add(Word::DirtyPages, dirty_pages);
        self.add(Word::Bytes, bytes);
        snapshot::add_to_second(self.seconds(), now_ns, dirty_pages, bytes);
    }

    fn seconds(&self) -> &[AtomicU64] {
        &self.words.words()[layout::SECONDS_AT..layout::PAUSE_AT]
    }

    fn pauses(&self) -> &[AtomicU64] {
        &self.words.words()[layout::PAUSE_AT..layout::HOLD_AT]
    }

    fn holds(&self) -> &[AtomicU64] {
        &self.words.words()[layout::HOLD_AT..layout::STEPS_AT]
    }

    fn step(&self, step: EpochStep) -> &[AtomicU64] {
        let start = layout::STEPS_AT + step as usize * histogram::WORDS;
        &self.words.words()[start..start + histogram::WORDS]
    }

    /// Counts one pause: from the first stopped thread to the last one resumed.
    pub fn record_pause(&self, duration_ns: u64) {
        histogram::record(self.pauses(), duration_ns);
    }

    /// Counts how long one frame of output was held at the gate.
    pub fn record_hold(&self, duration_ns: u64) {
        histogram::record(self.holds(), duration_ns);
    }

    /// Counts how long one step of an epoch took.
    pub fn record_step(&self, step: EpochStep, duration_ns: u64) {
        histogram::record(self.step(step), duration_ns);
    }

    /// How the service ended: its exit code, or 128 + the signal's number.
    pub fn set_exit(&self, code: u8) {
        self.set(Word::Exit, layout::EXITED | u64::from(code));
    }

    /// How the service ended; `None` while it runs.
    pub fn exit(&self) -> Option<u8> {
        let word = self.get(Word::Exit);
        (word & layout::EXITED != 0).then_some(word as u8)
    }
}

#[cfg(test)]
mod tests;
