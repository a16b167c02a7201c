//! What must hold for every plan: any machine of `hosts::any_host`, any guest, any policy, any other
//! VMs. The feasibility that the planner is checked against is counted here a second time, naively.

#![allow(clippy::expect_used, clippy::panic)] // that is how a test says no

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::sample::Index;

use qmpin::cpuset::CpuSet;
use qmpin::guest::{Allowed, Guest};
use qmpin::ids::{CpuId, Pid, StartTicks, Tid, VcpuIndex, VmName};
use qmpin::knobs::affinity::diff::{desired, diff};
use qmpin::plan::{
    Machine, Neighbour, Neighbours, Plan, PlanError, PlannedVcpu, Request, Stay, Verdict, plan,
};
use qmpin::policy::{
    CpuChoice, Displace, IothreadChoice, Origin, Overflow, Policy, Sharing, Smt, Sourced, Spread,
};
use qmpin::promises::{Promise, Promises, Strength, Surroundings};
use qmpin::threads::{Role, Thread, ThreadKey};
use qmpin::topology::{Core, Topology};

use crate::support::fake_host::{FakeHost, Numbering};
use crate::support::{guests, hosts};

fn vm(number: usize) -> VmName {
    (100 + number).to_string().parse().expect("a VM's name")
}

fn sourced<T>(value: T) -> Sourced<T> {
    Sourced { value, origin: Origin::Flag { flag: "--test" } }
}

/// A question with all that a [`Request`] borrows.
#[derive(Clone)]
struct Question {
    topology: Topology,
    guest: Guest,
    policy: Policy,
    neighbours: Neighbours,
    surroundings: Surroundings,
    held: BTreeMap<VcpuIndex, CpuId>,
}

/// A machine in a line, for a failure that people can read.
impl std::fmt::Debug for Question {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for core in &self.topology.cores {
            let [llc, node] = [core.llc.map(|llc| llc.0), core.node.map(|node| node.0)];
            write!(f, "[{} llc {llc:?} node {node:?} {:?}] ", core.cpus, core.kind)?;
        }
        for vcpu in &self.guest.vcpus {
            write!(f, "v{}:{:?}/{:?} ", vcpu.index, vcpu.node, vcpu.core)?;
        }
        let (host, vm) = (&self.policy.host, &self.policy.vm);
        write!(f, "reserved {:?} shared {:?} ", host.reserved.value, host.shared.value)?;
        write!(f, "vcpus {:?} {:?} ", vm.vcpus.value, vm.share.value)?;
        write!(f, "emulator {:?} iothreads {:?} ", vm.emulator.value, vm.iothreads.value)?;
        write!(f, " smt {:?} by hand {:?} ", vm.smt.value, vm.vcpu_cpus)?;
        write!(f, "{:?} {:?} held {:?}", self.neighbours, self.surroundings, self.held)
    }
}

impl Question {
    fn ask_for(&self, vm: &VmName) -> Result<Plan, PlanError> {
        plan(&Request {
            vm,
            machine: &Machine::of(&self.topology),
            guest: &self.guest,
            policy: &self.policy,
            neighbours: &self.neighbours,
            surroundings: &self.surroundings,
            held: &self.held,
            stay: Stay::Always,
        })
    }

    fn ask(&self) -> Result<Plan, PlanError> {
        self.ask_for(&vm(0))
    }

    fn whole(&self, cpus: &CpuSet) -> CpuSet {
        let cores = self.topology.cores.iter().filter(|core| core.cpus.intersects(cpus));
        cores.fold(*cpus, |all, core| all | core.cpus)
    }

    /// Cores that neither this VM nor the host can have.
    fn taken(&self) -> CpuSet {
        self.whole(&(self.others() | self.surroundings.promises.hard()))
    }

    /// The host's CPUs; where other VMs have them all, the first core that is left.
    fn reserved(&self) -> CpuSet {
        let reserved = self.policy.host.reserved.value.cpus();
        let reserved = reserved.unwrap_or(self.topology.cores[0].cpus);
        let taken = self.taken();
        if !reserved.is_subset(&taken) {
            return reserved;
        }
        let left = self.topology.cores.iter().find(|core| !core.cpus.intersects(&taken));
        reserved | left.map_or(CpuSet::EMPTY, |core| core.cpus)
    }

    fn allowed(&self) -> CpuSet {
        let online = self.topology.online();
        self.surroundings.allowed.as_ref().map_or(online, |allowed| allowed.cpus)
    }

    /// The core that stays with the helpers, where the VM is allowed none of the host's.
    fn kept(&self) -> CpuSet {
        let shared = self.policy.host.shared.value.unwrap_or_default();
        let left = self.allowed() - self.taken();
        let is_by_hand = self.policy.vm.vcpus.value != CpuChoice::Auto;
        if self.surroundings.allowed.is_none()
            || is_by_hand
            || left.intersects(&(self.reserved() | shared))
        {
            return CpuSet::EMPTY;
        }
        // Another one than a vCPU has by hand, where there is one.
        let tables = self.policy.vm.vcpu_cpus.values().map(|table| table.value).collect();
        let rest = left - self.whole(&tables);
        let left = if rest.is_empty() { left } else { rest };
        let core = self.topology.cores.iter().find(|core| core.cpus.intersects(&left));
        core.map_or(CpuSet::EMPTY, |core| core.cpus)
    }

