//! `unbroken run`: takes the name, the address and the ports, and hands all to the front.

use crate::check;
use crate::exit::{Exit, Failure};
use crate::flags::RunFlags;
use crate::plan::Plan;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;
use unbroken_node::config::{Bounds, Config, choose_cores};
use unbroken_node::directory::{ClaimError, RUN_ROOT, RunDirectory};
use unbroken_node::front::{self, Ending, FrontError, Order};
use unbroken_node::inherited::Inherited;
use unbroken_node::publish::{self, Target};
use unbroken_node::stage;
use unbroken_node::stage::address::Addresses;
use unbroken_node::stage::host::HostLink;
use unbroken_sys::affinity;

/// Of both devices. Larger packets pass by segmentation offload, so it costs no throughput, and a
/// client anywhere can be reached with it.
const MTU_BYTES: u32 = 1500;

/// Runs a service to its end, or with `--detach` until it is protected.
///
/// # Errors
/// What is wrong with the flags or the machine, before anything is started, or what could not be
/// had, with an exit code of its kind; nothing is left behind then.
pub fn launch(flags: RunFlags) -> Result<ExitCode, Failure> {
    let plan = Plan::new(flags, std::env::var_os("PATH"))?;
    check::before_run()?;
    let inherited = Inherited::read()
        .and_then(|inherited| inherited.set_ours().map(|()| inherited))
        .map_err(|error| {
            let message = format!("cannot set the limits of our own processes: {error}");
            Failure::new(Exit::Internal, message)
        })?;
    let directory = RunDirectory::new(plan.name.clone());
    let claim = directory.claim().map_err(|error| {
        let exit = match &error {
            ClaimError::Taken(_) => Exit::NameTaken,
            ClaimError::Io { .. } => Exit::Internal,
        };
        Failure::new(exit, error)
    })?;
    let ending = make_link(&plan).and_then(|link| {
        publish_ports(&plan, &link)?;
        let order = Order {
            config: config(&plan, link.addresses, inherited)?,
            directory: directory.clone(),
            claim,
            command_text: plan.command_text(),
            address_text: address_text(&plan, &link.addresses),
            published_text: plan.published_text(),
            link,
            detach: plan.detach,
        };
        front::run(order).map_err(|error| {
            let exit = match &error {
                FrontError::Failed(_) => Exit::Failed,
                _ => Exit::Internal,
            };
            Failure::new(exit, error)
        })
    });
    if !matches!(ending, Ok(Ending::Detached | Ending::Unprotected(_))) {
        clean_up(&plan, &directory);
    }
    match ending? {
        Ending::Service(code) => Ok(ExitCode::from(code)),
        Ending::Detached => Ok(ExitCode::SUCCESS),
        Ending::Unprotected(why) => Err(Failure::new(
            Exit::Unprotected,
            format!(
                "{} runs in the background and is not protected: {why}; it will be when that has \
                 changed, `unbroken stop {}` ends it",
                plan.name, plan.name
            ),
        )),
    }
}

/// The primary does the same when the front was killed; what it has done already is no error.
fn clean_up(plan: &Plan, directory: &RunDirectory) {
    if !plan.published.is_empty()
        && let Err(error) = publish::withdraw(&plan.name)
    {
        warn(&error.to_string());
    }
    if let Err(error) = directory.remove() {
        let path = directory.path().display();
        warn(&format!("cannot remove {path}: {error}"));
    }
}

fn warn(text: &str) {
    // With standard error closed there is nobody to tell.
    let _ = writeln!(io::stderr(), "unbroken: warning: {text}");
}

fn make_link(plan: &Plan) -> Result<HostLink, Failure> {
    HostLink::create(plan.address, MTU_BYTES).map_err(|error| {
        let exit = match &error {
            stage::Error::AddressTaken { .. } | stage::Error::NoFreeAddress => Exit::Network,
            _ => Exit::Internal,
        };
        Failure::new(exit, error)
    })
}

fn publish_ports(plan: &Plan, link: &HostLink) -> Result<(), Failure> {
    let target = Target {
        device: &link.name,
        ipv4: Some(link.addresses.service_v4),
        ipv6: link.addresses.v6.map(|(_, service)| service),
    };
    let warnings = publish::check_other_services(Path::new(RUN_ROOT), &plan.name, &plan.published)
        .and_then(|()| publish::publish(&plan.name, &target, &plan.published))
        .map_err(|error| Failure::new(Exit::Network, error))?;
    warnings.iter().for_each(|warning| warn(warning));
    Ok(())
}

fn config(plan: &Plan, addresses: Addresses, inherited: Inherited) -> Result<Config, Failure> {
    const THIS_THREAD: i32 = 0;
    let cores = affinity::cores(THIS_THREAD).map_err(|error| {
        let message = format!("cannot see on which processor cores this may run: {error}");
        Failure::new(Exit::Internal, message)
    })?;
    let (service_core, spare_core) = choose_cores(&cores);
    Ok(Config {
        name: plan.name.to_string(),
        command: plan
            .command
            .iter()
            .map(|word| word.as_bytes().to_vec())
            .collect(),
        user: plan.user.clone(),
        inherited,
        addresses,
        mtu_bytes: MTU_BYTES,
        service_core,
        spare_core,
        // A developer's switches, not a user's: the mirror is compared with the kernel each epoch;
        // whatever is bounded comes to its bound.
        verify: std::env::var_os("UNBROKEN_VERIFY").is_some(),
        bounds: match std::env::var_os("UNBROKEN_SMALL_BOUNDS") {
            Some(_) => Bounds::SMALL,
            None => Bounds::USUAL,
        },
    })
}

/// The service's addresses, first the one that was asked for.
fn address_text(plan: &Plan, addresses: &Addresses) -> String {
    let ipv4 = addresses.service_v4.to_string();
    match addresses.v6 {
        None => ipv4,
        Some((_, ipv6)) if plan.address.is_some_and(|wanted| wanted.is_ipv6()) => {
            format!("{ipv6}, {ipv4}")
        }
        Some((_, ipv6)) => format!("{ipv4}, {ipv6}"),
    }
}
