//! Which VMs are attached: the document `qmpin.status/1`, and a table.

use serde::Serialize;

use super::table::table;
use crate::check::verify::{Check, CheckVerdict};
use crate::cpuset::CpuSet;
use crate::discover::Doubt;
use crate::discover::cgroup::PartitionFile;
use crate::ids::{CpuId, Pid, VcpuIndex, VmName};
use crate::leases::Lease;
use crate::marks::{Detached, Waiting};
use crate::plan::Finding;
use crate::policy::{Knob, VcpuSched};
use crate::qmp::ChannelKind;
use crate::shown;
use crate::standing::Standing;

/// Whether a supervisor follows a VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// A supervisor does.
    Followed,
    /// It was attached, and its supervisor is gone or was never to stay.
    Left,
    /// Its QEMU is gone; the next qmpin sweeps what is left.
    Dead,
}

/// What is known of one VM.
#[derive(Clone, Debug)]
pub struct VmStatus {
    /// Whether a supervisor follows it.
    pub state: VmState,
    /// What it has.
    pub lease: Lease,
    /// What its supervisor reports.
    pub standing: Option<Standing>,
    /// The group of its vCPUs, where it has a partition.
    pub partition: Option<PartitionFile>,
    /// What of the host holds for it.
    pub checks: Vec<Check>,
}

/// `status --json`.
#[derive(Debug, Serialize)]
pub struct StatusDocument {
    schema: &'static str,
    vms: Vec<VmRow>,
    /// VMs that were detached by hand and stay so.
    detached: Vec<DetachedRow>,
    /// VMs whose service waits until they can be attached.
    waiting: Vec<WaitingRow>,
    /// VMs whose leases cannot be read.
    unreadable: Vec<UnreadableRow>,
}

#[derive(Debug, Serialize)]
struct UnreadableRow {
    vm: VmName,
    path: String,
    reason: String,
    /// The CPUs that may be the VM's.
    cpus: CpuSet,
    #[serde(skip)]
    sentence: String,
}

#[derive(Debug, Serialize)]
struct DetachedRow {
    vm: VmName,
    pid: Pid,
    since_unix_s: u64,
}

#[derive(Debug, Serialize)]
struct WaitingRow {
    vm: VmName,
    pid: Pid,
    supervisor_pid: Pid,
    since_unix_s: u64,
    reason: String,
}

#[derive(Debug, Serialize)]
struct VmRow {
    vm: VmName,
    state: VmState,
    pid: Pid,
    supervisor_pid: Option<Pid>,
    since_unix_s: u64,
    exclusive: CpuSet,
    emulator: CpuSet,
    iothreads: CpuSet,
    vcpus: Vec<VcpuRow>,
    #[serde(skip_serializing_if = "CpuSet::is_empty")]
    floats: CpuSet,
    knobs: Vec<Knob>,
    sched: VcpuSched,
    partition: Option<PartitionRow>,
    slices: Option<String>,
    channel: Option<ChannelKind>,
    drift_total: Option<u64>,
    refused: Vec<String>,
    /// What of the plan in force falls short, as `qmpin plan` prints it.
    findings: Vec<Finding>,
    /// Checks of the host that do not hold, as `qmpin verify` makes them.
    unmet: Vec<Check>,
}

/// What the kernel says of it.
#[derive(Debug, Serialize)]
struct PartitionRow {
    group: String,
    state: String,
    cpus: CpuSet,
}

#[derive(Debug, Serialize)]
struct VcpuRow {
    vcpu: VcpuIndex,
    cpus: CpuSet,
}

impl VmRow {
    /// What excludes others from its CPUs, as it is.
    fn separation(&self) -> String {
        match (&self.partition, &self.slices) {
            (Some(partition), _) => partition.state.clone(),
            (None, Some(_)) => "AllowedCPUs".to_owned(),
            (None, None) => "none".to_owned(),
        }
    }
}

impl StatusDocument {
    /// In the order in which they are given.
    #[must_use]
    pub fn new(vms: impl Iterator<Item = VmStatus>) -> StatusDocument {
        let row = |VmStatus { state, lease, standing, partition, checks }| {
            let vcpu =
                |(vcpu, cpu): (VcpuIndex, CpuId)| VcpuRow { vcpu, cpus: CpuSet::single(cpu) };
            VmRow {
                vm: lease.vm,
                state,
                pid: lease.qemu.pid,
                supervisor_pid: lease.supervisor.map(|supervisor| supervisor.pid),
                since_unix_s: lease.since_unix_s,
                exclusive: lease.exclusive,
                emulator: lease.emulator,
                iothreads: lease.iothreads,
                vcpus: lease.vcpus.into_iter().map(vcpu).collect(),
                floats: lease.floats,
                knobs: lease.knobs.into_iter().collect(),
                sched: lease.sched,
                partition: partition.map(|file| PartitionRow {
                    group: file.group,
                    state: file.state,
                    cpus: file.cpus,
                }),
                slices: lease.slices,
                channel: standing.as_ref().and_then(|standing| standing.channel),
                drift_total: standing.as_ref().and_then(|standing| standing.drift_total),
                findings: standing
                    .as_ref()
                    .map(|standing| standing.findings.clone())
                    .unwrap_or_default(),
                refused: standing.map(|standing| standing.refused).unwrap_or_default(),
                unmet: checks
                    .into_iter()
                    .filter(|check| check.verdict != CheckVerdict::Holds)
                    .collect(),
            }
        };
        StatusDocument {
            schema: "qmpin.status/1",
            vms: vms.map(row).collect(),
            detached: Vec::new(),
            waiting: Vec::new(),
            unreadable: Vec::new(),
        }
    }