    fn others(&self) -> CpuSet {
        self.neighbours.exclusive()
    }

    /// The CPUs that this VM's vCPUs may have, CPU by CPU.
    fn free(&self) -> CpuSet {
        let shared = self.policy.host.shared.value.unwrap_or_default();
        let hard = self.surroundings.promises.hard();
        let blocked = self.whole(&(self.reserved() | shared | self.others() | hard));
        let free = self.allowed() - blocked - self.kept();
        self.policy.vm.vcpus.value.cpus().map_or(free, |only| free & only)
    }
}

impl Question {
    /// The same without CPUs that are given by hand.
    fn by_rule(mut self) -> Question {
        let vm = &mut self.policy.vm;
        for choice in [&mut vm.vcpus, &mut vm.emulator] {
            *choice = sourced(CpuChoice::Auto);
        }
        vm.iothreads = sourced(IothreadChoice::AUTO);
        vm.vcpu_cpus.clear();
        vm.smt = sourced(Smt::Prefer);
        self
    }

    /// The cores that others count on and can be displaced from.
    fn soft(&self) -> CpuSet {
        let soft = self.surroundings.promises.soft();
        self.whole(&soft.fold(CpuSet::EMPTY, |all, promise| all | promise.cpus))
    }
}

fn pick(topology: &Topology, at: &[Index]) -> CpuSet {
    let online: Vec<CpuId> = topology.online().iter().collect();
    at.iter().map(|at| online[at.index(online.len())]).collect()
}

fn choice(topology: &Topology, at: Option<&Vec<Index>>) -> CpuChoice {
    match at.map(|at| pick(topology, at)) {
        Some(cpus) if !cpus.is_empty() => CpuChoice::Cpus(cpus),
        _ => CpuChoice::Auto,
    }
}

/// The same as they are written: most often in an order of their own.
fn written(topology: &Topology, at: Option<&Vec<Index>>) -> CpuChoice {
    let online: Vec<CpuId> = topology.online().iter().collect();
    let (mut seen, mut words) = (CpuSet::EMPTY, Vec::new());
    for cpu in at.into_iter().flatten().map(|at| online[at.index(online.len())]) {
        if !seen.contains(cpu) {
            seen.insert(cpu);
            words.push(cpu.to_string());
        }
    }
    let words = if words.is_empty() { "auto".to_owned() } else { words.join(",") };
    CpuChoice::parse_vcpus(&words).expect("each once")
}

fn some_cpus(most: usize) -> impl Strategy<Value = Option<Vec<Index>>> {
    prop::option::weighted(0.3, prop::collection::vec(any::<Index>(), 1..=most))
}

fn some_promises() -> impl Strategy<Value = Vec<(Vec<Index>, Strength)>> {
    let strength = prop_oneof![3 => Just(Strength::Soft), 1 => Just(Strength::Hard)];
    let one = (prop::collection::vec(any::<Index>(), 1..6), strength);
    prop_oneof![2 => Just(Vec::new()), 1 => prop::collection::vec(one, 1..4)]
}

fn any_guest() -> impl Strategy<Value = Guest> {
    let gone = prop::collection::vec(0..40u32, 0..4);
    let threads = prop_oneof![3 => Just(1u32), 4 => Just(2), 1 => Just(3), 1 => Just(4)];
    (1..=40u32, threads, 0..=3u32, gone).prop_map(|(vcpus, threads, nodes, gone)| {
        // At least one vCPU stays.
        let gone: Vec<u32> = gone.into_iter().filter(|index| *index != 0).collect();
        guests::guest(vcpus, threads, nodes, &gone)
    })
}

/// How threads of cores are used, a CPU for one vCPU, and what iothreads there are and how they are spread.
type Ways = (Smt, Option<(u32, Index)>, u32, Spread);

fn ways() -> impl Strategy<Value = Ways> {
    let smt =
        prop_oneof![4 => Just(Smt::Prefer), 1 => Just(Smt::Siblings), 1 => Just(Smt::Isolate)];
    let table = prop::option::weighted(0.2, (0..6u32, any::<Index>()));
    let spread = prop_oneof![Just(Spread::Pool), Just(Spread::Each)];
    (smt, table, 0..4u32, spread)
}

