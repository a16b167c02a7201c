//! The one line `args:` of a VM, with all options that the checks found missing.

use super::advice::Advice;
use super::args_line::{self, QemuOption};
use super::cache::L3_OFF;
use super::facts::VmFacts;

/// What the line has to have.
pub(super) struct ConfigLine<'a> {
    pub(super) vm: &'a VmFacts<'a>,
    /// The options of all checks.
    pub(super) options: Vec<&'a QemuOption>,
    /// Whether [`L3_OFF`] goes.
    pub(super) shows_l3: bool,
}

impl ConfigLine<'_> {
    /// Returns a result that one of the options fixes, with the line that has all of them and all that is there.
    pub(super) fn added(&self, mut advice: Advice) -> Advice {
        let vm = self.vm.vm;
        let Some(config) = &self.vm.config else {
            let all: Vec<String> = self
                .options
                .iter()
                .map(|option| format!("{} {}", option.name, option.value))
                .collect();
            advice.reason.push_str("; a vCPU that is plugged later is not in it");
            advice.mend = Some(all.join(" "));
            return advice;
        };
        let path = format!("/etc/pve/qemu-server/{vm}.conf");
        let there =
            config.as_ref().ok().and_then(|config| config.args.as_deref()).unwrap_or_default();
        let before =
            if self.shows_l3 { there.replace(&format!(",{L3_OFF}"), "") } else { there.to_owned() };
        match args_line::merged(&before, &self.options) {
            Ok(line) if line == there => {
                advice
                    .reason
                    .push_str("; its line `args:` is right, and counts from its next start on");
                advice.mend = Some(format!("qm shutdown {vm} && qm start {vm}"));
            }
            Ok(line) => {
                let has_smp = self.options.iter().any(|option| option.name == "-smp");
                let how = match (config, there) {
                    (Err(_), _) if has_smp => {
                        "add this to its one line `args:`, unless its hotplug has cpu"
                    }
                    (Err(_), _) => "add this to its one line `args:`",
                    (Ok(_), "") => "add this line",
                    (Ok(_), _) => "this in place of its line `args:`",
                };
                advice.reason.push_str(&format!("; {path}: {how}, then start the VM anew"));
                advice.mend = Some(format!("args: {line}"));
            }
            Err(why) => {
                advice
                    .reason
                    .push_str(&format!("; the line `args:` in {path} cannot be read: {why}"));
            }
        }
        advice
    }
}
