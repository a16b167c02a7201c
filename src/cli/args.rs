//! What can be said to qmpin.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::cpuset::CpuSet;
use crate::discover::{PolicyFileError, VmLocation, load_policy};
use crate::error::{Failure, Kind};
use crate::ids::VmName;
use crate::leases::StateDir;
use crate::policy::{
    ChannelChoice, CpuChoice, Fragment, Level, Origin, Overflow, Policy, Sharing, Sourced,
};
use crate::qmp::Limits;
use crate::sysroot::SysRoot;

const CONFIG_DIR: &str = "etc/qmpin";
const STATE_DIR: &str = "run/qmpin";
const PROXMOX_DIR: &str = "/run/qemu-server";

/// Pin the threads of a QEMU VM to the right CPUs, follow it, and put everything back
#[derive(Parser, Debug)]
#[command(name = "qmpin", version, max_term_width = 100, propagate_version = true)]
pub(super) struct Qmpin {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) command: Command,
}

/// Where things are, for every command.
#[derive(Args, Debug)]
pub(super) struct Global {
    /// Read policy from here instead of /etc/qmpin
    #[arg(long, global = true, value_name = "DIR")]
    pub(super) config_dir: Option<PathBuf>,
    /// Keep leases and journals here instead of /run/qmpin
    #[arg(long, global = true, value_name = "DIR")]
    pub(super) state_dir: Option<PathBuf>,
    /// Find Proxmox VMs here
    #[arg(long, global = true, value_name = "DIR", default_value = PROXMOX_DIR)]
    pub(super) proxmox_dir: PathBuf,
    /// Log more; twice for still more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(super) verbose: u8,
    /// Log warnings and errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(super) quiet: bool,
}

#[derive(Subcommand, Debug)]
pub(super) enum Command {
    /// Pin a VM, follow it, and put everything back at its end
    Attach(AttachArgs),
    /// Put everything back; works after any crash
    Detach(DetachArgs),
    /// Show every thread of a VM: role, CPUs, last CPU
    Threads(ThreadsArgs),
    /// Show what attach would do, and why
    Plan(PlanArgs),
    /// Show which VMs are attached, what they have, and what was refused
    Status(StatusArgs),
    /// Check that all that was promised holds
    Verify(VerifyArgs),
    /// Show the machine: nodes, caches, cores, siblings, and who has what
    Topology(TopologyArgs),
}

/// Which VM.
#[derive(Args, Debug)]
pub(super) struct VmArgs {
    /// A Proxmox vmid, or any name with --qmp
    #[arg(value_name = "VM")]
    pub(super) vm: VmName,
    /// The QMP socket of a VM that is not Proxmox's
    #[arg(long, value_name = "PATH")]
    pub(super) qmp: Option<PathBuf>,
    /// How long to wait for one's turn at a monitor that another client has
    #[arg(long, value_name = "SECONDS", default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    wait_s: u64,
}

/// Where the host is read from.
#[derive(Args, Debug)]
pub(super) struct RootArgs {
    /// Read the host (sys, etc/qmpin, run/qmpin) below DIR; a running VM is always asked live
    #[arg(long, value_name = "DIR")]
    pub(super) sysroot: Option<PathBuf>,
}

impl RootArgs {
    /// # Errors
    /// A failure of usage where the folder is none.
    pub(super) fn root(&self) -> Result<SysRoot, Failure> {
        match &self.sysroot {
            None => Ok(SysRoot::live()),
            Some(dir) if dir.is_dir() => Ok(SysRoot::at(dir)),
            Some(dir) => {
                Err(Failure::new(Kind::Usage, format!("--sysroot {}: not a folder", dir.display())))
            }
        }
    }
}

/// Policy by hand; stronger than any file.
#[derive(Args, Debug)]
pub(super) struct PolicyArgs {
    /// CPUs for vCPUs, such as 6-11,18-23
    #[arg(long, value_name = "CPULIST|auto", value_parser = choice)]
    vcpus: Option<CpuChoice>,
    /// CPUs for iothreads
    #[arg(long, value_name = "CPULIST|auto", value_parser = choice)]
    iothreads: Option<CpuChoice>,
    /// CPUs for the emulator threads
    #[arg(long, value_name = "CPULIST|auto", value_parser = choice)]
    emulator: Option<CpuChoice>,
    /// Take a VM with more vCPUs than CPUs: they share
    #[arg(long)]
    share: bool,
    /// What becomes of a hot-added vCPU that no longer fits
    #[arg(long, value_enum)]
    overflow: Option<Overflow>,
    /// How QEMU is asked
    #[arg(long, value_enum)]
    channel: Option<ChannelChoice>,
    /// How alone the VM is to be on its CPUs
    #[arg(long, value_enum)]
    isolation: Option<Level>,
}

fn choice(text: &str) -> Result<CpuChoice, String> {
    if text == "auto" {
        return Ok(CpuChoice::Auto);
    }
    match CpuSet::parse_cpulist(text) {
        Ok(cpus) if cpus.is_empty() => Err("it names no CPU".to_owned()),
        Ok(cpus) => Ok(CpuChoice::Cpus(cpus)),
        Err(error) => Err(error.to_string()),
    }
}