/// Any policy that names online CPUs. It may still contradict itself, and be refused.
fn any_question() -> impl Strategy<Value = Question> {
    let sets = (some_cpus(4), some_cpus(4), some_cpus(24), some_cpus(6), some_cpus(6));
    let others = prop::collection::vec(prop::collection::vec(any::<Index>(), 1..6), 0..3);
    let host_says = (some_cpus(24), some_promises(), some_cpus(12));
    let flags = any::<(bool, bool, bool, bool)>();
    (hosts::any_host(), any_guest(), sets, others, host_says, flags, ways()).prop_map(
        |(
            host,
            guest,
            (reserved, shared, vcpus, emulator, iothreads),
            others,
            host_says,
            flags,
            (smt, table, iothread_count, spread),
        )| {
            let ids: Vec<String> =
                (0..iothread_count).map(|number| format!("io{number}")).collect();
            let guest = guests::with_iothreads(guest, &ids);
            let (limit, promised, isolated) = host_says;
            let topology = host.topology();
            let mut policy = Policy::default();
            policy.host.reserved = sourced(choice(&topology, reserved.as_ref()));
            policy.host.shared = sourced(shared.map(|at| pick(&topology, &at)));
            let by_hand = if flags.2 { written } else { choice };
            policy.vm.vcpus = sourced(match by_hand(&topology, vcpus.as_ref()) {
                CpuChoice::Cpus(cpus) if flags.3 => CpuChoice::Float(cpus),
                choice => choice,
            });
            policy.vm.smt = sourced(smt);
            policy.vm.vcpu_cpus.extend(table.and_then(|(vcpu, at)| {
                Some((VcpuIndex(vcpu), sourced(pick(&topology, &[at]).first()?)))
            }));
            policy.vm.emulator = sourced(choice(&topology, emulator.as_ref()));
            let cpus = choice(&topology, iothreads.as_ref());
            policy.vm.iothreads = sourced(IothreadChoice { cpus, spread });
            policy.vm.share = sourced(if flags.0 { Sharing::Wrap } else { Sharing::Refuse });
            policy.vm.overflow = sourced(if flags.1 { Overflow::Shared } else { Overflow::Refuse });
            let neighbours = others.iter().enumerate().map(|(at, cpus)| {
                // A VM has no reserved CPU, unless that was changed after it had come.
                let exclusive = pick(&topology, cpus);
                Neighbour {
                    vm: vm(at + 1),
                    exclusive,
                    helpers: topology.online() - exclusive,
                    doubt: None,
                }
            });
            let neighbours = neighbours.collect();
            let allowed = limit.map(|at| {
                let cpus = pick(&topology, &at);
                Allowed { cpus, why: format!("100.scope allows only {cpus}") }
            });
            let made = promised.iter().map(|(cpus, strength)| Promise {
                what: format!("a.service ({strength:?})"),
                cpus: pick(&topology, cpus),
                tid: None,
                strength: *strength,
            });
            let isolated = isolated.map(|at| pick(&topology, &at)).unwrap_or_default();
            let promises = Promises { made: made.collect(), isolated };
            let memory_on = BTreeMap::new();
            let surroundings =
                Surroundings { allowed, promises, memory_on, ..Surroundings::default() };
            Question { topology, guest, policy, neighbours, surroundings, held: BTreeMap::new() }
        },
    )
}

/// A question without policy: the planner's own choice on an empty host.
fn plain_question() -> impl Strategy<Value = Question> {
    (hosts::any_host(), any_guest()).prop_map(|(host, guest)| Question {
        topology: host.topology(),
        guest,
        policy: Policy::default(),
        neighbours: Neighbours::default(),
        surroundings: Surroundings::default(),
        held: BTreeMap::new(),
    })
}

fn met(plan: &Plan, rule: &str) -> bool {
    plan.report.iter().any(|finding| finding.rule == rule && finding.verdict == Verdict::Met)
}

fn falls_short(plan: &Plan, rule: &str) -> bool {
    plan.report.iter().any(|finding| finding.rule == rule && finding.falls_short())
}

/// The CPUs of vCPUs that have one of their own, or float.
fn pinned(plan: &Plan) -> CpuSet {
    plan.floats() | plan.held().values().copied().collect()
}

/// What is said of the ways that were asked for.
fn check_ways(question: &Question, plan: &Plan) -> Result<(), TestCaseError> {
    let vm = &question.policy.vm;
    for planned in &plan.vcpus {
        let refused = !question.held.is_empty() && falls_short(plan, "by-hand");
        if let Some(table) = vm.vcpu_cpus.get(&planned.vcpu).filter(|_| !refused) {
            prop_assert_eq!(planned.cpus, CpuSet::single(table.value), "{:?}", plan);
        }
    }
    let on = |core: &Core| plan.held().values().filter(|cpu| core.cpus.contains(**cpu)).count();
    if met(plan, "smt") && vm.smt.value == Smt::Isolate {
        prop_assert!(question.topology.cores.iter().all(|core| on(core) <= 1), "{:?}", plan);
    }
    let by_rule = vm.vcpus.value == CpuChoice::Auto && vm.vcpu_cpus.is_empty();
    let has_all = plan.held().len() == question.guest.vcpus.len();
    if by_rule && vm.smt.value == Smt::Isolate && vm.share.value == Sharing::Refuse && has_all {
        prop_assert!(met(plan, "smt"), "{:?}", plan);
    }
    let dealt = plan.iothreads.iter().fold(CpuSet::EMPTY, |all, one| all | one.cpus);
    prop_assert!(dealt.is_subset(&plan.iothread_cpus));
    if vm.iothreads.value.spread == Spread::Each {
        prop_assert!(plan.iothreads.iter().all(|one| one.cpus.len() == 1), "{:?}", plan);
    }
    Ok(())
}

