//! Marks of what leases do not say of a VM, beside them in `/run/qmpin`:
//!
//! ```text
//!   /run/qmpin/100.detached   VM 100 was detached by hand; its service does not attach it by itself
//!   /run/qmpin/100.waiting    the service of VM 100 waits until it can be attached, and why
//!   /run/qmpin/100.reloaded   the service of VM 100 was asked to read its policy again, and the result
//! ```
//!
//! A mark is about one QEMU process in one boot. It says nothing about any other process, so a mark of a process that
//! has ended does no harm; [`sweep_marks`] removes it.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::ids::VmName;
use crate::leases::StateDir;
use crate::state_file::{read_state, remove_state, write_state};
use crate::threads::ProcessKey;

/// The longest mark that is read.
const BYTES_MAX: u64 = 64 << 10;

/// A VM that was detached by hand.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Detached {
    /// [`Mark::SCHEMA`].
    pub schema: String,
    /// Which VM.
    pub vm: VmName,
    /// The boot it is valid in.
    pub boot_id: String,
    /// The QEMU process that was detached.
    pub qemu: ProcessKey,
    /// Since when, in seconds of the Unix epoch.
    pub since_unix_s: u64,
}

/// A VM whose service waits until it can be attached.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Waiting {
    /// [`Mark::SCHEMA`].
    pub schema: String,
    /// Which VM.
    pub vm: VmName,
    /// The boot it is valid in.
    pub boot_id: String,
    /// The QEMU process that is to be attached.
    pub qemu: ProcessKey,
    /// The process that waits.
    pub supervisor: ProcessKey,
    /// Since when, in seconds of the Unix epoch.
    pub since_unix_s: u64,
    /// Why the VM cannot be attached now.
    pub reason: String,
}

/// How often the supervisor of a VM has read its policy again, and with which result.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Reloaded {
    /// [`Mark::SCHEMA`].
    pub schema: String,
    /// Which VM.
    pub vm: VmName,
    /// The boot it is valid in.
    pub boot_id: String,
    /// The QEMU process that is followed.
    pub qemu: ProcessKey,
    /// How often.
    pub times: u64,
    /// Why the policy before stays in force; `None`: the new one is.
    pub refused: Option<String>,
    /// What of the new one takes effect when the VM is attached the next time.
    pub later: Vec<String>,
}

impl Detached {
    /// A mark of this moment.
    #[must_use]
    pub fn now(vm: &VmName, boot_id: &str, qemu: ProcessKey) -> Detached {
        Detached {
            schema: Detached::SCHEMA.to_owned(),
            vm: vm.clone(),
            boot_id: boot_id.to_owned(),
            qemu,
            since_unix_s: unix_now_s(),
        }
    }
}

impl Waiting {
    /// A mark of this moment.
    #[must_use]
    pub fn now(
        vm: &VmName,
        boot_id: &str,
        qemu: ProcessKey,
        supervisor: ProcessKey,
        reason: &str,
    ) -> Waiting {
        Waiting {
            schema: Waiting::SCHEMA.to_owned(),
            vm: vm.clone(),
            boot_id: boot_id.to_owned(),
            qemu,
            supervisor,
            since_unix_s: unix_now_s(),
            reason: reason.to_owned(),
        }
    }
}

/// Now, in seconds of the Unix epoch.
pub(crate) fn unix_now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}

/// A kind of mark.
pub trait Mark: Serialize + DeserializeOwned {
    /// The suffix of its file.
    const SUFFIX: &'static str;
    /// Its schema.
    const SCHEMA: &'static str;

    /// What it says of itself.
    fn about(&self) -> About<'_>;
}

/// What every mark says of itself.
pub struct About<'a> {
    schema: &'a str,
    vm: &'a VmName,
    boot_id: &'a str,
    qemu: ProcessKey,
}

impl Mark for Detached {
    const SUFFIX: &'static str = "detached";
    const SCHEMA: &'static str = "qmpin.detached/1";

    fn about(&self) -> About<'_> {
        About { schema: &self.schema, vm: &self.vm, boot_id: &self.boot_id, qemu: self.qemu }
    }
}

impl Mark for Reloaded {
    const SUFFIX: &'static str = "reloaded";
    const SCHEMA: &'static str = "qmpin.reloaded/1";

    fn about(&self) -> About<'_> {
        About { schema: &self.schema, vm: &self.vm, boot_id: &self.boot_id, qemu: self.qemu }
    }
}

impl Mark for Waiting {
    const SUFFIX: &'static str = "waiting";
    const SCHEMA: &'static str = "qmpin.waiting/1";

    fn about(&self) -> About<'_> {
        About { schema: &self.schema, vm: &self.vm, boot_id: &self.boot_id, qemu: self.qemu }
    }
}

/// Returns the mark of a VM; `None`: there is none that can be understood.
#[must_use]
pub fn read_mark<M: Mark>(state: &StateDir, vm: &VmName) -> Option<M> {
    let text = read_state(&state.vm_path(vm, M::SUFFIX), BYTES_MAX).ok()?;
    let mark: M = serde_json::from_str(&text).ok()?;
    let about = mark.about();
    (about.schema == M::SCHEMA && about.vm == vm).then_some(mark)
}

