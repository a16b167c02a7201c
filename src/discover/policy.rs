//! Reads the policy files: `qmpin.toml`, then `<vm>.toml`. A file that is not there says nothing.

use std::io;
use std::path::{Path, PathBuf};

use crate::ids::VmName;
use crate::policy::{FileKind, Fragment, PolicyError};
use crate::sysroot::read_bounded;

/// The longest policy file read. A policy is a page of text; a larger file is a mistake.
const FILE_BYTES_MAX: u64 = 256 << 10;

/// Why the policy could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum PolicyFileError {
    /// The file is there and cannot be read.
    #[error("could not read the policy {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file was read and refused.
    #[error(transparent)]
    Refused(#[from] PolicyError),
}

/// The fragments of the files in `dir`, the host's first.
///
/// # Errors
/// [`PolicyFileError`], with file, line and reason.
pub fn load_policy(dir: &Path, vm: Option<&VmName>) -> Result<Vec<Fragment>, PolicyFileError> {
    let mut fragments = Vec::new();
    let host = (dir.join("qmpin.toml"), FileKind::Host);
    let vm = vm.map(|vm| (dir.join(format!("{vm}.toml")), FileKind::Vm));
    for (path, kind) in std::iter::once(host).chain(vm) {
        match read_bounded(&path, FILE_BYTES_MAX) {
            Ok(text) => fragments.push(Fragment::parse(&text, &path, kind)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(PolicyFileError::Read { path, source }),
        }
    }
    Ok(fragments)
}
