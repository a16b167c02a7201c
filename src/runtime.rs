//! Makes tokio's runtime, or says why there can be none. tokio itself panics where it runs out of descriptors.

use std::fs::File;
use std::io;

use tokio::runtime::{Builder, Runtime};

/// The descriptors that a command needs at once: the runtime's own, signals, sockets, and a few files.
const DESCRIPTORS: usize = 16;

/// Makes a runtime of one thread.
///
/// # Errors
/// `EMFILE` where this process may open too few files; what the kernel said otherwise.
pub fn build() -> io::Result<Runtime> {
    let null = File::open("/dev/null")?;
    let spare: io::Result<Vec<File>> = (0..DESCRIPTORS).map(|_| null.try_clone()).collect();
    drop(spare?);
    Builder::new_current_thread().enable_all().build()
}

/// Whether the kernel refused because a limit of this process or of the host is reached.
#[must_use]
pub fn is_shortage(error: &io::Error) -> bool {
    use nix::libc::{EAGAIN, EMFILE, ENFILE, ENOMEM};
    matches!(error.raw_os_error(), Some(EAGAIN | EMFILE | ENFILE | ENOMEM))
}