/// What holds for a plan whatever was asked.
fn check(question: &Question, plan: &Plan) -> Result<(), TestCaseError> {
    let used = pinned(plan);
    let shared = question.policy.host.shared.value.unwrap_or_default();
    prop_assert!(!used.intersects(&plan.housekeeping), "vCPUs on housekeeping: {plan:?}");
    prop_assert!(!plan.exclusive.intersects(&plan.housekeeping));
    prop_assert!(!plan.housekeeping.is_empty());
    prop_assert!(!plan.emulator.is_empty() && !plan.iothread_cpus.is_empty());
    prop_assert!(used.is_subset(&plan.exclusive));
    let tables = question.policy.vm.vcpu_cpus.values().map(|table| table.value).collect();
    let free = question.free() | tables;
    prop_assert!(used.is_subset(&free), "{used} of {free}");
    check_ways(question, plan)?;
    prop_assert!(plan.exclusive.is_subset(&question.topology.online()));
    if let Some(Allowed { cpus, .. }) = &question.surroundings.allowed {
        let all = plan.exclusive | plan.emulator | plan.iothread_cpus;
        let all = plan.vcpus.iter().fold(all, |all, vcpu| all | vcpu.cpus);
        prop_assert!(all.is_subset(cpus), "{all} of {cpus}");
    }
    let host = question.reserved() - question.taken();
    for never in [host, shared, question.others()] {
        prop_assert!(!question.whole(&plan.exclusive).intersects(&never), "{plan:?}");
    }
    let vm = &question.policy.vm;
    for (helpers, choice, spread) in [
        (plan.emulator, &vm.emulator.value, Spread::Pool),
        (plan.iothread_cpus, &vm.iothreads.value.cpus, vm.iothreads.value.spread),
    ] {
        match choice.cpus() {
            None => prop_assert!(helpers.is_subset(&plan.housekeeping)),
            Some(cpus) if spread == Spread::Pool => prop_assert_eq!(helpers, cpus),
            Some(cpus) => prop_assert!(helpers.is_subset(&cpus)),
        }
        prop_assert!(!helpers.intersects(&question.whole(&question.others())));
    }
    let hard = question.surroundings.promises.hard();
    let all = plan.exclusive | plan.emulator | plan.iothread_cpus;
    prop_assert!(!all.intersects(&hard), "{hard} is another program's: {plan:?}");
    let named = plan.displaced.iter().fold(CpuSet::EMPTY, |all, displaced| all | displaced.cpus);
    let soft = question.surroundings.promises.soft();
    let soft = soft.fold(CpuSet::EMPTY, |all, promise| all | promise.cpus);
    prop_assert_eq!(named, soft & plan.exclusive, "who is displaced is named");
    prop_assert_eq!(falls_short(plan, "promises"), !named.is_empty());
    let placed: BTreeSet<VcpuIndex> = plan.vcpus.iter().map(|vcpu| vcpu.vcpu).collect();
    let left: BTreeSet<VcpuIndex> = plan.left_alone.iter().copied().collect();
    let all: BTreeSet<VcpuIndex> = question.guest.vcpus.iter().map(|vcpu| vcpu.index).collect();
    prop_assert!(placed.is_disjoint(&left));
    prop_assert_eq!(&placed | &left, all, "every vCPU is somewhere, and no other");
    prop_assert_eq!(placed.len(), plan.vcpus.len());
    let held = plan.held();
    if question.policy.vm.share.value == Sharing::Refuse && plan.floats().is_empty() {
        prop_assert_eq!(used.len(), held.len(), "a CPU each");
    }
    if let CpuChoice::InOrder(order) = &question.policy.vm.vcpus.value {
        for planned in &plan.vcpus {
            let named = order.as_slice().get(planned.vcpu.0 as usize);
            let named = named.filter(|cpu| question.free().contains(**cpu));
            // Unless a vCPU beyond the list had that CPU before and keeps it: this one was plugged later.
            let keeps = |other: &PlannedVcpu, cpu: CpuId| {
                other.vcpu.0 as usize >= order.as_slice().len()
                    && other.cpus == CpuSet::single(cpu)
                    && question.held.get(&other.vcpu) == Some(&cpu)
            };
            let is_new = !question.held.contains_key(&planned.vcpu);
            let named =
                named.filter(|cpu| !(is_new && plan.vcpus.iter().any(|other| keeps(other, **cpu))));
            prop_assert!(named.is_none_or(|cpu| planned.cpus == CpuSet::single(*cpu)), "{plan:?}");
        }
    }
    prop_assert_eq!(met(plan, "share"), false);
    let floating = if plan.floats().is_empty() { 0 } else { question.guest.vcpus.len() };
    prop_assert_eq!(
        used.len() < held.len().max(floating),
        plan.report.iter().any(|finding| finding.rule == "share"),
        "sharing is reported, and nothing else is"
    );
    if met(plan, "guest-siblings") {
        let mut on: BTreeMap<Option<u32>, BTreeSet<_>> = BTreeMap::new();
        prop_assert!(plan.floats().is_empty());
        for vcpu in &question.guest.vcpus {
            let cpu = held.get(&vcpu.index);
            let core = cpu.and_then(|cpu| question.topology.cpu(*cpu)).and_then(|cpu| cpu.core);
            prop_assert!(core.is_some());
            on.entry(vcpu.core).or_default().insert(core);
        }
        prop_assert!(on.values().all(|cores| cores.len() == 1), "{plan:?}");
    }
    if met(plan, "one-llc") && question.guest.vcpus.iter().all(|vcpu| vcpu.node.is_none()) {
        let llcs: BTreeSet<_> =
            used.iter().filter_map(|cpu| question.topology.cpu(cpu)?.llc).collect();
        prop_assert!(
            llcs.len() == 1 || question.topology.llcs.len() == question.topology.cores.len()
        );
    }
    if met(plan, "whole-cores") {
        prop_assert_eq!(question.whole(&plan.exclusive), plan.exclusive);
    }
    Ok(())
}

