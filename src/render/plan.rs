//! The plan: the document `qmpin.plan/1`, and for people `from → to` with the reasons.

use std::collections::BTreeMap;

use serde::Serialize;

use super::table::table;
use crate::cpuset::CpuSet;
use crate::ids::{IothreadId, VcpuIndex, VmName};
use crate::knobs::affinity::diff::MaskStep;
use crate::knobs::host::places::{Place, VfioIrq, knob_in_words};
use crate::knobs::host::step::HostStep;
use crate::plan::{Finding, Nearest, PlacedMemory, Plan, Verdict};
use crate::policy::Knob;
use crate::promises::Displaced;
use crate::threads::Role;
use crate::wording::counted;

/// `plan --json`. The contract is in ARCHITECTURE.md.
#[derive(Debug, Serialize)]
pub struct PlanDocument {
    schema: &'static str,
    vm: VmName,
    /// The configuration that it was planned from, where the VM does not run.
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<String>,
    vcpus: Vec<VcpuRow>,
    iothreads: Vec<IothreadRow>,
    emulator: CpuSet,
    exclusive: CpuSet,
    housekeeping: CpuSet,
    displaced: Vec<Displaced>,
    memory: Option<PlacedMemory>,
    report: Vec<Finding>,
}

#[derive(Debug, Serialize)]
struct VcpuRow {
    vcpu: VcpuIndex,
    cpus: CpuSet,
}

#[derive(Debug, Serialize)]
struct IothreadRow {
    iothread: IothreadId,
    cpus: CpuSet,
}

impl PlanDocument {
    /// A plan that would be applied.
    #[must_use]
    pub fn of(plan: &Plan) -> PlanDocument {
        let vcpus =
            plan.vcpus.iter().map(|planned| VcpuRow { vcpu: planned.vcpu, cpus: planned.cpus });
        let iothreads = plan
            .iothreads
            .iter()
            .map(|one| IothreadRow { iothread: one.iothread.clone(), cpus: one.cpus });
        PlanDocument {
            schema: "qmpin.plan/1",
            vm: plan.vm.clone(),
            from: None,
            vcpus: vcpus.collect(),
            iothreads: iothreads.collect(),
            emulator: plan.emulator,
            exclusive: plan.exclusive,
            housekeeping: plan.housekeeping,
            displaced: plan.displaced.clone(),
            memory: plan.memory.clone(),
            report: plan.report.clone(),
        }
    }

    /// That of a VM that does not run.
    #[must_use]
    pub fn declared(plan: &Plan, from: &str) -> PlanDocument {
        PlanDocument { from: Some(from.to_owned()), ..PlanDocument::of(plan) }
    }

    /// No plan: nothing would be moved, and the report says why and what would do.
    #[must_use]
    pub fn infeasible(vm: &VmName, reason: &str, nearest: Option<&Nearest>) -> PlanDocument {
        let mut report = vec![Finding::impossible("capacity", reason)];
        report.extend(nearest.map(|nearest| {
            let pins: Vec<String> = nearest
                .plan
                .vcpus
                .iter()
                .map(|planned| format!("vCPU {} on {}", planned.vcpu, planned.cpus))
                .collect();
            Finding::degraded("nearest", format!("with {}: {}", nearest.takes, pins.join(", ")))
        }));
        PlanDocument {
            schema: "qmpin.plan/1",
            vm: vm.clone(),
            from: None,
            vcpus: Vec::new(),
            iothreads: Vec::new(),
            emulator: CpuSet::EMPTY,
            exclusive: CpuSet::EMPTY,
            housekeeping: CpuSet::EMPTY,
            displaced: Vec::new(),
            memory: None,
            report,
        }
    }
}

/// Whether each choice is explained.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Explain {
    /// Rules that are not wholly kept, only.
    Shortfalls,
    /// Every choice and every rule.
    All,
}

/// What would be changed about the rest of the host: a line for each knob, with an example.
#[must_use]
pub fn host_text(steps: &[HostStep], vfio: &BTreeMap<Place, VfioIrq>) -> String {
    let mut knobs: BTreeMap<(Knob, String), (usize, String)> = BTreeMap::new();
    for step in steps {
        if let HostStep::Write { knob, place, from, to } = step {
            let first = || (0, format!("{place}: {from} → {to}"));
            let what = knob_in_words(*knob, place, vfio);
            knobs.entry((*knob, what)).or_insert_with(first).0 += 1;
        }
    }
    if knobs.is_empty() {
        return String::new();
    }
    let row = |((_, what), (number, first)): ((Knob, String), (usize, String))| {
        let number = counted(number, "place");
        [format!("~ {what}"), number, first]
    };
    let rows: Vec<[String; 3]> = knobs.into_iter().map(row).collect();
    format!("\n{}", table(&rows))
}

