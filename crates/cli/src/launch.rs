//! Starts a checked plan.

use crate::exit::{Exit, Failure};
use crate::run::Plan;
use std::process::ExitCode;
use unbroken_node::directory::{ClaimError, RunDirectory};

/// Claims the name and starts the service.
///
/// # Errors
/// What could not be had, with an exit code of its kind.
pub fn launch(plan: Plan) -> Result<ExitCode, Failure> {
    let directory = RunDirectory::new(plan.name.clone());
    let _claim = directory.claim().map_err(|error| {
        let exit = match &error {
            ClaimError::Taken(_) => Exit::NameTaken,
            ClaimError::Io { .. } => Exit::Internal,
        };
        Failure::new(exit, error)
    })?;
    let _ = directory.remove();
    Err(Failure::new(
        Exit::NotAvailable,
        "this build has no node to run a service",
    ))
}