/// The question as it is asked again once the plan is in force.
fn again(question: &Question, plan: &Plan) -> Question {
    Question { held: plan.held(), ..question.clone() }
}

fn threads_of(plan: &Plan, at: &[Index], online: &CpuSet) -> Vec<Thread> {
    let cpus: Vec<CpuId> = online.iter().collect();
    // The main thread, and then against the order in which they are moved.
    let mut roles: Vec<Role> = vec![Role::Emulator, Role::Kernel];
    roles.extend(plan.vcpus.iter().map(|vcpu| Role::Vcpu(vcpu.vcpu)));
    roles.extend(plan.left_alone.iter().map(|vcpu| Role::Vcpu(*vcpu)));
    roles.extend(plan.iothreads.iter().map(|one| Role::Iothread(one.iothread.clone())));
    roles.extend([Role::Vhost, Role::Worker]);
    (1..)
        .zip(at.iter().cycle())
        .zip(roles)
        .map(|((tid, at), role)| Thread {
            key: ThreadKey { tid: Tid(tid), start: StartTicks(1) },
            role,
            comm: String::new(),
            allowed: CpuSet::single(cpus[at.index(cpus.len())]).into(),
            last_cpu: None,
        })
        .collect()
}

/// Where a CPU is: which LLC, which core of it, which thread of that. CPU numbers do not matter here.
type Place = (usize, usize, usize);

fn place(host: &FakeHost, cpu: CpuId) -> Place {
    let one = host.cpus.iter().find(|one| one.id == cpu.index()).expect("a CPU of the host");
    let mates: BTreeSet<usize> =
        host.cpus.iter().filter(|other| other.core == one.core).map(|other| other.id).collect();
    (one.llc, one.core, mates.iter().position(|id| *id == one.id).expect("itself"))
}

fn places(host: &FakeHost, cpus: &CpuSet) -> BTreeSet<Place> {
    cpus.iter().map(|cpu| place(host, cpu)).collect()
}

fn cpus_at(host: &FakeHost, places: &BTreeSet<Place>) -> CpuSet {
    host.set(|cpu| CpuId::from_index(cpu.id).is_some_and(|id| places.contains(&place(host, id))))
}

