//! The flags that are policy, and the policy that files and flags come to.

use clap::Args;

use super::{Global, Place, VmArgs};
use crate::error::Failure;
use crate::policy::{
    ChannelChoice, CpuChoice, IothreadChoice, Level, Origin, Overflow, Policy, Sharing, Sourced,
};
use crate::sysroot::SysRoot;

/// Policy by hand; stronger than any file.
#[derive(Args, Debug)]
#[command(next_help_heading = "Policy, stronger than any file")]
pub(in crate::cli) struct PolicyArgs {
    /// CPUs for vCPUs, such as 6-11,18-23; an order such as 5,3,1 is kept
    #[arg(long, value_name = "CPULIST|auto", value_parser = CpuChoice::parse_vcpus)]
    vcpus: Option<CpuChoice>,
    /// CPUs for iothreads
    #[arg(long, value_name = "CPULIST|auto|each", value_parser = IothreadChoice::parse)]
    iothreads: Option<IothreadChoice>,
    /// CPUs for the emulator threads
    #[arg(long, value_name = "CPULIST|auto", value_parser = CpuChoice::parse_set)]
    emulator: Option<CpuChoice>,
    /// Accept more vCPUs than CPUs: they share
    #[arg(long)]
    share: bool,
    /// Where a hot-added vCPU runs that does not fit
    #[arg(long, value_enum)]
    overflow: Option<Overflow>,
    /// How QEMU is queried
    #[arg(long, value_enum)]
    channel: Option<ChannelChoice>,
    /// What is excluded from the VM's CPUs
    #[arg(long, value_enum)]
    isolation: Option<Level>,
}

impl PolicyArgs {
    /// Lays the flags over the policy of the files.
    fn over(&self, mut policy: Policy) -> Policy {
        fn flag<T>(value: Option<T>, flag: &'static str) -> Option<Sourced<T>> {
            value.map(|value| Sourced { value, origin: Origin::Flag { flag } })
        }
        let vm = &mut policy.vm;
        vm.vcpus.lay(flag(self.vcpus.clone(), "--vcpus"));
        vm.iothreads.lay(flag(self.iothreads.clone(), "--iothreads"));
        vm.emulator.lay(flag(self.emulator.clone(), "--emulator"));
        vm.share.lay(flag(self.share.then_some(Sharing::Wrap), "--share"));
        vm.overflow.lay(flag(self.overflow, "--overflow"));
        vm.channel.lay(flag(self.channel, "--channel"));
        vm.isolation.lay(flag(self.isolation, "--isolation"));
        policy
    }

    /// The merged policy of files and flags.
    ///
    /// # Errors
    /// A failure of usage with file, line and reason.
    pub(in crate::cli) fn policy(
        &self,
        global: &Global,
        root: &SysRoot,
        vm: &VmArgs,
    ) -> Result<Policy, Failure> {
        let files = global.policy_dirs(root, vm.ask.place()).load(Some(&vm.vm))?;
        Ok(vm.bounded(self.over(files), root))
    }

    /// As [`policy`](PolicyArgs::policy), but of files that were good the last time where those of now are not.
    ///
    /// # Errors
    /// As there, where nothing is remembered.
    pub(in crate::cli) fn policy_or_last_good(
        &self,
        global: &Global,
        root: &SysRoot,
        vm: &VmArgs,
    ) -> Result<Policy, Failure> {
        let files = global.policy_dirs(root, vm.ask.place()).load_or_last_good(&vm.vm)?;
        Ok(vm.bounded(self.over(files), root))
    }
}

/// The policy of the host's file alone.
///
/// # Errors
/// A failure of usage with file, line and reason.
pub(in crate::cli) fn host_policy(global: &Global, root: &SysRoot) -> Result<Policy, Failure> {
    Ok(global.policy_dirs(root, Place::Elsewhere).load(None)?)
}
