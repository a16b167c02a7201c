//! The command line.

mod policy;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

pub(super) use policy::{PolicyArgs, host_policy};

use crate::attachment::settings::{Follow, Settings, declare};
use crate::discover::{
    PolicyDirs, ProxmoxConfig, VmLocation, enabled_vms, memory, proxmox_config, proxmox_config_path,
};
use crate::error::{Failure, Kind};
use crate::ids::VmName;
use crate::leases::StateDir;
use crate::plan::Declared;
use crate::policy::{Origin, Policy, Sourced};
use crate::qmp::{AskMemory, Limits};
use crate::sysroot::SysRoot;

const CONFIG_DIR: &str = "etc/qmpin";
/// Proxmox's cluster file system, the same on every node (`pmxcfs`).
const CLUSTER_DIR: &str = "etc/pve";
const COPIES_DIR: &str = "var/lib/qmpin";
const STATE_DIR: &str = "run/qmpin";
const PROXMOX_DIR: &str = "/run/qemu-server";

/// Pin the threads of a QEMU VM to the right CPUs
///
/// qmpin asks QEMU which host thread is which, gives each vCPU a CPU, excludes everything else from these CPUs, follows
/// the VM through resets and hotplug, and restores the host when the VM stops.
#[derive(Parser, Debug)]
#[command(
    name = "qmpin",
    version,
    max_term_width = 100,
    propagate_version = true,
    after_help = "\
Examples:
  qmpin plan 100 --explain        see what would be done, and why
  qmpin attach 100                pin VM 100 until it stops, or until Ctrl-C
  systemctl enable --now qmpin@100.path
                                  pin VM 100 now, and whenever it starts

See qmpin(7) for concepts and qmpin.toml(5) for the policy."
)]
pub(super) struct Qmpin {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) command: Command,
}

/// Where things are, for every command.
#[derive(Args, Debug)]
#[command(next_help_heading = "Global options")]
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
    /// Log more, and show lists in full; twice for even more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(super) verbose: u8,
    /// Log warnings and errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(super) quiet: bool,
}

#[derive(Subcommand, Debug)]
pub(super) enum Command {
    /// Pin a VM, follow it, and restore the host when it stops
    #[command(after_help = "\
Examples:
  qmpin attach 100
  qmpin attach 100 --vcpus 6-11,18-23 --isolation strict
  qmpin attach win --qmp /run/win/qmp.sock --once")]
    Attach(Box<AttachArgs>),
    /// Restore the host; works after any crash
    #[command(after_help = "\
Examples:
  qmpin detach 100
  qmpin detach --all
  qmpin detach --dead     only VMs whose supervisor or QEMU has died")]
    Detach(DetachArgs),
    /// Say whether a VM's service may start: for systemd
    #[command(hide = true)]
    MayStart(MayStartArgs),
    /// Have the service of a VM read its policy again
    #[command(hide = true)]
    Reload(ReloadArgs),
    /// Show every thread of a VM: role, CPUs, last CPU
    #[command(after_help = "\
Examples:
  qmpin threads 100
  qmpin threads 100 --json | jq -r '.threads[] | select(.role == \"vcpu\") | .tid'")]
    Threads(ThreadsArgs),
    /// Show what attach would do, and why
    #[command(after_help = "\
Examples:
  qmpin plan 100
  qmpin plan 100 --explain
  qmpin plan 100 --vcpus 2-5 --share
  qmpin plan --all           every VM of this host, and what is left")]
    Plan(Box<PlanArgs>),
    /// Show attached VMs, their CPUs, and what was refused
    #[command(after_help = "\
Examples:
  qmpin status
  qmpin status 100 --json")]
    Status(StatusArgs),
    /// Check that everything promised holds
    #[command(after_help = "\
Examples:
  qmpin verify 100          exit code 1 where something does not hold
  qmpin verify 100 --json")]
    Verify(VerifyArgs),
    /// Show what adds latency, and the command that fixes it
    #[command(after_help = "\
Examples:
  qmpin doctor
  qmpin doctor 100")]
    Doctor(DoctorArgs),
    /// Show or check the policy
    #[command(
        subcommand,
        after_help = "\
Examples:
  qmpin config show 100     each key, its value, and where that is from
  qmpin config check        every policy file of this host"
    )]
    Config(ConfigCommand),
    /// Show nodes, caches, cores, siblings, and their owners
    #[command(after_help = "\
Examples:
  qmpin topology
  qmpin topology --svg host.svg")]
    Topology(TopologyArgs),
}

