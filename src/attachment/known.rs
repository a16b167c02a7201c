//! What an attachment knows of its VM from beginning to end.

use super::settings::Settings;
use crate::knobs::ground::{Ground, Host};
use crate::threads::ProcessKey;

/// What does not change as long as the VM is attached.
pub(crate) struct Known<'a> {
    pub(super) host: Host<'a>,
    pub(super) settings: Settings,
    pub(super) boot_id: String,
    pub(super) process: ProcessKey,
}

impl Known<'_> {
    pub(super) fn ground(&self) -> Ground<'_> {
        let Known { host, settings: Settings { state, vm, .. }, boot_id, process } = self;
        Ground { host: *host, state, vm, boot_id, process: *process }
    }
}
