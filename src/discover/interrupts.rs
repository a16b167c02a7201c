//! Which interrupts there are; and `/proc/interrupts`: who one is for, and where it has fired. That has a line
//! for each interrupt with a column for each CPU, so it is read only when there is something to tell about one.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::cpuset::CpuSet;
use crate::ids::CpuId;
use crate::places::Place;
use crate::sysroot::SysRoot;

/// One interrupt.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Interrupt {
    /// The devices it is for, such as `nvme0q3`; empty where nobody has asked for it.
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

/// Interrupts that the kernel itself keeps where they are, those first that have fired most:
/// `2 stay where the kernel keeps them, and have fired there so far: 28 (nvme0q3): 6, 29 (nvme0q4): 0`.
#[must_use]
pub fn kept_in_words<'a>(kept: impl Iterator<Item = (&'a u32, &'a Interrupt)>) -> String {
    /// How many are named: those of a VM's CPUs, on a machine with many fast disks.
    const NAMED: usize = 64;
    let mut by_count: Vec<(&u32, &Interrupt)> = kept.collect();
    by_count.sort_by_key(|(number, irq)| (Reverse(irq.fired), **number));
    let name = |(number, irq): &(&u32, &Interrupt)| match irq.devices.as_str() {
        "" => format!("{number}: {}", irq.fired),
        devices => format!("{number} ({}): {}", devices.escape_debug(), irq.fired),
    };
    let named: Vec<String> = by_count.iter().take(NAMED).map(name).collect();
    let more = if by_count.len() > NAMED { ", …" } else { "" };
    let (stay, keeps) =
        if by_count.len() == 1 { ("stays", "keeps it") } else { ("stay", "keeps them") };
    format!(
        "{} {stay} where the kernel {keeps}, fired there so far: {}{more}",
        by_count.len(),
        named.join(", ")
    )
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
    fn nonsense_is_no_interrupt() {
        for text in ["", "x", "CPU0\n1", "CPU0\n1:\n", "CPU0\n1: x y\n", "CPU99999\n5: 1 x\n"] {
            assert!(parse(text, &CpuSet::EMPTY).values().all(|irq| irq.fired == 0), "{text}");
        }
    }
}
