//! `/run/qmpin/<vm>.standing`: what a supervisor reports about a VM that no file of the kernel's
//! says. Written for `qmpin status`; nothing depends on it.

use std::io;

use serde::Serialize;
use serde_json::Value;

use crate::ids::VmName;
use crate::leases::StateDir;
use crate::plan::Finding;
use crate::qmp::ChannelKind;
use crate::state_file::{read_state, version_of, write_state};

/// The schema of the file.
pub const STANDING_SCHEMA: &str = "qmpin.standing/1";

const SUFFIX: &str = "standing";

/// The longest one that is read.
const BYTES_MAX: u64 = 1 << 20;

/// What a supervisor reports.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Standing {
    /// [`STANDING_SCHEMA`].
    pub schema: String,
    /// How QEMU is asked; `None`: in a way that this version does not know.
    pub channel: Option<ChannelKind>,
    /// How many times a thread was found moved externally; `None`: no process follows the VM.
    pub drift_total: Option<u64>,
    /// What the kernel would not do, in sentences.
    pub refused: Vec<String>,
    /// What of the plan in force falls short, as `qmpin plan` would print it.
    pub findings: Vec<Finding>,
}

/// What the supervisor of a VM has reported last; `None`: nothing that can be read.
#[must_use]
pub fn read_standing(state: &StateDir, vm: &VmName) -> Option<Standing> {
    let text = read_state(&state.vm_path(vm, SUFFIX), BYTES_MAX).ok()?;
    parse(&text)
}

/// Reads what this version or a later one has written. A member that is not understood is as if it were not there.
fn parse(text: &str) -> Option<Standing> {
    let value: Value = serde_json::from_str(text).ok()?;
    version_of(value.get("schema")?.as_str()?, STANDING_SCHEMA)?;
    let channel = value.get("channel").cloned().and_then(|name| serde_json::from_value(name).ok());
    let refused = value.get("refused").cloned();
    let findings = value.get("findings").and_then(Value::as_array).into_iter().flatten().cloned();
    Some(Standing {
        schema: STANDING_SCHEMA.to_owned(),
        channel,
        drift_total: value.get("drift_total").and_then(Value::as_u64),
        refused: refused.and_then(|lines| serde_json::from_value(lines).ok()).unwrap_or_default(),
        findings: findings.filter_map(|one| serde_json::from_value(one).ok()).collect(),
    })
}

/// Tells, whole or not at all.
///
/// # Errors
/// What the kernel said: the state folder is full or gone.
pub fn write_standing(state: &StateDir, vm: &VmName, standing: &Standing) -> io::Result<()> {
    write_state(&state.vm_path(vm, SUFFIX), &serde_json::to_vec(standing)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OF_0_1_0: &str = include_str!("../tests/fixtures/state-0.1.0/strict/100.standing");

    #[test]
    fn what_another_version_wrote_is_read_as_far_as_it_is_known() {
        let standing = parse(OF_0_1_0).expect("a standing");
        assert_eq!((standing.channel, standing.drift_total), (Some(ChannelKind::Lease), Some(4)));
        let later = OF_0_1_0.replace("standing/1", "standing/2").replace("lease", "io_uring");
        let later = parse(&later.replace("\"refused\":[]", "\"refused\":[\"x\"],\"ways\":{}"));
        let later = later.expect("a standing");
        assert_eq!((later.channel, later.drift_total), (None, Some(4)));
        assert_eq!(later.refused, ["x"]);
        for other in
            ["", "{}", "[]", "{\"schema\":\"qmpin.lease/1\"}", "{\"schema\":\"qmpin.standing/0\"}"]
        {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
