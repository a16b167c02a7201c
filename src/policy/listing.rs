//! A merged policy as a list: every key, its value as a policy file has it, and where it is from.

use serde::Serialize;
use serde_json::Value;

use crate::cpuset::CpuSet;
use crate::ids::{IothreadId, VcpuIndex};

use super::{Displace, Knob, Origin, Policy, Sharing, Sourced};

/// In which part of a policy file a key stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Table {
    /// The VM's own, at the top.
    Vm,
    /// `[vcpu.0]`.
    Vcpu(VcpuIndex),
    /// `[iothread.io0]`.
    Iothread(IothreadId),
    /// `[host]`.
    Host,
}

impl Table {
    /// What stands before its keys, as in `host.reserved`; `None`: nothing.
    #[must_use]
    pub fn name(&self) -> Option<String> {
        match self {
            Table::Vm => None,
            Table::Vcpu(vcpu) => Some(format!("vcpu.{vcpu}")),
            // A name in quotes is TOML's for any text.
            Table::Iothread(IothreadId(id)) if is_bare(id) => Some(format!("iothread.{id}")),
            Table::Iothread(IothreadId(id)) => {
                Some(format!("iothread.{}", Value::from(id.as_str())))
            }
            Table::Host => Some("host".to_owned()),
        }
    }
}

fn is_bare(key: &str) -> bool {
    !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

/// One key of a policy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// In which part.
    pub table: Table,
    /// Its name.
    pub key: &'static str,
    /// Its value, which reads the same in TOML; null: it has none, and none can be written down.
    pub value: Value,
    /// Where that is from.
    pub origin: Origin,
    /// The level that decides, where the key is silent.
    pub by_level: bool,
}

fn entry<T: Serialize>(table: Table, key: &'static str, from: &Sourced<T>) -> Entry {
    // Words, numbers and CPUs: none of them can fail.
    let value = serde_json::to_value(&from.value).unwrap_or_default();
    Entry { table, key, value, origin: from.origin.clone(), by_level: false }
}

impl Policy {
    /// Every key, in the order of the manual page.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        let (vm, host) = (&self.vm, &self.host);
        let mut entries = vec![
            entry(Table::Vm, "isolation", &vm.isolation),
            entry(Table::Vm, "cores", &vm.cores),
            entry(Table::Vm, "cache", &vm.cache),
            entry(Table::Vm, "vcpus", &vm.vcpus),
            entry(Table::Vm, "iothreads", &vm.iothreads),
            entry(Table::Vm, "emulator", &vm.emulator),
            entry(Table::Vm, "smt", &vm.smt),
            entry(Table::Vm, "share", &vm.share.clone().map(|share| share == Sharing::Wrap)),
            entry(
                Table::Vm,
                "displace",
                &vm.displace.clone().map(|displace| displace == Displace::Freely),
            ),
            entry(Table::Vm, "overflow", &vm.overflow),
            entry(Table::Vm, "max_vcpus", &vm.max_vcpus),
            entry(Table::Vm, "channel", &vm.channel),
            entry(
                Table::Vm,
                "check_interval_s",
                &vm.check_interval.clone().map(|interval| interval.as_secs()),
            ),
            entry(Table::Vm, "sched", &vm.sched),
            entry(Table::Vm, "sched_vcpus", &vm.sched_vcpus),
            entry(Table::Vm, "vfio_irqs", &vm.vfio_irqs),
        ];
        let wanted = vm.wanted_knobs();
        entries.extend(Knob::ALL.into_iter().map(|knob| Entry {
            table: Table::Vm,
            key: knob.key(),
            value: wanted.contains(&knob).into(),
            origin: match vm.knobs.get(&knob) {
                Some(own) => own.origin.clone(),
                None => vm.isolation.origin.clone(),
            },
            by_level: !vm.knobs.contains_key(&knob),
        }));
        let vcpus = vm.vcpu_cpus.iter();
        entries.extend(
            vcpus.map(|(vcpu, cpu)| {
                entry(Table::Vcpu(*vcpu), "cpu", &cpu.clone().map(CpuSet::single))
            }),
        );
        let iothreads = vm.iothread_cpus.iter();
        entries.extend(iothreads.map(|(id, cpus)| entry(Table::Iothread(id.clone()), "cpu", cpus)));
        entries.push(entry(Table::Host, "reserved", &host.reserved));
        entries.push(entry(Table::Host, "shared", &host.shared));
        entries
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::policy::FileKind;

    #[test]
    fn what_is_listed_is_a_policy_file_that_says_the_same() {
        let text = "isolation = \"strict\"\nvcpus = \"6-11\"\nshare = true\nsched = \"fifo:2\"\nnoise = false\n\
                    cache = \"ordinary\"\ncheck_interval_s = 7\niothreads = \"each:1-2\"\nsched_vcpus = \"1-7\"\n\
                    [vcpu.0]\ncpu = \"7\"\n[iothread.\"io 0\"]\ncpu = \"1\"\n[iothread.io1]\ncpu = \"2-3\"\n\
                    [host]\nshared = \"1-2\"\n";
        let parse = |text: &str| {
            let parsed = Policy::default().with_file(text, Path::new("x.toml"), FileKind::Host);
            parsed.expect("good")
        };
        let policy = parse(text);
        let (mut again, mut table) = (String::new(), None);
        for entry in policy.entries().iter().filter(|entry| !entry.value.is_null()) {
            if entry.table.name() != table {
                table = entry.table.name();
                again.push_str(&format!("[{}]\n", table.as_deref().unwrap_or_default()));
            }
            again.push_str(&format!("{} = {}\n", entry.key, entry.value));
        }
        let values = |policy: &Policy| -> Vec<_> {
            let entries = policy.entries().into_iter();
            entries.map(|entry| (entry.table.name(), entry.key, entry.value)).collect()
        };
        assert_eq!(values(&parse(&again)), values(&policy), "{again}");
    }

    #[test]
    fn a_knob_says_whether_the_level_or_a_line_has_decided() {
        let path = Path::new("x.toml");
        let policy = Policy::default().with_file("\nirqs = false\n", path, FileKind::Vm);
        let entries = policy.expect("good").entries();
        let found = |key: &str| entries.iter().find(|entry| entry.key == key).expect("listed");
        assert_eq!(found("irqs").value, Value::Bool(false));
        assert_eq!(found("irqs").origin.to_string(), "x.toml:2");
        assert!(!found("irqs").by_level && found("kthreads").by_level);
    }
}
