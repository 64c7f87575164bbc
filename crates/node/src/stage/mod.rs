//! The stage: the namespaces in which a service lives, or a replica waits to.
//!
//! A [`Stage`] is a thread inside them, because network, mount and IPC namespaces belong to a
//! thread. It makes the service's TUN device and starts stage init, the first process of the pid
//! namespace; later it runs whatever must happen inside, such as making a replica's sockets.

pub mod address;
pub mod announcement;
pub mod closings;
mod error;
mod fold;
pub mod host;
pub mod init;
pub mod launch;
pub mod notifier;
pub mod rules;
pub mod seccomp_filter;
pub mod syscalls;
mod sysctl;

pub use error::Error;

use address::Addresses;
use host::{add_address, add_route, bring_up};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;
use std::thread::JoinHandle;
use sysctl::HostSettings;
use unbroken_sys::mount;
use unbroken_sys::namespace::{self, Namespaces};
use unbroken_sys::netlink::{LinkChange, Netlink, Prefix, link_index};
use unbroken_sys::tun;

/// The service's network device.
const DEVICE: &str = "ub0";

const INSIDE: Namespaces = Namespaces::NETWORK
    .and(Namespaces::MOUNT)
    .and(Namespaces::IPC)
    .and(Namespaces::PID);

/// What [`Stage::create`] sets up.
#[derive(Clone, Copy, Debug)]
pub struct StageConfig {
    pub addresses: Addresses,
    /// Of the service's device. Larger packets still cross the link whole, by offload.
    pub mtu_bytes: u32,
}

type Job = Box<dyn FnOnce() + Send>;

/// A thread inside the namespaces of a service. Dropping it ends the thread; the namespaces live
/// on while a process is inside.
#[derive(Debug)]
pub struct Stage {
    tun: OwnedFd,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Stage {
    /// Makes new namespaces with a network of one TUN device and loopback.
    pub fn create(config: StageConfig) -> Result<Stage, Error> {
        Stage::start(move || enter_new(&config))
    }

    fn start(
        enter: impl FnOnce() -> Result<OwnedFd, Error> + Send + 'static,
    ) -> Result<Stage, Error> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (entered, result) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("stage".into())
            .spawn(move || {
                let outcome = enter();
                let inside = outcome.is_ok();
                // Nobody listens only if the creator's thread is gone, and then so are we soon.
                let _ = entered.send(outcome);
                if inside {
                    queue.iter().for_each(|job| job());
                }
            })
            .map_err(Error::during("start the stage thread"))?;
        let tun = result.recv().map_err(|_| Error::StageGone)??;
        Ok(Stage {
            tun,
            jobs: Some(jobs),
            thread: Some(thread),
        })
    }

    /// The service's TUN device, nonblocking, with virtio-net headers. Whoever holds a duplicate
    /// keeps the device alive.
    pub fn tun(&self) -> BorrowedFd<'_> {
        self.tun.as_fd()
    }

    /// Runs `job` on the thread inside and returns its result.
    pub fn run<T, F>(&self, job: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let (done, result) = mpsc::sync_channel(1);
        let job = Box::new(move || {
            // The caller waits for the answer, so it is there.
            let _ = done.send(job());
        });
        let jobs = self.jobs.as_ref().ok_or(Error::StageGone)?;
        jobs.send(job).map_err(|_| Error::StageGone)?;
        result.recv().map_err(|_| Error::StageGone)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // An error is a panic of a job, which its caller has seen as StageGone.
            let _ = thread.join();
        }
    }
}

/// Puts the calling thread into new namespaces and sets their network up.
fn enter_new(config: &StageConfig) -> Result<OwnedFd, Error> {
    let host = HostSettings::read();
    namespace::unshare(INSIDE).map_err(Error::during("create the namespaces of the service"))?;
    mount::make_private().map_err(Error::during("make the mounts of the service private"))?;
    host.apply()?;
    let mut netlink = Netlink::open().map_err(Error::during("open a route socket"))?;
    let up = LinkChange {
        up: true,
        ..LinkChange::default()
    };
    let loopback = link_index("lo").map_err(Error::during("find the device lo"))?;
    netlink
        .set_link(loopback, up)
        .map_err(Error::during("bring up lo"))?;

    let device = tun::create(DEVICE).map_err(Error::tun)?;
    let index = link_index(DEVICE).map_err(Error::during(format!("find the device {DEVICE}")))?;
    let Addresses { service_v4, v6, .. } = config.addresses;
    bring_up(&mut netlink, DEVICE, index, config.mtu_bytes, v6.is_some())?;
    let v4 = (
        IpAddr::from(service_v4),
        IpAddr::from(Ipv4Addr::UNSPECIFIED),
    );
    let v6 = v6.map(|(_, service)| (service.into(), IpAddr::from(Ipv6Addr::UNSPECIFIED)));
    for (service, everywhere) in [v4].into_iter().chain(v6) {
        add_address(&mut netlink, index, service)?;
        let default = Prefix {
            address: everywhere,
            length_bits: 0,
        };
        add_route(&mut netlink, index, default, Some(service))?;
    }
    Ok(device.descriptor)
}
