//! `mitigations`: what protects guests and host from each other, at the price of time at each exit of a guest
//! (`Documentation/admin-guide/hw-vuln`). It is described only: qmpin advises nothing that takes protection away.

use super::advice::{Advice, fine, info, unknown};
use super::read::{names, text};
use crate::error::chain;
use crate::sysroot::SysRoot;
use crate::wording::listed;

const CHECK: &str = "mitigations";
const FOLDER: &str = "sys/devices/system/cpu/vulnerabilities";
/// How many are named in a sentence.
const NAMES_MAX: usize = 6;

/// Counts what the kernel reports of each vulnerability.
pub(super) fn advice(root: &SysRoot) -> Advice {
    let all = match names(root, FOLDER) {
        Ok(all) => all,
        Err(error) => return unknown(CHECK, format!("not known: {}", chain(&error))),
    };
    let said = all.iter().filter_map(|name| {
        let said = text(root, &format!("{FOLDER}/{name}")).ok()?;
        Some((name.as_str(), said))
    });
    let said: Vec<(&str, String)> = said.collect();
    let with = |word: &str| -> Vec<&str> {
        said.iter().filter(|(_, said)| said.contains(word)).map(|(name, _)| *name).collect()
    };
    // "KVM: Mitigation: ...", but not "Mitigation: ...; SMT vulnerable", is protected as a whole.
    let (on, open) = (with("Mitigation"), with("Vulnerable"));
    if said.is_empty() || said.iter().all(|(_, said)| said == "Unknown") {
        return unknown(CHECK, format!("/{FOLDER} reports nothing"));
    }
    let read = said.len();
    if on.is_empty() && open.is_empty() {
        return fine(
            CHECK,
            format!("the CPU has none of the {read} weaknesses that the kernel knows"),
        );
    }
    let mut parts = Vec::new();
    if !on.is_empty() {
        parts.push(format!(
            "{} of {read} are on ({}): they take time at exits of a guest and at system calls",
            on.len(),
            listed(&on, NAMES_MAX, ", ")
        ));
    }
    let smt = with("SMT vulnerable");
    if !smt.is_empty() {
        parts.push(format!(
            "{} not between siblings of a core, which belong to one VM where qmpin has whole cores",
            listed(&smt, NAMES_MAX, ", ")
        ));
    }
    if !open.is_empty() {
        parts.push(format!(
            "the CPU is open to {} ({})",
            open.len(),
            listed(&open, NAMES_MAX, ", ")
        ));
    }
    let is_off = text(root, "proc/cmdline").is_ok_and(|line| {
        line.split_ascii_whitespace().any(|word| word.starts_with("mitigations=off"))
    });
    parts.push(if is_off {
        "mitigations=off on the kernel command line: a guest may read memory of the host and of other guests".to_owned()
    } else {
        "without them a guest may read memory of the host and of other guests, so they stay".to_owned()
    });
    info(CHECK, parts.join("; "), None)
}

#[cfg(test)]
mod tests {
    use super::super::advice::Severity;
    use super::super::fixture::Tree;
    use super::*;

    fn found(said: &[(&str, &str)], cmdline: &str) -> Advice {
        let mut files: Vec<(String, &str)> =
            said.iter().map(|(name, said)| (format!("{FOLDER}/{name}"), *said)).collect();
        files.push(("proc/cmdline".to_owned(), cmdline));
        let files: Vec<(&str, &str)> =
            files.iter().map(|(path, text)| (path.as_str(), *text)).collect();
        advice(&Tree::new(&files).root())
    }

    #[test]
    fn mitigations_are_described_and_never_to_be_switched_off() {
        let some = [
            ("mds", "Mitigation: Clear CPU buffers; SMT vulnerable\n"),
            ("itlb_multihit", "KVM: Mitigation: Split huge pages\n"),
            ("retbleed", "Vulnerable\n"),
            ("srbds", "Not affected\n"),
        ];
        let on = found(&some, "quiet\n");
        assert_eq!((on.severity, &on.mend), (Severity::Info, &None));
        for words in [
            "2 of 4 are on (itlb_multihit, mds)",
            "mds not between siblings",
            "open to 1 (retbleed)",
            "so they stay",
        ] {
            assert!(on.reason.contains(words), "{words}: {}", on.reason);
        }
        let off = found(&some, "quiet mitigations=off\n");
        assert_eq!((off.severity, &off.mend), (Severity::Info, &None));
        assert!(off.reason.contains("mitigations=off") && off.reason.contains("may read memory"));
    }

    #[test]
    fn a_cpu_without_weaknesses_is_fine_and_silence_is_unknown() {
        assert_eq!(found(&[("mds", "Not affected\n")], "").severity, Severity::Fine);
        assert_eq!(found(&[("mds", "Unknown\n")], "").severity, Severity::Unknown);
        let none = found(&[], "");
        assert_eq!(none.severity, Severity::Unknown, "{none:?}");
    }
}
