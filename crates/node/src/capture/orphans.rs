//! Orphaned connections: the service has closed them while its kernel still brings the rest to
//! their clients (KERNEL.md, Orphaned connections). They are objects of the epoch that no slot names:
//! a replica restores and closes them.

use super::CaptureError;
use super::delta::ObjectsDelta;
use crate::stage::closings::{Closings, is_unfinished};
use unbroken_image::object::TcpConnection;
use unbroken_image::{Object, ObjectId};
use unbroken_sys::tcp_diag::TcpDiag;
use unbroken_wire::Tuple;

#[derive(Default)]
pub(super) struct Orphans {
    list: Vec<(ObjectId, TcpConnection)>,
    /// Of the service's network namespace; opened with the first of them.
    diag: Option<TcpDiag>,
    /// Noted since the last capture.
    noted: Vec<TcpConnection>,
}

/// What the rest of the capture knows.
pub(super) struct Context<'a> {
    /// Connections that stood in the table at the last capture and do not any more.
    pub gone: &'a [(ObjectId, Tuple)],
    /// The epoch tells a standby that knows nothing: of every connection, and none on trust.
    pub is_new: bool,
}

impl Orphans {
    /// Takes in what was noted since the last capture.
    pub fn hear(&mut self, closings: &Closings) {
        closings.take(&mut self.noted, &mut self.diag);
    }

    /// Brings the epoch up to date. `stands` says whether a connection is in the table,
    /// `number` gives out numbers.
    pub fn update(
        &mut self,
        context: &Context<'_>,
        stands: impl Fn(&TcpConnection) -> bool,
        mut number: impl FnMut() -> ObjectId,
        delta: &mut ObjectsDelta,
    ) -> Result<(), CaptureError> {
        let Self { list, diag, noted } = self;
        let diag = diag.as_ref();
        let is_finished = |connection: &TcpConnection| match diag {
            Some(diag) => is_unfinished(diag, connection).map(|unfinished| !unfinished),
            None => Ok(false),
        };
        for index in (0..list.len()).rev() {
            let (id, connection) = &list[index];
            if is_finished(connection)? {
                delta.gone.push(*id);
                list.swap_remove(index);
            } else if context.is_new {
                delta
                    .objects
                    .push((*id, Object::TcpConnection(connection.clone())));
            }
        }
        for connection in noted.drain(..) {
            // Still open: by another descriptor, or because the close has not run.
            if stands(&connection) {
                continue;
            }
            // One that was just closed goes along even if it was reset: its client may not have
            // heard of it. What was closed long ago may have another connection in its place.
            if context.is_new && is_finished(&connection)? {
                continue;
            }
            let tuple = Tuple::from(&connection);
            // The same connection, announced twice, or one before it between the same ends.
            let listed = list
                .iter()
                .position(|(_, other)| Tuple::from(other) == tuple);
            let listed = listed.map(|index| list.swap_remove(index).0);
            let gone = context.gone.iter().find(|(_, other)| *other == tuple);
            let id = listed
                .or(gone.map(|(id, _)| *id))
                .unwrap_or_else(&mut number);
            delta.gone.retain(|gone| *gone != id);
            delta
                .objects
                .push((id, Object::TcpConnection(connection.clone())));
            list.push((id, connection));
        }
        Ok(())
    }
}