/// Writes a mark, whole or not at all.
///
/// # Errors
/// The kernel's answer: the folder is not there, full, or another user's.
pub fn write_mark<M: Mark>(state: &StateDir, mark: &M) -> io::Result<()> {
    write_state(&state.vm_path(mark.about().vm, M::SUFFIX), &serde_json::to_vec(mark)?)
}

/// Notes for `qmpin reload` that a policy was read again, and the result. That it cannot be written is logged.
pub fn note_reload(
    state: &StateDir,
    vm: &VmName,
    boot_id: &str,
    qemu: ProcessKey,
    refused: Option<String>,
    later: Vec<String>,
) {
    let before: Option<Reloaded> = read_mark(state, vm);
    let mark = Reloaded {
        schema: Reloaded::SCHEMA.to_owned(),
        vm: vm.clone(),
        boot_id: boot_id.to_owned(),
        qemu,
        times: before.map_or(0, |mark| mark.times).saturating_add(1),
        refused,
        later,
    };
    if let Err(error) = write_mark(state, &mark) {
        tracing::warn!("VM {vm}: `qmpin reload` does not learn the result: {error}");
    }
}

/// Removes the mark of a VM.
///
/// # Errors
/// The kernel's answer; a mark that is not there is no error.
pub fn remove_mark<M: Mark>(state: &StateDir, vm: &VmName) -> io::Result<()> {
    if remove_state(&state.vm_path(vm, M::SUFFIX))? {
        state.tidy();
    }
    Ok(())
}

/// Returns every mark of one kind, in order of the VMs' names.
#[must_use]
pub fn all_marks<M: Mark>(state: &StateDir) -> Vec<M> {
    names::<M>(state).iter().filter_map(|vm| read_mark(state, vm)).collect()
}

/// Removes the marks of QEMU processes that have ended, as `lives` says, and those of an earlier boot.
pub fn sweep_marks(state: &StateDir, boot_id: &str, lives: &dyn Fn(ProcessKey) -> bool) {
    sweep::<Detached>(state, boot_id, lives);
    sweep::<Reloaded>(state, boot_id, lives);
    sweep::<Waiting>(state, boot_id, lives);
}

fn sweep<M: Mark>(state: &StateDir, boot_id: &str, lives: &dyn Fn(ProcessKey) -> bool) {
    for vm in names::<M>(state) {
        let holds = read_mark::<M>(state, &vm).is_some_and(|mark| {
            let about = mark.about();
            about.boot_id == boot_id && lives(about.qemu)
        });
        if !holds && let Err(error) = remove_mark::<M>(state, &vm) {
            let path = state.vm_path(&vm, M::SUFFIX);
            tracing::debug!("{} could not be removed: {error}", path.display());
        }
    }
}

/// The VMs that have a file of this kind, also one that cannot be understood.
fn names<M: Mark>(state: &StateDir) -> Vec<VmName> {
    state.vms_with(&[M::SUFFIX]).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::ids::{Pid, StartTicks};

    fn detached(vm: &str, boot_id: &str, pid: i32) -> Detached {
        Detached {
            schema: Detached::SCHEMA.to_owned(),
            vm: vm.parse().expect("a name"),
            boot_id: boot_id.to_owned(),
            qemu: ProcessKey { pid: Pid(pid), start: StartTicks(7) },
            since_unix_s: 1,
        }
    }

    #[test]
    fn marks_of_processes_that_have_ended_are_swept_and_others_stay() {
        let dir = tempfile::tempdir().expect("a folder");
        let state = StateDir::at(dir.path());
        for mark in
            [detached("100", "now", 1), detached("101", "now", 2), detached("102", "then", 1)]
        {
            write_mark(&state, &mark).expect("written");
        }
        fs::write(dir.path().join("103.detached"), "{").expect("written");
        fs::write(dir.path().join("104.lease"), "{}").expect("written");
        assert_eq!(all_marks::<Detached>(&state).len(), 3);
        sweep_marks(&state, "now", &|process| process.pid == Pid(1));
        assert_eq!(all_marks::<Detached>(&state), [detached("100", "now", 1)]);
        let mut left: Vec<String> = fs::read_dir(dir.path())
            .expect("listed")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        left.sort_unstable();
        assert_eq!(left, ["100.detached", "104.lease"]);
    }

    #[test]
    fn mark_of_another_vm_or_schema_is_none() {
        let dir = tempfile::tempdir().expect("a folder");
        let state = StateDir::at(dir.path());
        let vm = "100".parse().expect("a name");
        write_mark(&state, &detached("100", "now", 1)).expect("written");
        assert!(read_mark::<Detached>(&state, &vm).is_some());
        fs::copy(dir.path().join("100.detached"), dir.path().join("101.detached")).expect("copied");
        assert!(read_mark::<Detached>(&state, &"101".parse().expect("a name")).is_none());
        let text = fs::read_to_string(dir.path().join("100.detached")).expect("read");
        fs::write(dir.path().join("100.detached"), text.replace("detached/1", "detached/2"))
            .expect("written");
        assert!(read_mark::<Detached>(&state, &vm).is_none());
    }
}