impl PolicyArgs {
    fn fragment(&self) -> Fragment {
        fn flag<T>(value: Option<T>, flag: &'static str) -> Option<Sourced<T>> {
            value.map(|value| Sourced { value, origin: Origin::Flag { flag } })
        }
        Fragment {
            vcpus: flag(self.vcpus, "--vcpus"),
            iothreads: flag(self.iothreads, "--iothreads"),
            emulator: flag(self.emulator, "--emulator"),
            share: flag(self.share.then_some(Sharing::Wrap), "--share"),
            overflow: flag(self.overflow, "--overflow"),
            channel: flag(self.channel, "--channel"),
            isolation: flag(self.isolation, "--isolation"),
            ..Fragment::default()
        }
    }

    /// The merged policy of files and flags.
    ///
    /// # Errors
    /// A failure of usage with file, line and reason.
    pub(super) fn policy(
        &self,
        global: &Global,
        root: &SysRoot,
        vm: &VmName,
    ) -> Result<Policy, Failure> {
        let mut fragments = fragments(global, root, Some(vm))?;
        fragments.push(self.fragment());
        Ok(Policy::merge(fragments))
    }
}

/// The policy of the host's file alone.
///
/// # Errors
/// A failure of usage with file, line and reason.
pub(super) fn host_policy(global: &Global, root: &SysRoot) -> Result<Policy, Failure> {
    Ok(Policy::merge(fragments(global, root, None)?))
}

fn fragments(
    global: &Global,
    root: &SysRoot,
    vm: Option<&VmName>,
) -> Result<Vec<Fragment>, Failure> {
    let dir = global.config_dir.clone().unwrap_or_else(|| root.root().join(CONFIG_DIR));
    load_policy(&dir, vm).map_err(|error| {
        let kind = match &error {
            PolicyFileError::Read { source, .. }
                if source.kind() == std::io::ErrorKind::PermissionDenied =>
            {
                Kind::Permission
            }
            _ => Kind::Usage,
        };
        Failure::from_error(kind, error).hint("nothing was changed")
    })
}

impl Global {
    /// Where leases and journals are.
    pub(super) fn state(&self, root: &SysRoot) -> StateDir {
        let default = || root.root().join(STATE_DIR);
        StateDir::at(self.state_dir.clone().unwrap_or_else(default))
    }
}

impl VmArgs {
    /// What QEMU is granted.
    pub(super) fn limits(&self) -> Limits {
        Limits { wait_turn_max: Duration::from_secs(self.wait_s), ..Limits::default() }
    }

    /// Where the VM is found.
    pub(super) fn location(&self, global: &Global) -> VmLocation {
        match &self.qmp {
            Some(path) => VmLocation::Socket { path: path.clone() },
            None => VmLocation::Proxmox { dir: global.proxmox_dir.clone() },
        }
    }
}

#[derive(Args, Debug)]
pub(super) struct AttachArgs {
    #[command(flatten)]
    pub(super) vm: VmArgs,
    #[command(flatten)]
    pub(super) policy: PolicyArgs,
    /// Apply and leave; detach puts it back
    #[arg(long, conflicts_with = "dry_run")]
    pub(super) once: bool,
    /// Print the steps and change nothing
    #[arg(long)]
    pub(super) dry_run: bool,
}

#[derive(Args, Debug)]
pub(super) struct DetachArgs {
    /// Which VM
    #[arg(value_name = "VM", required_unless_present = "all")]
    pub(super) vm: Option<VmName>,
    /// Every attached VM
    #[arg(long, conflicts_with = "vm")]
    pub(super) all: bool,
    /// Not needed: what is put back is in the journal
    #[arg(long, value_name = "PATH", hide = true)]
    pub(super) qmp: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(super) struct StatusArgs {
    /// This one alone
    #[arg(value_name = "VM")]
    pub(super) vm: Option<VmName>,
    /// Print the document qmpin.status/1
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Args, Debug)]
pub(super) struct VerifyArgs {
    #[command(flatten)]
    pub(super) vm: VmArgs,
    /// Print the document qmpin.verify/1
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Args, Debug)]
pub(super) struct ThreadsArgs {
    #[command(flatten)]
    pub(super) vm: VmArgs,
    #[command(flatten)]
    pub(super) root: RootArgs,
    /// Print the document qmpin.threads/1
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Args, Debug)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    pub(super) vm: VmArgs,
    #[command(flatten)]
    pub(super) policy: PolicyArgs,
    #[command(flatten)]
    pub(super) root: RootArgs,
    /// Print the document qmpin.plan/1
    #[arg(long)]
    pub(super) json: bool,
    /// Say for each choice which rule made it
    #[arg(long)]
    pub(super) explain: bool,
}

#[derive(Args, Debug)]
pub(super) struct TopologyArgs {
    #[command(flatten)]
    pub(super) root: RootArgs,
    /// Print the document qmpin.topology/1
    #[arg(long)]
    pub(super) json: bool,
}
