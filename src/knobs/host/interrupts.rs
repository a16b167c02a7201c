//! Which interrupts there are; and `/proc/interrupts`: who one is for, and where it has fired. That has a line
//! for each interrupt with a column for each CPU, so it is read only when there is something to report about one.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::cpuset::CpuSet;
use crate::ids::CpuId;
use crate::knobs::host::places::Place;
use crate::shown;
use crate::sysroot::SysRoot;

/// One interrupt.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Interrupt {
    /// The devices it is for, such as `nvme0q3`; empty where no driver has requested it.
    pub devices: String,
    /// How often it has fired on the CPUs asked about.
    pub fired: u64,
}

/// All numbered interrupts, and how often they have fired on these CPUs. What cannot be read is left
/// out.
#[must_use]
pub fn interrupts(root: &SysRoot, on: &CpuSet) -> BTreeMap<u32, Interrupt> {
    parse(&root.read_lossy("proc/interrupts").unwrap_or_default(), on)
}

/// The places that say where interrupts go: those yet to come, and each that there is.
#[must_use]
pub fn irq_places(root: &SysRoot) -> Vec<Place> {
    let numbers = root.folder("proc/irq").and_then(|folder| folder.numbers()).unwrap_or_default();
    std::iter::once(Place::of_new_irqs()).chain(numbers.into_iter().map(Place::of_irq)).collect()
}

/// The CPUs of the NUMA nodes of interrupts' devices; none where the host has one node only.
#[must_use]
pub(crate) fn irq_nodes(root: &SysRoot, irqs: &[Place]) -> BTreeMap<Place, CpuSet> {
    const NODES: &str = "sys/devices/system/node";
    let names = root.folder(NODES).and_then(|folder| folder.names()).unwrap_or_default();
    let node = |name: String| {
        let number: i32 = name.strip_prefix("node")?.parse().ok()?;
        let cpus = root.read(&format!("{NODES}/{name}/cpulist")).ok()?;
        Some((number, CpuSet::parse_cpulist(&cpus).ok()?))
    };
    let nodes: BTreeMap<i32, CpuSet> = names.into_iter().filter_map(node).collect();
    if nodes.len() < 2 {
        return BTreeMap::new();
    }
    let of_irq = |place: &Place| {
        // A device without a node has the number -1.
        let node = root.read(&format!("proc/irq/{}/node", place.irq()?)).ok()?;
        Some((place.clone(), *nodes.get(&node.trim().parse().ok()?)?))
    };
    irqs.iter().filter_map(of_irq).collect()
}

/// Interrupts that the kernel itself keeps where they are, those first that have fired most; queues that never
/// have are named together:
/// `4 stay where the kernel keeps them, fired there so far: 28 (nvme0q3): 6, 29-31 (nvme0q4-6): 0`.
#[must_use]
pub fn kept_in_words<'a>(kept: impl Iterator<Item = (&'a u32, &'a Interrupt)>) -> String {
    /// How many are named: those of a VM's CPUs, on a machine with many fast disks.
    const NAMED: usize = 64;
    let mut by_count: Vec<(&u32, &Interrupt)> = kept.collect();
    by_count.sort_by_key(|(number, irq)| (Reverse(irq.fired), **number));
    let mut runs: Vec<Run<'_>> = Vec::new();
    for (number, irq) in &by_count {
        let next = Run::of(**number, irq);
        if !runs.last_mut().is_some_and(|run| run.goes_on_with(&next)) {
            runs.push(next);
        }
    }
    let named: Vec<String> = runs.iter().take(NAMED).map(Run::in_words).collect();
    let more = if runs.len() > NAMED { ", …" } else { "" };
    let (stay, keeps) =
        if by_count.len() == 1 { ("stays", "keeps it") } else { ("stay", "keeps them") };
    format!(
        "{} {stay} where the kernel {keeps}, fired there so far: {}{more}",
        by_count.len(),
        named.join(", ")
    )
}

/// An interrupt, or several of one device's queues, one after another, that have not fired.
struct Run<'a> {
    first: u32,
    last: u32,
    /// Name and number of the first one's queue: `nvme0q` and `3`.
    queue: (&'a str, Option<u32>),
    fired: u64,
}

