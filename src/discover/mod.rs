//! *discover*: reads the host into values that do not change under the planner's hands.
//!
//! Called by every command. It decides nothing: a file that says something is written down, a file
//! that does not is *unknown, with the reason*; only what nothing can be done without is an error.

pub mod cgroup;
mod config_memory;
pub mod cpusets;
mod declared;
pub mod devices;
mod doubt;
mod enabled;
mod grips;
mod holder;
pub(crate) mod host;
pub(crate) mod memory;
mod namespaces;
mod occupants;
mod peer;
mod policy;
pub(crate) mod process;
mod promises;
mod proxmox_config;
pub(crate) mod stat;
pub mod tasks;
pub mod topology;
mod vm;

use std::path::PathBuf;

use crate::cpuset::ParseCpuListError;
use crate::sysroot::ReadError;

pub(crate) use config_memory::VCPUS_MAX;
pub use config_memory::{ConfigNode, config_nodes, has_iothread, memory_mib};
pub use declared::{declared_devices, declared_guest};
pub use doubt::{Doubt, doubt_of};
pub use enabled::enabled_vms;
pub use grips::Grips;
pub use holder::unlinked_holder;
pub use host::{
    all_leases, boot_id, doubts, isolcpus, live_leases, live_leases_and_doubts, online_cpus,
    present_cpus, rt_throttling, way_beside_supervisor,
};
pub use memory::HugeShare;
pub use namespaces::in_our_numbers;
pub use occupants::{Occupant, OccupantKind, OwnMask, occupants, with_own_masks};
pub use peer::prove_peer;
pub use policy::{PolicyDirs, PolicyFileError};
pub use process::{ProcessError, VmLocation, is_alive, lives, process_key, proxmox_process};
pub(crate) use process::{children_of, pidfd_of};
pub use promises::{Known, promises};
pub use proxmox_config::{ProxmoxConfig, proxmox_config, proxmox_config_path};
pub use topology::{read_topology, read_topology_aside};
pub use vm::{FirstWay, Target, VmError, VmView, channel_paths, guest, read_vm};

/// What stops discovery: without it there is nothing to plan with.
#[derive(Debug, thiserror::Error)]
pub enum DiscoverError {
    /// The list of online CPUs could not be read.
    #[error("could not learn which CPUs are online")]
    OnlineUnreadable(#[source] ReadError),
    /// The list of online CPUs was read and makes no sense.
    #[error("could not understand the list of online CPUs in {}", path.display())]
    OnlineGarbled {
        /// The full path, root included.
        path: PathBuf,
        /// The part that is wrong.
        #[source]
        source: ParseCpuListError,
    },
    /// The list of online CPUs is empty, on a machine that runs this.
    #[error("{} lists no CPU", path.display())]
    OnlineEmpty {
        /// The full path, root included.
        path: PathBuf,
    },
}
