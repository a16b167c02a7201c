//! The greeting: what QEMU says first.

use serde::{Deserialize, Serialize};

use super::error::excerpt;

/// What QEMU says of itself (`docs/interop/qmp-spec.rst`). For display; nothing depends on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Greeting {
    /// Major, minor and micro version, where the greeting has them.
    pub version: Option<(u32, u32, u32)>,
    /// The package's own version text.
    pub package: String,
    /// Capabilities on offer. Proxmox offers none, QEMU itself `oob`.
    pub capabilities: Vec<String>,
}

/// Reads a greeting's line.
pub(super) fn read_greeting(line: &[u8]) -> Greeting {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Wrapper {
        #[serde(rename = "QMP")]
        qmp: Body,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Body {
        version: Version,
        capabilities: Vec<String>,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Version {
        qemu: Option<Triple>,
        package: String,
    }
    #[derive(Deserialize)]
    struct Triple {
        major: u32,
        minor: u32,
        micro: u32,
    }
    // Nothing depends on it, so a greeting of another shape is a greeting all the same.
    let Wrapper { qmp } = serde_json::from_slice(line).unwrap_or_default();
    Greeting {
        version: qmp.version.qemu.map(|triple| (triple.major, triple.minor, triple.micro)),
        package: excerpt(qmp.version.package.as_bytes()),
        capabilities: qmp.capabilities.iter().map(|name| excerpt(name.as_bytes())).collect(),
    }
}