impl<'a> Run<'a> {
    fn of(number: u32, irq: &'a Interrupt) -> Run<'a> {
        let devices = irq.devices.as_str();
        let name = devices.trim_end_matches(|letter: char| letter.is_ascii_digit());
        // Not to lose a leading zero, and a number that is none.
        let queue = devices[name.len()..].parse().ok();
        let is_whole = queue.is_some_and(|queue: u32| format!("{name}{queue}") == devices);
        let queue = if is_whole { (name, queue) } else { (devices, None) };
        Run { first: number, last: number, queue, fired: irq.fired }
    }

    /// Takes the next one in, where it goes on with it.
    fn goes_on_with(&mut self, next: &Run<'_>) -> bool {
        let length = self.last - self.first + 1;
        let (name, queue) = self.queue;
        let follows = self.fired == 0
            && next.fired == 0
            && self.last.checked_add(1) == Some(next.first)
            && name == next.queue.0
            && queue.and_then(|queue| queue.checked_add(length)) == next.queue.1
            && (queue.is_some() || name.is_empty());
        if follows {
            self.last = next.last;
        }
        follows
    }

    fn in_words(&self) -> String {
        let Run { first, last, queue: (name, queue), fired } = self;
        let range = |first: u32, last: u32| {
            if first == last { first.to_string() } else { format!("{first}-{last}") }
        };
        let numbers = range(*first, *last);
        let queues = queue.map(|queue| range(queue, queue + (last - first))).unwrap_or_default();
        match format!("{}{queues}", shown::line(name)).as_str() {
            "" => format!("{numbers}: {fired}"),
            devices => format!("{numbers} ({devices}): {fired}"),
        }
    }
}

fn parse(text: &str, on: &CpuSet) -> BTreeMap<u32, Interrupt> {
    let mut lines = text.lines();
    let columns: Vec<Option<CpuId>> = lines
        .next()
        .unwrap_or_default()
        .split_ascii_whitespace()
        .map(|name| name.strip_prefix("CPU")?.parse().ok().and_then(CpuId::from_index))
        .collect();
    let interrupt = |line: &str| {
        let (number, rest) = line.split_once(':')?;
        let number = number.trim().parse().ok()?;
        let mut words = rest.split_ascii_whitespace();
        let mut fired = 0;
        for cpu in &columns {
            let count: u64 = words.next()?.parse().ok()?;
            fired += if cpu.is_some_and(|cpu| on.contains(cpu)) { count } else { 0 };
        }
        // The chip, the number it knows it by and how it is triggered; then the devices.
        let devices = words.skip_while(|word| !is_trigger(word)).skip(1).collect::<Vec<_>>();
        Some((number, Interrupt { devices: devices.join(" "), fired }))
    };
    lines.filter_map(interrupt).collect()
}

/// `1-edge`, `9-fasteoi`, `Edge`, `Level`.
fn is_trigger(word: &str) -> bool {
    word.eq_ignore_ascii_case("edge")
        || word.eq_ignore_ascii_case("level")
        || word.split_once('-').is_some_and(|(number, _)| {
            !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "           CPU0       CPU1       CPU4
  9:          0          7          0  IR-IO-APIC    9-fasteoi   acpi
 28:          1          2          4  IR-PCI-MSIX-0000:01:00.0   3-edge      nvme0q3, nvme1q3
 40:          5          0          0     GICv3  27 Level     arch_timer
NMI:          0          0          0   Non-maskable interrupts
ERR:          0
";

    #[test]
    fn columns_are_cpus_by_name_and_not_by_place() {
        let found = parse(TEXT, &"1,4".parse().expect("a cpulist"));
        let of = |number| {
            found.get(&number).map(|found: &Interrupt| (found.devices.as_str(), found.fired))
        };
        assert_eq!(of(9), Some(("acpi", 7)));
        assert_eq!(of(28), Some(("nvme0q3, nvme1q3", 6)));
        assert_eq!(of(40), Some(("arch_timer", 0)));
        assert_eq!(found.len(), 3);
    }

    #[test]
    fn queues_that_never_fire_are_named_together() {
        let kept = |list: &[(u32, &str, u64)]| {
            let irqs: BTreeMap<u32, Interrupt> = list
                .iter()
                .map(|(number, devices, fired)| {
                    (*number, Interrupt { devices: (*devices).to_owned(), fired: *fired })
                })
                .collect();
            let text = kept_in_words(irqs.iter());
            text.rsplit_once("far: ").expect("a list").1.to_owned()
        };
        let queues =
            [(50, "nvme0q3", 0), (51, "nvme0q4", 0), (52, "nvme0q5", 0), (53, "nvme1q6", 0)];
        assert_eq!(kept(&queues), "50-52 (nvme0q3-5): 0, 53 (nvme1q6): 0");
        let fired = [(50, "q1", 0), (51, "q2", 7), (52, "q3", 0), (53, "q4", 7), (54, "q5", 9)];
        assert_eq!(kept(&fired), "54 (q5): 9, 51 (q2): 7, 53 (q4): 7, 50 (q1): 0, 52 (q3): 0");
        let nameless = [(0, "timer", 0), (2, "", 0), (3, "", 0), (4, "x", 0), (5, "x", 0)];
        assert_eq!(kept(&nameless), "0 (timer): 0, 2-3: 0, 4 (x): 0, 5 (x): 0");
        let odd = [(7, "q9", 0), (8, "q010", 0), (9, "q10", 0), (10, "q99999999999", 0)];
        assert_eq!(kept(&odd), "7 (q9): 0, 8 (q010): 0, 9 (q10): 0, 10 (q99999999999): 0");
        assert_eq!(kept(&[(u32::MAX, "q4294967295", 0)]), "4294967295 (q4294967295): 0");
    }

    #[test]
    fn nonsense_is_no_interrupt() {
        for text in ["", "x", "CPU0\n1", "CPU0\n1:\n", "CPU0\n1: x y\n", "CPU99999\n5: 1 x\n"] {
            assert!(parse(text, &CpuSet::EMPTY).values().all(|irq| irq.fired == 0), "{text}");
        }
    }
}
