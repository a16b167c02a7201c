//! `sched-ext`: whether a BPF program schedules the host's threads (`Documentation/scheduler/sched-ext.rst`, Linux
//! 6.12).

use super::advice::{Advice, fine, info, unknown};
use super::read::text;
use crate::sysroot::SysRoot;

const CHECK: &str = "sched-ext";
const STATE: &str = "sys/kernel/sched_ext/state";

/// Names the scheduler that is loaded, and says what still holds. `None`: the kernel has no such schedulers.
pub(super) fn advice(root: &SysRoot) -> Option<Advice> {
    if root.read_lossy(STATE).is_err_and(|error| error.is_absent()) {
        return None;
    }
    let state = match text(root, STATE) {
        Ok(state) => state,
        Err(why) => return Some(unknown(CHECK, format!("not known: {why}"))),
    };
    if state == "disabled" {
        return Some(fine(CHECK, "no other scheduler is loaded"));
    }
    let name = text(root, "sys/kernel/sched_ext/root/ops").unwrap_or_default();
    let name =
        if name.is_empty() { "a BPF scheduler".to_owned() } else { format!("scheduler {name}") };
    // 0: only threads that ask for it (SCHED_EXT).
    let whom = match text(root, "sys/kernel/sched_ext/switch_all").as_deref() {
        Ok("0") => "threads that ask for it",
        Ok("1") => "all ordinary threads",
        _ => "ordinary threads",
    };
    let reason = format!(
        "{name} is {state} and schedules {whom}: masks and partitions still hold, and threads with sched = \"fifo:N\" \
         are not its own, but which thread of a CPU runs first and for how long is its decision; ending it loses what \
         it was loaded for"
    );
    Some(info(CHECK, reason, Some("echo S >/proc/sysrq-trigger".to_owned())))
}

#[cfg(test)]
mod tests {
    use super::super::advice::Severity;
    use super::super::fixture::Tree;
    use super::*;

    #[test]
    fn another_scheduler_is_named_and_none_is_fine() {
        let found = |files: &[(&str, &str)]| advice(&Tree::new(files).root());
        assert_eq!(found(&[]), None, "an older kernel");
        let off = found(&[(STATE, "disabled\n")]).expect("read");
        assert_eq!((off.severity, off.mend), (Severity::Fine, None));
        let on = found(&[
            (STATE, "enabled\n"),
            ("sys/kernel/sched_ext/root/ops", "lavd_1.0.8\n"),
            ("sys/kernel/sched_ext/switch_all", "1\n"),
        ]);
        let on = on.expect("read");
        assert_eq!(on.severity, Severity::Info);
        assert!(on.reason.starts_with("scheduler lavd_1.0.8 is enabled"), "{}", on.reason);
        assert!(on.reason.contains("all ordinary threads") && on.reason.contains("masks"));
        assert_eq!(on.mend.as_deref(), Some("echo S >/proc/sysrq-trigger"));
        let nameless = found(&[(STATE, "enabling\n")]).expect("read");
        assert!(nameless.reason.starts_with("a BPF scheduler is enabling"), "{}", nameless.reason);
        // A folder in its place cannot be read.
        let odd = found(&[("sys/kernel/sched_ext/state/x", "")]).expect("there");
        assert_eq!(odd.severity, Severity::Unknown);
    }
}