    /// The same with the VMs whose leases cannot be read.
    #[must_use]
    pub fn with_doubts(self, doubts: Vec<Doubt>) -> StatusDocument {
        let row = |doubt: Doubt| UnreadableRow {
            sentence: doubt.to_string(),
            vm: doubt.vm,
            path: doubt.path.display().to_string(),
            reason: doubt.reason,
            cpus: doubt.cpus,
        };
        StatusDocument { unreadable: doubts.into_iter().map(row).collect(), ..self }
    }

    /// The same with the VMs that are marked as detached by hand, or as waiting.
    #[must_use]
    pub fn with_marks(self, detached: Vec<Detached>, waiting: Vec<Waiting>) -> StatusDocument {
        let detached = detached.into_iter().map(|mark| DetachedRow {
            vm: mark.vm,
            pid: mark.qemu.pid,
            since_unix_s: mark.since_unix_s,
        });
        let waiting = waiting.into_iter().map(|mark| WaitingRow {
            vm: mark.vm,
            pid: mark.qemu.pid,
            supervisor_pid: mark.supervisor.pid,
            since_unix_s: mark.since_unix_s,
            reason: mark.reason,
        });
        let (detached, waiting) = (detached.collect(), waiting.collect());
        StatusDocument { detached, waiting, ..self }
    }

    /// A line for each VM that is not attached and is marked.
    fn marks_text(&self) -> String {
        let mut text = String::new();
        for DetachedRow { vm, .. } in &self.detached {
            text.push_str(&format!(
                "VM {vm}: detached by hand; `qmpin attach {vm}` or `systemctl start qmpin@{vm}` attaches it again\n"
            ));
        }
        for WaitingRow { vm, reason, .. } in &self.waiting {
            text.push_str(&format!("VM {vm}: its service waits: {}\n", shown::line(reason)));
        }
        for UnreadableRow { sentence, .. } in &self.unreadable {
            text.push_str(&format!("{}\n", shown::line(sentence)));
        }
        text
    }

    /// The table for a terminal, and a line for each thing that was refused.
    #[must_use]
    pub fn to_text(&self) -> String {
        if self.vms.is_empty() {
            return "no VM is attached\n".to_owned() + &self.marks_text();
        }
        let head = [
            "VM",
            "STATE",
            "VCPUS",
            "IOTHREADS",
            "EMULATOR",
            "PARTITION",
            "KNOBS",
            "CHANNEL",
            "DRIFT",
            "REFUSED",
        ];
        let mut rows = vec![head.map(str::to_owned)];
        rows.extend(self.vms.iter().map(|vm| {
            let state = match vm.state {
                VmState::Followed => "followed",
                VmState::Left => "left",
                VmState::Dead => "dead",
            };
            let mut knobs: Vec<String> = vm.knobs.iter().map(|knob| knob.to_string()).collect();
            if vm.sched != VcpuSched::Other {
                knobs.push(vm.sched.to_string());
            }
            [
                vm.vm.to_string(),
                state.to_owned(),
                vm.exclusive.to_string(),
                vm.iothreads.to_string(),
                vm.emulator.to_string(),
                vm.separation(),
                knobs.join(" "),
                vm.channel.map_or(String::new(), |channel| channel.to_string()),
                vm.drift_total.map_or(String::new(), |drift| drift.to_string()),
                (vm.refused.len() + vm.unmet.len()).to_string(),
            ]
        }));
        let mut text = table(&rows);
        for vm in &self.vms {
            // The policy's own is among what was refused.
            for finding in vm.findings.iter().filter(|finding| finding.rule != "policy") {
                text.push_str(&format!("VM {}: {}\n", vm.vm, shown::line(&finding.to_string())));
            }
            for refused in &vm.refused {
                text.push_str(&format!("VM {}: {}\n", vm.vm, shown::line(refused)));
            }
            for Check { check, verdict, reason } in &vm.unmet {
                let broken = if *verdict == CheckVerdict::Broken { "BROKEN: " } else { "" };
                text.push_str(&format!("VM {}: {check}: {broken}{reason}\n", vm.vm));
            }
        }
        text + &self.marks_text()
    }
}