/// Which VM.
#[derive(Args, Debug)]
pub(super) struct VmArgs {
    /// A Proxmox vmid, or any name with --qmp
    #[arg(value_name = "VM")]
    pub(super) vm: VmName,
    #[command(flatten)]
    pub(super) ask: AskArgs,
}

/// How QEMU is found and asked.
#[derive(Args, Clone, Debug)]
pub(super) struct AskArgs {
    /// The QMP socket of a VM that is not Proxmox's
    #[arg(long, value_name = "PATH", requires = "vm")]
    qmp: Option<PathBuf>,
    /// Seconds to wait while another client holds the QMP monitor
    #[arg(long, value_name = "SECONDS", default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    wait_s: u64,
}

/// Where the host is read from.
#[derive(Args, Debug)]
pub(super) struct RootArgs {
    /// Read the host (sys, etc/qmpin, run/qmpin) below DIR; a running VM is always asked live
    #[arg(long, value_name = "DIR")]
    sysroot: Option<PathBuf>,
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

/// Whether a VM is Proxmox's, so that its cluster has a say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    Proxmox,
    Elsewhere,
}

impl Global {
    /// Where policy files are.
    pub(super) fn policy_dirs(&self, root: &SysRoot, place: Place) -> PolicyDirs {
        let below = |path: &str| root.root().join(path);
        PolicyDirs {
            host: self.config_dir.clone().unwrap_or_else(|| below(CONFIG_DIR)),
            cluster: (place == Place::Proxmox).then(|| below(CLUSTER_DIR)),
            copies: below(COPIES_DIR),
        }
    }

    /// Where leases and journals are.
    pub(super) fn state(&self, root: &SysRoot) -> StateDir {
        let default = || root.root().join(STATE_DIR);
        StateDir::at(self.state_dir.clone().unwrap_or_else(default))
    }
}

impl VmArgs {
    /// What to attach, and how.
    pub(super) fn settings(
        &self,
        global: &Global,
        root: &SysRoot,
        policy: Policy,
        follow: Follow,
    ) -> Settings {
        Settings {
            vm: self.vm.clone(),
            location: self.ask.location(global),
            state: global.state(root),
            limits: self.ask.limits(policy.vm.max_vcpus.value),
            policy,
            follow,
            enabled: self.others_enabled(global, root),
        }
    }

    /// The other VMs that are enabled, as far as they are known.
    fn others_enabled(&self, global: &Global, root: &SysRoot) -> Vec<Declared> {
        let dirs = global.policy_dirs(root, Place::Proxmox);
        let others = enabled_vms(root).into_iter().filter(|vm| *vm != self.vm);
        others.filter_map(|vm| declare(&dirs, root, &vm).ok()).collect()
    }

    /// The policy, with the number of vCPUs that Proxmox's configuration has where no policy file has one.
    fn bounded(&self, mut policy: Policy, root: &SysRoot) -> Policy {
        if policy.vm.max_vcpus.value.is_none() && self.ask.place() == Place::Proxmox {
            match proxmox_config(root, &self.vm) {
                Ok(ProxmoxConfig { max_vcpus: Some(max), cores_line: line, .. }) => {
                    let path = root.root().join(proxmox_config_path(&self.vm));
                    let origin = Origin::File { path, line };
                    policy.vm.max_vcpus = Sourced { value: Some(max), origin };
                }
                Ok(_) => {}
                Err(reason) => tracing::debug!("VM {}: vCPUs are not bounded: {reason}", self.vm),
            }
        }
        policy
    }
}

impl AskArgs {
    /// What QEMU is granted, where the VM has at most so many vCPUs.
    pub(super) fn limits(&self, max_vcpus: Option<u32>) -> Limits {
        Limits {
            memory: if memory::has_one_node(&SysRoot::live()) {
                AskMemory::No
            } else {
                AskMemory::Yes
            },
            vcpus_named_max: max_vcpus.and_then(|max| usize::try_from(max).ok()),
            wait_turn_max: Duration::from_secs(self.wait_s),
            ..Limits::default()
        }
    }