/// The plan for a terminal: a line per thread, `~` where it would move.
#[must_use]
pub fn plan_text(plan: &Plan, threads: usize, steps: &[MaskStep], explain: Explain) -> String {
    let mut text = format!(
        "VM {}: {} of {threads} threads to move\n  exclusive     {}\n  housekeeping  {}\n",
        plan.vm,
        steps.len(),
        plan.exclusive,
        plan.housekeeping
    );
    if !steps.is_empty() {
        let rows: Vec<[String; 5]> = steps
            .iter()
            .map(|step| {
                let why = match (&step.role, explain) {
                    (_, Explain::Shortfalls) => String::new(),
                    (Role::Vcpu(index), Explain::All) => why(plan, *index),
                    (Role::Iothread(_), Explain::All) => "iothreads: see below".to_owned(),
                    (_, Explain::All) => "emulator: see below".to_owned(),
                };
                [
                    format!("~ {}", who(&step.role)),
                    format!("tid {}", step.thread.tid),
                    step.comm.clone(),
                    format!("{} → {}", step.from, step.to),
                    why,
                ]
            })
            .collect();
        text.push('\n');
        text.push_str(&table(&rows));
    }
    if explain == Explain::All {
        let is_told = |index: VcpuIndex| {
            steps.iter().any(|step| matches!(step.role, Role::Vcpu(moved) if moved == index))
        };
        let rows = plan.vcpus.iter().filter(|planned| !is_told(planned.vcpu)).map(|planned| {
            let who = format!("= {}", who(&Role::Vcpu(planned.vcpu)));
            [who, format!("on {}", planned.cpus), why(plan, planned.vcpu)]
        });
        let rows: Vec<[String; 3]> = rows.collect();
        if !rows.is_empty() {
            text.push('\n');
            text.push_str(&table(&rows));
        }
    }
    text.push_str(&findings_text(plan, explain));
    text
}

/// The plan of a VM that does not run, for a terminal: where each of its threads would be.
#[must_use]
pub fn declared_text(plan: &Plan, from: &str, explain: Explain) -> String {
    let mut text = format!("VM {} does not run; planned from {from}\n", plan.vm);
    let sets = [
        ("exclusive", plan.exclusive),
        ("housekeeping", plan.housekeeping),
        ("emulator", plan.emulator),
        ("iothreads", plan.iothread_cpus),
    ];
    for (name, cpus) in sets {
        if name != "iothreads" || !plan.iothreads.is_empty() {
            text.push_str(&format!("  {name:<12}  {cpus}\n"));
        }
    }
    let rows = plan.vcpus.iter().map(|planned| {
        let reason = match explain {
            Explain::Shortfalls => String::new(),
            Explain::All => why(plan, planned.vcpu),
        };
        [who(&Role::Vcpu(planned.vcpu)), format!("on {}", planned.cpus), reason]
    });
    let rows: Vec<[String; 3]> = rows.collect();
    text.push('\n');
    text.push_str(&table(&rows));
    text.push_str(&findings_text(plan, explain));
    text
}

/// The findings, a row each, after an empty line; nothing where there are none.
fn findings_text(plan: &Plan, explain: Explain) -> String {
    let shown = plan
        .report
        .iter()
        .filter(|finding| explain == Explain::All || finding.verdict != Verdict::Met);
    let rows: Vec<[String; 3]> = shown
        .map(|finding| {
            let verdict = match finding.verdict {
                Verdict::Met => "met",
                Verdict::Degraded => "degraded",
                Verdict::Impossible => "impossible",
            };
            [verdict.to_owned(), finding.rule.to_string(), finding.reason.clone()]
        })
        .collect();
    if rows.is_empty() { String::new() } else { format!("\n{}", table(&rows)) }
}

fn who(role: &Role) -> String {
    match role {
        Role::Vcpu(index) => format!("vcpu {index}"),
        Role::Iothread(id) => format!("iothread {id}"),
        other => other.name().to_owned(),
    }
}

fn why(plan: &Plan, index: VcpuIndex) -> String {
    let planned = plan.vcpus.iter().find(|planned| planned.vcpu == index);
    planned.map_or(String::new(), |planned| format!("{}: {}", planned.why.rule(), planned.why))
}
