//! `/run/qmpin/<vm>.standing`: what a supervisor has to tell about a VM that no file of the kernel's
//! says. Written for `qmpin status`; nothing depends on it.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ids::VmName;
use crate::leases::StateDir;
use crate::qmp::ChannelKind;
use crate::state_file::{FolderLink, folder_of, read_state};

/// The schema of the file.
pub const STANDING_SCHEMA: &str = "qmpin.standing/1";

/// The longest one that is read.
const BYTES_MAX: u64 = 1 << 20;

/// What a supervisor has to tell.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Standing {
    /// [`STANDING_SCHEMA`].
    pub schema: String,
    /// How QEMU is asked.
    pub channel: ChannelKind,
    /// How many times a thread was found moved by somebody else.
    pub drift_total: u64,
    /// What the kernel would not do, in sentences.
    pub refused: Vec<String>,
}

fn path(state: &StateDir, vm: &VmName) -> PathBuf {
    state.path().join(format!("{vm}.standing"))
}

/// What the supervisor of a VM has told last; `None`: nothing that can be read.
#[must_use]
pub fn read_standing(state: &StateDir, vm: &VmName) -> Option<Standing> {
    let text = read_state(&path(state, vm), BYTES_MAX).ok()?;
    serde_json::from_str(&text)
        .ok()
        .filter(|standing: &Standing| standing.schema == STANDING_SCHEMA)
}

/// Tells, whole or not at all.
///
/// # Errors
/// What the kernel said: the state folder is full or gone.
pub fn write_standing(state: &StateDir, vm: &VmName, standing: &Standing) -> io::Result<()> {
    let text = serde_json::to_vec(standing)?;
    let path = path(state, vm);
    let (folder, name) = folder_of(&path, FolderLink::Refuse)?;
    folder.replace(name, &text, 0o644)
}
