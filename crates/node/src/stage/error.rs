//! What can go wrong with a stage.

use std::io;
use std::net::IpAddr;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{operation}: {source}")]
    Kernel {
        operation: String,
        source: io::Error,
    },
    #[error("create a TUN device: {source}; load its driver with: modprobe tun")]
    NoTunDriver { source: io::Error },
    #[error(
        "{operation}: not permitted; run unbroken as root, with CAP_SYS_ADMIN and CAP_NET_ADMIN"
    )]
    NotPermitted { operation: String },
    #[error(
        "give the service the address {address}: this host already uses or routes it; choose another --address, or none"
    )]
    AddressTaken { address: IpAddr },
    #[error(
        "find a free address for the service: every /30 of 10.211.0.0/16 is in use; choose one with --address"
    )]
    NoFreeAddress,
    #[error("run {command:?}: no such command in PATH")]
    CommandNotFound { command: String },
    #[error("run {command:?}: permission denied; it must be executable for the service's user")]
    CommandNotExecutable { command: String },
    #[error("run {command:?}: {source}")]
    CommandFailed { command: String, source: io::Error },
    #[error("prepare the service: {step}: {source}")]
    Preparation { step: String, source: io::Error },
    #[error("prepare the service: stage init ended before it was done")]
    InitGone,
    #[error("use the stage: its thread has ended")]
    StageGone,
}

impl Error {
    /// For `map_err`: names the operation and turns the errors that a user can mend into advice.
    pub(crate) fn during(operation: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let operation = operation.into();
        move |source| match source.kind() {
            io::ErrorKind::PermissionDenied => Error::NotPermitted { operation },
            _ => Error::Kernel { operation, source },
        }
    }

    pub(crate) fn tun(source: io::Error) -> Error {
        match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Error::NoTunDriver { source },
            _ => Error::during("create a TUN device")(source),
        }
    }
}
