//! The numbers of all TCP connections of the service in one pass, where the kernel lets us have
//! them so. Whoever finds nothing here asks the socket itself.

use crate::kernel_program::KernelProgram;
use std::io;
use unbroken_image::{Fd, ObjectId, Pid};
use unbroken_objects::table::Mirror;
use unbroken_sys::bpf::{Record, SocketProgram, SocketReader};

/// What reading one connection by calls costs, what a pass costs whatever it finds, and what each
/// open descriptor adds to it; `crates/sys/examples/socket_reading.rs` measures them.
const CALLS_NS: usize = 4_000;
const PASS_NS: usize = 7_000;
const DESCRIPTOR_NS: usize = 250;

/// When to read all connections at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    Always,
    IfCheaper,
}

pub(super) struct Sockets {
    program: KernelProgram<SocketProgram>,
    /// The process, by its number in the service and in ours.
    process: Option<(Pid, i32)>,
    reader: Option<SocketReader>,
    records: Vec<Record>,
    /// Which record is which object's, ascending.
    found: Vec<(ObjectId, usize)>,
}

impl Sockets {
    pub fn new(spare_core: usize) -> Sockets {
        // The first survey is better off with it.
        let mut program = KernelProgram::Unasked;
        program.ask_for(spare_core, SocketProgram::load);
        Sockets {
            program,
            process: None,
            reader: None,
            records: Vec::new(),
            found: Vec::new(),
        }
    }

    /// Waits until it is known whether all connections can be read at once: whoever cannot needs
    /// repair mode, in which a socket stays when its primary dies.
    pub fn settle(&mut self) {
        if let Err(error) = self.program.wait() {
            crate::log!("sockets are read one by one from now on: {error}");
        }
    }

    /// From now on this process is read.
    pub fn follow(&mut self, pid: Pid, host_pid: i32) {
        self.process = Some((pid, host_pid));
        self.reader = None;
        self.found.clear();
    }

    /// Reads all connections, when that is wanted or cheaper than asking those `active` ones of them
    /// that have to be looked at. `mirror` agrees with the table of descriptors, and the service stands.
    pub fn read(&mut self, mirror: &Mirror, active: usize, pass: Pass) {
        self.found.clear();
        let Some((pid, host_pid)) = self.process else {
            return;
        };
        let pass_ns = PASS_NS + mirror.open_slots(pid) * DESCRIPTOR_NS;
        if pass == Pass::IfCheaper && active * CALLS_NS <= pass_ns {
            return;
        }
        if let Err(error) = self.pass(host_pid) {
            crate::log!("sockets are read one by one from now on: {error}");
            self.reader = None;
            self.program = KernelProgram::Absent;
            return;
        }
        for (index, record) in self.records.iter().enumerate() {
            if let Some(slot) = mirror.slot(pid, Fd(record.descriptor())) {
                self.found.push((slot.object, index));
            }
        }
        self.found.sort_unstable();
    }

    /// What the last pass said of a connection.
    pub fn record(&self, id: ObjectId) -> Option<&Record> {
        let place = self.found.binary_search_by_key(&id, |(found, _)| *found);
        self.records.get(self.found[place.ok()?].1)
    }

    /// Leaves `records` empty while there is no program.
    fn pass(&mut self, host_pid: i32) -> io::Result<()> {
        self.records.clear();
        let Some(program) = self.program.ready()? else {
            return Ok(());
        };
        let reader = match self.reader.take() {
            Some(reader) => reader,
            None => program.reader(host_pid)?,
        };
        self.reader.insert(reader).read(&mut self.records)
    }
}
