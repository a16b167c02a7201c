//! The first moments of a VM. A supervisor that its pid file starts is there before QEMU can be asked:
//!
//! ```text
//!   QEMU   pid file made ─▶ pid written ─▶ sockets made ─▶ asked, it answers
//!   here            └─▶ tried ─▶ tried again, while there is hope ─────▶ attached
//! ```

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::attachment::error::StartError;
use crate::attachment::found::Found;
use crate::attachment::settings::Settings;
use crate::discover::{VmError, VmLocation};
use crate::knobs::ground::Host;
use crate::qmp::Channel;

/// A pid is written in no time, once the file is there. A leftover stays a leftover.
const PID_FILE_PATIENCE: Duration = Duration::from_secs(1);
/// QEMU's sockets come before everything that takes it long, such as its memory.
const SOCKET_PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

/// [`Found::find`], again for as long as the VM may be about to be there.
///
/// # Errors
/// [`StartError`]; then nothing has been written to any thread.
pub(super) async fn find(
    host: Host<'_>,
    settings: &Settings,
) -> Result<(Found, Channel), StartError> {
    let begun = Instant::now();
    loop {
        let error = match Found::find(host, settings).await {
            Err(error) => error,
            found => return found,
        };
        if begun.elapsed() >= patience(&error, &settings.location) {
            return Err(error);
        }
        tracing::debug!("not yet: {error}");
        sleep(PAUSE).await;
    }
}

fn patience(error: &StartError, location: &VmLocation) -> Duration {
    match (error, location) {
        (StartError::Vm(VmError::Process(process)), _) if process.may_be_young() => {
            PID_FILE_PATIENCE
        }
        (StartError::Vm(VmError::Qmp(qmp)), VmLocation::Proxmox { .. })
            if qmp.is_nobody_there() =>
        {
            SOCKET_PATIENCE
        }
        _ => Duration::ZERO,
    }
}
