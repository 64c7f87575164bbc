//! The numbers of all TCP connections of the service in one pass, where the kernel lets us have
//! them so. Whoever finds nothing here asks the socket itself.

use crate::kernel_program::KernelProgram;
use std::io;
use unbroken_image::{Fd, ObjectId, Pid};
use unbroken_objects::table::{Mirror, Source};
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
    processes: Vec<OfProcess>,
    /// Which record of which process is which object's, ascending.
    found: Vec<(ObjectId, (usize, usize))>,
}

struct OfProcess {
    pid: Pid,
    host_pid: i32,
    reader: Option<SocketReader>,
    records: Vec<Record>,
}

impl Sockets {
    pub fn new(spare_core: usize) -> Sockets {
        // The first survey is better off with it.
        let mut program = KernelProgram::Unasked;
        program.ask_for(spare_core, SocketProgram::load);
        Sockets {
            program,
            processes: Vec::new(),
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

    /// From now on these processes are read.
    pub fn follow(&mut self, sources: &[Source]) {
        let processes = sources.iter().map(|source| OfProcess {
            pid: source.pid,
            host_pid: source.host_pid,
            reader: None,
            records: Vec::new(),
        });
        self.processes.clear();
        self.processes.extend(processes);
        self.found.clear();
    }

    /// Reads all connections, when that is wanted or cheaper than asking those `active` ones of them
    /// that have to be looked at. `mirror` agrees with the table of descriptors, and the service stands.
    pub fn read(&mut self, mirror: &Mirror, active: usize, pass: Pass) {
        self.found.clear();
        let of_each = |of: &OfProcess| PASS_NS + mirror.open_slots(of.pid) * DESCRIPTOR_NS;
        let pass_ns = self.processes.iter().map(of_each).sum();
        if pass == Pass::IfCheaper && active * CALLS_NS <= pass_ns {
            return;
        }
        if let Err(error) = self.pass() {
            crate::log!("sockets are read one by one from now on: {error}");
            self.processes.clear();
            self.program = KernelProgram::Absent;
            return;
        }
        for (position, of) in self.processes.iter().enumerate() {
            for (index, record) in of.records.iter().enumerate() {
                if let Some(slot) = mirror.slot(of.pid, Fd(record.descriptor())) {
                    self.found.push((slot.object, (position, index)));
                }
            }
        }
        self.found.sort_unstable();
    }

    /// What the last pass said of a connection.
    pub fn record(&self, id: ObjectId) -> Option<&Record> {
        let place = self.found.binary_search_by_key(&id, |(found, _)| *found);
        let (_, (position, index)) = *self.found.get(place.ok()?)?;
        self.processes.get(position)?.records.get(index)
    }

    /// Leaves the records empty while there is no program.
    fn pass(&mut self) -> io::Result<()> {
        for of in &mut self.processes {
            of.records.clear();
            let Some(program) = self.program.ready()? else {
                continue;
            };
            let reader = match of.reader.take() {
                Some(reader) => reader,
                None => program.reader(of.host_pid)?,
            };
            of.reader.insert(reader).read(&mut of.records)?;
        }
        Ok(())
    }
}