    pub(super) fn place(&self) -> Place {
        if self.qmp.is_some() { Place::Elsewhere } else { Place::Proxmox }
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
#[allow(clippy::struct_excessive_bools)] // each is a flag of the command line
pub(super) struct AttachArgs {
    #[command(flatten)]
    pub(super) vm: VmArgs,
    /// Apply once and exit; `qmpin detach` restores the host
    #[arg(long, conflicts_with = "dry_run")]
    pub(super) once: bool,
    /// Print the steps and change nothing
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Use the last good policy where a file cannot be used
    #[arg(long, conflicts_with = "dry_run")]
    pub(super) last_good: bool,
    /// Behave as a service: wait for room, follow a VM that restarts
    #[arg(long, conflicts_with_all = ["dry_run", "once"])]
    pub(super) service: bool,
    #[command(flatten)]
    pub(super) policy: PolicyArgs,
}

#[derive(Subcommand, Debug)]
pub(super) enum ConfigCommand {
    /// Show the merged policy of a VM, and where each value is from
    Show(Box<ConfigShowArgs>),
    /// Check policy files: those of one VM, or all there are
    Check(ConfigCheckArgs),
}

#[derive(Args, Debug)]
pub(super) struct ConfigShowArgs {
    /// Print the document qmpin.config/1
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) vm: VmArgs,
    #[command(flatten)]
    pub(super) root: RootArgs,
    #[command(flatten)]
    pub(super) policy: PolicyArgs,
}

#[derive(Args, Debug)]
pub(super) struct ConfigCheckArgs {
    /// Only the files of this VM and of the host
    #[arg(value_name = "VM")]
    pub(super) vm: Option<VmName>,
    #[command(flatten)]
    pub(super) root: RootArgs,
    /// Print the document qmpin.config-check/1
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Args, Debug)]
pub(super) struct DetachArgs {
    /// Which VM
    #[arg(value_name = "VM", required_unless_present_any = ["all", "dead"])]
    pub(super) vm: Option<VmName>,
    /// Every attached VM
    #[arg(long, conflicts_with = "vm")]
    pub(super) all: bool,
    /// Only VMs whose supervisor or QEMU has died
    #[arg(long, conflicts_with = "all")]
    pub(super) dead: bool,
    /// Not needed: what is restored is in the journal
    #[arg(long, value_name = "PATH", hide = true)]
    pub(super) qmp: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(super) struct MayStartArgs {
    /// Which VM
    #[arg(value_name = "VM")]
    pub(super) vm: VmName,
    /// systemd starts the service by itself
    #[arg(long)]
    pub(super) automatic: bool,
}

#[derive(Args, Debug)]
pub(super) struct ReloadArgs {
    /// Which VM
    #[arg(value_name = "VM")]
    pub(super) vm: VmName,
}

#[derive(Args, Debug)]
pub(super) struct StatusArgs {
    /// Only this VM
    #[arg(value_name = "VM")]
    pub(super) vm: Option<VmName>,
    #[command(flatten)]
    pub(super) root: RootArgs,
    /// Print the document qmpin.status/1
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Args, Debug)]
pub(super) struct VerifyArgs {
    #[command(flatten)]
    pub(super) vm: VmArgs,
    #[command(flatten)]
    pub(super) root: RootArgs,
    /// Print the document qmpin.verify/1
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Args, Debug)]
pub(super) struct DoctorArgs {
    /// Check this VM, too
    #[arg(value_name = "VM")]
    pub(super) vm: Option<VmName>,
    #[command(flatten)]
    pub(super) ask: AskArgs,
    #[command(flatten)]
    pub(super) root: RootArgs,
    /// Print the document qmpin.doctor/1
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
    /// A Proxmox vmid, or any name with --qmp
    #[arg(value_name = "VM", required_unless_present = "all")]
    pub(super) vm: Option<VmName>,
    #[command(flatten)]
    pub(super) all: AllPlanArgs,
    /// Print the document qmpin.plan/1, or qmpin.plan-all/1
    #[arg(long)]
    pub(super) json: bool,
    /// Say for each choice which rule made it
    #[arg(long, conflicts_with = "all")]
    pub(super) explain: bool,
    #[command(flatten)]
    pub(super) ask: AskArgs,
    #[command(flatten)]
    pub(super) root: RootArgs,
    #[command(flatten)]
    pub(super) policy: PolicyArgs,
}

/// All VMs at once.
#[derive(Args, Debug)]
pub(super) struct AllPlanArgs {
    /// Place every VM of this host that has a policy, is enabled, or attached
    #[arg(long, conflicts_with_all = ["vm", "vcpus", "iothreads", "emulator", "share", "overflow", "channel",
        "isolation"])]
    pub(super) all: bool,
    /// Place attached VMs anew, too
    #[arg(long, requires = "all")]
    pub(super) replan: bool,
    /// Write the picture to FILE as SVG; - is standard output
    #[arg(long, value_name = "FILE", requires = "all", conflicts_with = "json")]
    pub(super) svg: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(super) struct TopologyArgs {
    #[command(flatten)]
    pub(super) root: RootArgs,
    /// Print the document qmpin.topology/1
    #[arg(long)]
    pub(super) json: bool,
    /// Draw the picture into this file, as SVG; `-` is standard output
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    pub(super) svg: Option<PathBuf>,
}
