//! The plan of all VMs: the document `qmpin.plan-all/1`, and for people a row for each VM and what is left.

use serde::Serialize;

use super::plan::PlanDocument;
use super::table::table;
use crate::cpuset::CpuSet;
use crate::ids::{LlcId, NodeId, VmName};
use crate::plan::{AllPlanned, Left};
use crate::shown;
use crate::wording::{counted, cpus_in_words};

/// What is said of one VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmPlace {
    /// It has its CPUs.
    Attached,
    /// It would have them.
    Planned,
    /// It does not fit.
    Infeasible,
    /// What it needs is not known.
    Unknown,
}

impl VmPlace {
    fn in_words(self) -> &'static str {
        match self {
            VmPlace::Attached => "attached",
            VmPlace::Planned => "planned",
            VmPlace::Infeasible => "does not fit",
            VmPlace::Unknown => "not known",
        }
    }
}

/// One VM of the host.
#[derive(Debug, Serialize)]
pub struct VmOfAll {
    /// Its name.
    pub vm: VmName,
    /// What is said of it.
    pub state: VmPlace,
    /// How many vCPUs it has or would have; null where that is not known.
    pub vcpu_count: Option<usize>,
    /// The CPUs that are or would be its alone.
    pub exclusive: CpuSet,
    /// Why it has none; null where it has some.
    pub reason: Option<String>,
    /// The plan; null of a VM that is attached, or has none.
    pub plan: Option<PlanDocument>,
}

/// `plan --all --json`.
#[derive(Debug, Serialize)]
pub struct PlanAllDocument {
    schema: &'static str,
    vms: Vec<VmOfAll>,
    left: Vec<LeftRow>,
    largest_vm_vcpus: usize,
}

#[derive(Debug, Serialize)]
struct LeftRow {
    llc: Option<LlcId>,
    node: Option<NodeId>,
    cpus: CpuSet,
    free: CpuSet,
    free_cores: usize,
    largest_vm_vcpus: usize,
}

impl PlanAllDocument {
    /// Of all VMs, in the order in which they are shown, and what is left.
    #[must_use]
    pub fn new(vms: Vec<VmOfAll>, all: &AllPlanned) -> PlanAllDocument {
        let row = |left: &Left| LeftRow {
            llc: left.llc,
            node: left.node,
            cpus: left.cpus,
            free: left.free,
            free_cores: left.free_cores,
            largest_vm_vcpus: left.free.len(),
        };
        PlanAllDocument {
            schema: "qmpin.plan-all/1",
            vms,
            left: all.left.iter().map(row).collect(),
            largest_vm_vcpus: all.largest_vm_vcpus,
        }
    }

    /// The VMs.
    #[must_use]
    pub fn vms(&self) -> &[VmOfAll] {
        &self.vms
    }

    /// A row for each VM, why some have no CPUs, and what is left.
    #[must_use]
    pub fn to_text(&self) -> String {
        if self.vms.is_empty() {
            return "no VM of this host has a policy, is enabled or attached\n".to_owned();
        }
        let head = ["VM", "STATE", "VCPUS", "CPUS"].map(str::to_owned);
        let mut rows = vec![head];
        rows.extend(self.vms.iter().map(|one| {
            let vcpus = one.vcpu_count.map_or("-".to_owned(), |count| count.to_string());
            let cpus = or_dash(&one.exclusive);
            [one.vm.to_string(), one.state.in_words().to_owned(), vcpus, cpus]
        }));
        let mut text = table(&rows);
        for one in &self.vms {
            if let Some(reason) = &one.reason {
                text.push_str(&format!("VM {}: {}\n", one.vm, shown::line(reason)));
            }
        }
        text.push('\n');
        let head = ["LEFT OF", "CORES", "CPUS", "LARGEST VM"].map(str::to_owned);
        let mut rows = vec![head];
        rows.extend(self.left.iter().map(|left| {
            let cpus = or_dash(&left.free);
            let largest = counted(left.largest_vm_vcpus, "vCPU");
            [cpus_in_words(&left.cpus), left.free_cores.to_string(), cpus, largest]
        }));
        text + &table(&rows)
    }
}

fn or_dash(cpus: &CpuSet) -> String {
    if cpus.is_empty() { "-".to_owned() } else { cpus.to_string() }
}
