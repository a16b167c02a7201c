//! `halt-poll`: how long a vCPU that has halted is waited for before its CPU is given up
//! (`Documentation/virt/kvm/halt-polling.rst`).

use super::advice::{Advice, fine, info, unknown};
use super::read::number;
use crate::sysroot::SysRoot;

const CHECK: &str = "halt-poll";
const FILE: &str = "sys/module/kvm/parameters/halt_poll_ns";
/// What x86 kernels have by default.
const USUAL_NS: u64 = 200_000;
/// From here on a vCPU that wakes a thousand times a second is never idle.
const LONG_NS: u64 = 1_000_000;

/// Judges the longest time that KVM polls.
pub(super) fn advice(root: &SysRoot) -> Advice {
    let polled = match number(root, FILE) {
        Ok(polled) => polled,
        Err(why) => return unknown(CHECK, format!("not known: {why}")),
    };
    let usual = || Some(format!("echo {USUAL_NS} >/{FILE}"));
    let us = polled / 1000;
    match polled {
        0 => info(
            CHECK,
            "halt_poll_ns = 0: each time a vCPU that has halted wakes, it goes through the host's scheduler, some µs; \
             200000 polls up to 200 µs before, and loses power and the boost of other cores while it polls",
            usual(),
        ),
        LONG_NS.. => info(
            CHECK,
            format!(
                "halt_poll_ns = {polled}: a CPU polls up to {us} µs after its vCPU has halted, so a guest that is \
                 nearly idle keeps it busy; 200000 is usual, and loses a few µs at wakes that come later"
            ),
            usual(),
        ),
        _ => fine(CHECK, format!("a CPU polls up to {us} µs after its vCPU has halted")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::advice::Severity;
    use super::super::fixture::Tree;
    use super::*;

    #[test]
    fn only_no_polling_and_very_long_polling_are_worth_a_word() {
        let found = |text: Option<&str>| {
            let files: Vec<_> = text.map(|text| (FILE, text)).into_iter().collect();
            advice(&Tree::new(&files).root())
        };
        for (text, severity) in [
            (Some("200000\n"), Severity::Fine),
            (Some("999999\n"), Severity::Fine),
            (Some("0\n"), Severity::Info),
            (Some("2000000\n"), Severity::Info),
            (Some("much\n"), Severity::Unknown),
            (None, Severity::Unknown),
        ] {
            let found = found(text);
            assert_eq!(found.severity, severity, "{text:?}: {found:?}");
            let mend = "echo 200000 >/sys/module/kvm/parameters/halt_poll_ns";
            let has = (severity == Severity::Info).then_some(mend);
            assert_eq!(found.mend.as_deref(), has, "{text:?}");
        }
        assert!(found(Some("2000000\n")).reason.contains("up to 2000 µs"));
    }
}