proptest! {
    // What was found is in `tests/plans` or below as a case of its own; a seed says nothing to a reader.
    #![proptest_config(ProptestConfig {
        cases: 512,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_plan_keeps_every_promise(question in any_question()) {
        match question.ask() {
            Ok(plan) => {
                check(&question, &plan)?;
                prop_assert_eq!(Ok(plan), question.ask(), "the same question, the same plan");
            }
            Err(PlanError::Policy { reason, .. }) => prop_assert!(!reason.is_empty()),
            Err(PlanError::Infeasible { nearest, .. }) => {
                if let Some(nearest) = nearest {
                    let mut relaxed = question.clone();
                    let vm = &mut relaxed.policy.vm;
                    for change in nearest.takes.split(" and ") {
                        match change {
                            "--share" => vm.share = sourced(Sharing::Wrap),
                            "vcpus = \"auto\"" => vm.vcpus = sourced(CpuChoice::Auto),
                            "emulator = \"auto\"" => vm.emulator = sourced(CpuChoice::Auto),
                            "iothreads = \"auto\"" => vm.iothreads.value.cpus = CpuChoice::Auto,
                            "no [vcpu.N]" => vm.vcpu_cpus.clear(),
                            "smt = \"prefer\"" => vm.smt = sourced(Smt::Prefer),
                            other => prop_assert!(false, "{other} would change nothing here"),
                        }
                    }
                    check(&relaxed, &nearest.plan)?;
                    prop_assert_eq!(relaxed.ask(), Ok(nearest.plan), "what is said is what would be done");
                }
            }
        }
    }

    /// Without CPUs by hand nothing but a lack of CPUs stands in the way.
    #[test]
    fn it_is_infeasible_only_where_cpus_are_too_few(question in any_question()) {
        let question = question.by_rule();
        let (free, vcpus) = (question.free().len(), question.guest.vcpus.len());
        let needed = match question.policy.vm.share.value {
            Sharing::Refuse => vcpus,
            Sharing::Wrap => 1,
        };
        match question.ask() {
            Ok(_) => prop_assert!(free >= needed),
            Err(PlanError::Infeasible { nearest, .. }) => {
                prop_assert!(free < needed, "{free} CPUs are free for {vcpus} vCPUs");
                prop_assert_eq!(nearest.is_some(), free > 0 && needed > 1);
            }
            Err(PlanError::Policy { reason, .. }) => prop_assert!(false, "{reason}"),
        }
    }

    /// Where the plan says what would help, that does.
    #[test]
    fn what_is_advised_would_help(question in any_question()) {
        let mut question = question;
        question.policy.vm.vcpus = sourced(CpuChoice::Auto);
        let Ok(plan) = question.ask() else { return Ok(()) };
        for finding in plan.report.iter().filter(|finding| finding.falls_short()) {
            let Some((_, advice)) = finding.reason.split_once("; with ") else { continue };
            let Some((setting, _)) = advice.split_once(" it would be met") else { continue };
            let mut better = question.clone();
            if let Some(cpus) = setting.strip_prefix("[host] reserved = ") {
                let cpus = cpus.trim_matches('"').parse().expect("a cpulist");
                better.policy.host.reserved = sourced(CpuChoice::Cpus(cpus));
            } else {
                prop_assert_eq!(setting, "displace = true");
                better.policy.vm.displace = sourced(Displace::Freely);
            }
            let better = better.ask().expect("what is advised can be had");
            let falls_short = better.report.iter().any(|other| {
                other.rule == finding.rule && other.falls_short()
            });
            prop_assert!(!falls_short, "{}: {:?}", finding.reason, better.report);
        }
    }

    /// What others count on is taken last, and what was isolated at boot first.
    #[test]
    fn others_lose_nothing_where_the_vm_fits_without(question in any_question()) {
        let mut question = question.by_rule();
        let (free, vcpus) = (question.free() - question.soft(), question.guest.vcpus.len());
        let Ok(plan) = question.ask() else { return Ok(()) };
        prop_assert!(free.len() < vcpus || plan.displaced.is_empty(), "{plan:?}");
        let isolated = question.surroundings.promises.isolated;
        if (free & isolated).len() >= vcpus {
            prop_assert!(pinned(&plan).is_subset(&isolated), "{plan:?}");
        }
        let rest = plan.housekeeping & question.allowed();
        let rest = rest - question.surroundings.promises.hard() - isolated;
        if question.policy.host.shared.value.is_none() && !rest.is_empty() {
            prop_assert!(!plan.emulator.intersects(&isolated), "{plan:?}");
        }
        question.policy.vm.displace = sourced(Displace::Freely);
        check(&question, &question.ask().expect("what fits beside others fits without them"))?;
    }

    /// Where one cache has a core for each guest core, no other is used.
    #[test]
    fn what_fits_behind_one_cache_is_behind_one(question in plain_question()) {
        let caches = question.topology.llcs.len();
        if !(1..question.topology.cores.len()).contains(&caches) {
            return Ok(());
        }
        let mut question = question;
        for vcpu in &mut question.guest.vcpus {
            vcpu.node = None;
        }
        let free = question.free();
        let mut sizes: BTreeMap<Option<u32>, usize> = BTreeMap::new();
        for vcpu in &question.guest.vcpus {
            *sizes.entry(vcpu.core).or_default() += 1;
        }
        let threads = sizes.values().copied().max().unwrap_or(1);
        let fits = |cpus: &CpuSet| {
            let cores = question.topology.cores.iter().filter(|core| {
                core.cpus.is_subset(cpus) && core.cpus.is_subset(&free) && core.cpus.len() >= threads
            });
            if threads > 1 { cores.count() >= sizes.len() } else {
                (*cpus & free).len() >= question.guest.vcpus.len()
            }
        };
        // A cache of one kind and node; which is what a group is.
        let mut groups: BTreeMap<_, CpuSet> = BTreeMap::new();
        for core in &question.topology.cores {
            *groups.entry((core.llc, core.node, core.kind)).or_default() = groups
                .get(&(core.llc, core.node, core.kind)).copied().unwrap_or_default() | core.cpus;
        }
        if groups.values().any(fits) && question.topology.cores.iter().all(|core| core.kind.is_none()) {
            let plan = question.ask().expect("a plan");
            prop_assert!(met(&plan, "one-llc"), "{plan:?}");
        }
    }

    #[test]
    fn renumbering_the_cpus_only_renumbers_the_plan(
        (one, other) in hosts::any_host_twice(&[Numbering::SiblingsAdjacent, Numbering::SiblingsLast]),
        guest in any_guest(),
        taken in prop::collection::vec(any::<Index>(), 0..6),
    ) {
        let taken = places(&one, &pick(&one.topology(), &taken));
        let ask = |host: &FakeHost| {
            let exclusive = cpus_at(host, &taken);
            let question = Question {
                topology: host.topology(),
                guest: guest.clone(),
                policy: Policy::default(),
                neighbours: [Neighbour { vm: vm(1), exclusive, helpers: CpuSet::EMPTY, doubt: None }].into_iter().collect(),
                surroundings: Surroundings::default(),
                held: BTreeMap::new(),
            };
            question.ask()
        };
        match (ask(&one), ask(&other)) {
            (Ok(a), Ok(b)) => {
                for (x, y) in a.vcpus.iter().zip(&b.vcpus) {
                    prop_assert_eq!((x.vcpu, x.why), (y.vcpu, y.why));
                    prop_assert_eq!(places(&one, &x.cpus), places(&other, &y.cpus));
                }
                for (x, y) in [
                    (a.exclusive, b.exclusive),
                    (a.housekeeping, b.housekeeping),
                    (a.emulator, b.emulator),
                    (a.iothread_cpus, b.iothread_cpus),
                ] {
                    prop_assert_eq!(places(&one, &x), places(&other, &y));
                }
                prop_assert_eq!(a.verdict(), b.verdict());
            }
            (a, b) => prop_assert_eq!(a.is_err(), b.is_err()),
        }
    }

    #[test]
    fn planning_what_is_held_changes_nothing(question in any_question()) {
        let Ok(first) = question.ask() else { return Ok(()) };
        let second = again(&question, &first).ask().expect("what is in force stays possible");
        prop_assert_eq!(first.held(), second.held());
        prop_assert_eq!(first.exclusive, second.exclusive);
        prop_assert_eq!(first.emulator, second.emulator);
        prop_assert_eq!(first.verdict(), second.verdict());
        // Once more: nothing at all is new then.
        let third = again(&question, &second).ask();
        prop_assert_eq!(Ok(second), third);
    }

    #[test]
    fn hotplug_leaves_the_others_in_place(question in any_question(), more in 1..6u32, gone in any::<Index>()) {
        let Ok(first) = question.ask() else { return Ok(()) };
        let vcpus = u32::try_from(question.guest.vcpus.len()).expect("few");
        let last = question.guest.vcpus.last().expect("one").index.0;
        let mut larger = again(&question, &first);
        for index in last + 1..=last + more {
            let mut vcpu = question.guest.vcpus[gone.index(vcpus as usize)].clone();
            vcpu.index = VcpuIndex(index);
            vcpu.core = Some(1000 + index / 2);
            vcpu.thread = Some(index % 2);
            larger.guest.vcpus.push(vcpu);
        }
        let second = larger.ask().expect("hot-add is never refused");
        check(&larger, &second)?;
        for (vcpu, cpu) in first.held() {
            prop_assert_eq!(second.held().get(&vcpu).copied(), Some(cpu), "vCPU {} stays", vcpu);
        }
        // The other threads of a core alone are to be idle.
        let taken = match question.policy.vm.smt.value {
            Smt::Isolate => question.whole(&pinned(&second)),
            Smt::Prefer | Smt::Siblings => pinned(&second),
        };
        let free = (question.free() - taken).len();
        prop_assert!(free == 0 || !second.floats().is_empty() || second.held().len() == larger.guest.vcpus.len(), "{free} CPUs idle");

        let smaller = Question { held: second.held(), ..question.clone() };
        let third = smaller.ask().expect("hot-remove is never refused");
        prop_assert_eq!(first.held(), third.held());
        prop_assert_eq!(first.exclusive, third.exclusive);

        // Any one of them may go, too.
        let mut fewer = again(&question, &first);
        fewer.guest.vcpus.remove(gone.index(vcpus as usize));
        if fewer.guest.vcpus.iter().any(|vcpu| first.held().contains_key(&vcpu.index)) {
            let plan = fewer.ask().expect("hot-remove is never refused");
            check(&fewer, &plan)?;
            for vcpu in &fewer.guest.vcpus {
                if let Some(cpu) = first.held().get(&vcpu.index) {
                    prop_assert_eq!(plan.held().get(&vcpu.index).copied(), Some(*cpu));
                }
            }
        }
    }

    /// Pins of an older policy, machine or guest: whatever they are, the plan keeps its promises.
    #[test]
    fn pins_that_are_no_longer_valid_do_no_harm(
        question in any_question(),
        held in prop::collection::vec((0..40u32, any::<Index>()), 0..8),
    ) {
        let mut question = question;
        let cpus: Vec<CpuId> = question.topology.cpus.iter().map(|cpu| cpu.id).collect();
        question.held = held
            .iter()
            .map(|(vcpu, at)| (VcpuIndex(*vcpu), cpus[at.index(cpus.len())]))
            .collect();
        if let Ok(plan) = question.ask() {
            check(&question, &plan)?;
        }
    }

    #[test]
    fn several_vms_never_meet_and_may_leave_in_any_order(
        question in any_question(),
        wanted in prop::collection::vec(any_guest(), 2..6),
        leaving in Just((0..6usize).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let mut base = question;
        base.neighbours = Neighbours::default();
        base.policy.vm = Policy::default().vm;
        let mut attached: BTreeMap<usize, (Guest, Plan)> = BTreeMap::new();
        let beside = |attached: &BTreeMap<usize, (Guest, Plan)>, at: usize| -> Neighbours {
            let others = attached.iter().filter(|(other, _)| **other != at);
            others.map(|(other, (_, plan))| Neighbour {
                doubt: None,
                vm: vm(*other),
                exclusive: plan.exclusive,
                helpers: plan.emulator | plan.iothread_cpus,
            }).collect()
        };
        // Plans anew for one that is attached, as it does when the others change.
        let anew = |attached: &BTreeMap<usize, (Guest, Plan)>, at: usize| {
            let (guest, before) = attached[&at].clone();
            let neighbours = beside(attached, at);
            let question = Question { guest, neighbours, held: before.held(), ..base.clone() };
            let after = question.ask_for(&vm(at)).expect("others' comings and goings are no reason");
            (question, before, after)
        };
        for (at, guest) in wanted.into_iter().enumerate() {
            let question = Question { guest, neighbours: beside(&attached, at), ..base.clone() };
            if let Ok(plan) = question.ask_for(&vm(at)) {
                check(&question, &plan)?;
                attached.insert(at, (question.guest, plan));
            }
            // The others plan anew around it, and keep what they have.
            for at in attached.keys().copied().collect::<Vec<_>>() {
                let (question, before, after) = anew(&attached, at);
                check(&question, &after)?;
                prop_assert_eq!(before.held(), after.held());
                attached.insert(at, (question.guest, after));
            }
        }
        for (at, (_, plan)) in &attached {
            for (other, (_, theirs)) in &attached {
                let cores = base.whole(&plan.exclusive);
                prop_assert!(at == other || !cores.intersects(&theirs.exclusive));
                prop_assert!(at == other || !cores.intersects(&(theirs.emulator | theirs.iothread_cpus)));
            }
        }
        for gone in leaving {
            attached.remove(&gone);
            for at in attached.keys().copied().collect::<Vec<_>>() {
                let (_, before, after) = anew(&attached, at);
                prop_assert_eq!(before.held(), after.held());
                prop_assert_eq!(before.exclusive, after.exclusive);
            }
        }
    }

    #[test]
    fn the_steps_lead_to_the_plan_and_then_there_are_none(
        question in any_question(),
        seen in prop::collection::vec(any::<Index>(), 1..20),
    ) {
        let Ok(plan) = question.ask() else { return Ok(()) };
        let online = question.topology.online();
        let mut threads = threads_of(&plan, &seen, &online);
        let steps = diff(&plan, Pid(1), &threads, &online);
        for step in &steps {
            let thread = threads.iter_mut().find(|thread| thread.key == step.thread).expect("seen");
            prop_assert_eq!(&thread.allowed, &step.from);
            prop_assert!(step.from != step.to);
            thread.allowed = (*step.to & online).into();
        }
        prop_assert_eq!(diff(&plan, Pid(1), &threads, &online), vec![]);
        for thread in &threads {
            match desired(&plan, &thread.role) {
                Some(cpus) => prop_assert_eq!(*thread.allowed, cpus & online),
                None => prop_assert!(plan.left_alone.iter().any(|vcpu| thread.role == Role::Vcpu(*vcpu))),
            }
        }
        let rank = |role: &Role| match role {
            Role::Emulator | Role::Worker | Role::Vhost => 0,
            Role::Iothread(_) => 1,
            Role::Vcpu(_) => 2,
            Role::Kernel => 3,
        };
        // But for the main thread, which is looked at below.
        let ranks: Vec<u8> =
            steps.iter().filter(|step| step.thread.tid != Tid(1)).map(|step| rank(&step.role)).collect();
        prop_assert!(ranks.is_sorted(), "emulator, iothreads, vCPUs, in this order: {ranks:?}");
        if let Some(at) = steps.iter().position(|step| step.thread.tid == Tid(1)) {
            prop_assert_eq!(at, 0, "the main thread comes first: it creates the others");
        }
    }
}
