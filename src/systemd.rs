//! systemd over D-Bus: a unit's properties, and the reload. Thin: it decides nothing.
//!
//! Every call has a limit, and all share one connection (`bus`).

mod bus;
#[cfg(test)]
pub(crate) mod fake;

pub(crate) use bus::SYSTEM;

use std::time::Duration;

use zbus::zvariant::{OwnedObjectPath, OwnedValue, Value};
use zbus::{Connection, Message};

use crate::cpuset::CpuSet;
use crate::ids::{CPUS_MAX, CpuId};

/// How long one question may take.
const CALL_LIMIT: Duration = Duration::from_secs(20);
/// How long a reload may take: seconds, on a host with many units.
const RELOAD_LIMIT: Duration = Duration::from_secs(90);

const SYSTEMD: &str = "org.freedesktop.systemd1";
const MANAGER_PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";

/// What systemd says of a unit with a cgroup.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct UnitState {
    /// Its cgroup, as `/qemu.slice/100.scope`; empty where it has none now.
    pub control_group: String,
    /// The controllers that are its own to use below its cgroup (`Delegate=`).
    pub delegated: Vec<String>,
    /// The CPUs it was limited to (`AllowedCPUs=`); none where it was not.
    pub allowed_cpus: CpuSet,
}

/// Why systemd could not be asked, or said no.
#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    /// It is not to be reached.
    #[error("could not reach systemd over the system bus")]
    Reach(#[source] Box<zbus::Error>),
    /// It said no.
    #[error("systemd would not {what}")]
    Refused {
        /// What was asked for.
        what: String,
        /// What it said.
        #[source]
        source: Box<zbus::Error>,
    },
    /// It has not answered in time.
    #[error("systemd did not {what} within {} s", limit.as_secs())]
    Late {
        /// What was asked for.
        what: String,
        /// How long it had.
        limit: Duration,
    },
    /// There can be no thread to ask from.
    #[error("could not start a thread to ask systemd from")]
    Thread(#[source] std::io::Error),
    /// The unit is not loaded.
    #[error("systemd knows no unit {unit}")]
    NoSuchUnit {
        /// Which one.
        unit: String,
    },
    /// The name is not one of a unit with a cgroup.
    #[error("{unit} is neither a scope nor a service nor a slice")]
    NotAUnit {
        /// What was given.
        unit: String,
    },
}

/// What is asked of systemd.
pub trait Units {
    /// What it says of a scope, service or slice.
    ///
    /// # Errors
    /// [`SystemdError`].
    fn state(&self, unit: &str) -> Result<UnitState, SystemdError>;

    /// Sets `AllowedCPUs=` until the next boot; the empty set lifts the limit.
    ///
    /// # Errors
    /// [`SystemdError`].
    fn set_allowed_cpus(&self, unit: &str, cpus: &CpuSet) -> Result<(), SystemdError>;

    /// Has systemd look again which controllers a slice and those above it need: it enables them at once
    /// and takes them back only when it comes by. Returns when that is done.
    ///
    /// # Errors
    /// [`SystemdError`].
    fn realize(&self, slice: &str) -> Result<(), SystemdError>;

    /// The names of units that are in this state, such as `active`, and match a pattern, such as `qmpin@*.path`.
    ///
    /// # Errors
    /// [`SystemdError`].
    fn listed(&self, state: &str, pattern: &str) -> Result<Vec<String>, SystemdError>;

    /// Has a unit started, and does not wait for that.
    ///
    /// # Errors
    /// [`SystemdError`].
    fn start(&self, unit: &str) -> Result<(), SystemdError>;

    /// Reads all unit files again; returns when that is done. [`crate::services::reload`] does more.
    ///
    /// # Errors
    /// [`SystemdError`].
    fn reload(&self) -> Result<(), SystemdError>;
}

/// systemd as PID 1, over the system bus.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemBus;

impl Units for SystemBus {
    fn state(&self, unit: &str) -> Result<UnitState, SystemdError> {
        let what = format!("tell the state of {unit}");
        let interface = interface(unit)?;
        SYSTEM
            .ask(&what, CALL_LIMIT, async |bus| {
                let path = &loaded(bus, unit).await?;
                let control_group = property(bus, path, interface, "ControlGroup").await?;
                let delegates = property(bus, path, interface, "Delegate").await?;
                let controllers = property(bus, path, interface, "DelegateControllers").await?;
                let allowed: Vec<u8> = property(bus, path, interface, "AllowedCPUs").await?;
                Ok(UnitState {
                    control_group,
                    delegated: if delegates { controllers } else { Vec::new() },
                    allowed_cpus: from_bytes(&allowed),
                })
            })
            .map_err(|error| no_such_unit(error, unit))
    }

    fn set_allowed_cpus(&self, unit: &str, cpus: &CpuSet) -> Result<(), SystemdError> {
        let what = if cpus.is_empty() {
            format!("lift AllowedCPUs of {unit}")
        } else {
            format!("set AllowedCPUs={cpus} of {unit}")
        };
        let bytes = to_bytes(cpus);
        SYSTEM
            .ask(&what, CALL_LIMIT, async |bus| {
                // (name, runtime, properties): `man 5 org.freedesktop.systemd1`.
                let body = (unit, true, vec![("AllowedCPUs", Value::from(bytes.clone()))]);
                call(bus, "SetUnitProperties", &body).await.map(drop)
            })
            .map_err(|error| no_such_unit(error, unit))
    }

    fn realize(&self, slice: &str) -> Result<(), SystemdError> {
        let what = format!("update the controllers of {slice}");
        SYSTEM
            .ask(&what, CALL_LIMIT, async |bus| {
                // Setting any property does (`bus_slice_commit_properties`, `src/core/dbus-slice.c`); no
                // markers are set, and alone of all properties they are written to no file.
                let body = (slice, true, vec![("Markers", Value::from(Vec::<String>::new()))]);
                call(bus, "SetUnitProperties", &body).await?;
                // The slices are queued, and the queue is empty before the next question is read.
                loaded(bus, slice).await.map(drop)
            })
            .map_err(|error| no_such_unit(error, slice))
    }

    fn listed(&self, state: &str, pattern: &str) -> Result<Vec<String>, SystemdError> {
        SYSTEM.ask(&format!("list {pattern}"), CALL_LIMIT, async |bus| {
            list_units(bus, &[state], pattern).await
        })
    }

    fn start(&self, unit: &str) -> Result<(), SystemdError> {
        SYSTEM.ask(&format!("start {unit}"), CALL_LIMIT, async |bus| {
            call(bus, "StartUnit", &(unit, "replace")).await.map(drop)
        })
    }

    fn reload(&self) -> Result<(), SystemdError> {
        SYSTEM.ask("reload its unit files", RELOAD_LIMIT, async |bus| {
            call(bus, "Reload", &()).await.map(drop)
        })
    }
}

/// Name, description, load state, active state, sub state, followed unit, path; number, type and path of its job.
type ListedUnit =
    (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

/// The names of units that are in one of these states and match a pattern.
pub(crate) async fn list_units(
    bus: &Connection,
    states: &[&str],
    pattern: &str,
) -> zbus::Result<Vec<String>> {
    let body = (states, vec![pattern]);
    let found = call(bus, "ListUnitsByPatterns", &body).await?;
    let units: Vec<ListedUnit> = found.body().deserialize()?;
    Ok(units.into_iter().map(|unit| unit.0).collect())
}

/// Calls a method of the manager.
pub(crate) async fn call<B>(bus: &Connection, method: &str, body: &B) -> zbus::Result<Message>
where
    B: serde::Serialize + zbus::zvariant::DynamicType,
{
    bus.call_method(Some(SYSTEMD), MANAGER_PATH, Some(MANAGER), method, body).await
}

/// Returns the object of a unit that is loaded.
pub(crate) async fn loaded(bus: &Connection, unit: &str) -> zbus::Result<OwnedObjectPath> {
    call(bus, "GetUnit", &(unit,)).await?.body().deserialize()
}

/// Returns a property of a unit.
pub(crate) async fn property<T>(
    bus: &Connection,
    unit: &OwnedObjectPath,
    interface: &str,
    name: &str,
) -> zbus::Result<T>
where
    T: TryFrom<OwnedValue, Error = zbus::zvariant::Error>,
{
    let (path, body) = (unit.as_str(), (interface, name));
    let answer = bus.call_method(Some(SYSTEMD), path, Some(PROPERTIES), "Get", &body).await?;
    Ok(T::try_from(answer.body().deserialize::<OwnedValue>()?)?)
}

/// The interface that has a unit's cgroup properties.
fn interface(unit: &str) -> Result<&'static str, SystemdError> {
    match unit.rsplit_once('.') {
        Some((_, "scope")) => Ok("org.freedesktop.systemd1.Scope"),
        Some((_, "service")) => Ok("org.freedesktop.systemd1.Service"),
        Some((_, "slice")) => Ok("org.freedesktop.systemd1.Slice"),
        _ => Err(SystemdError::NotAUnit { unit: unit.to_owned() }),
    }
}

pub(crate) fn no_such_unit(error: SystemdError, unit: &str) -> SystemdError {
    match error {
        SystemdError::Refused { ref source, .. } if matches!(&**source, zbus::Error::MethodError(name, ..) if *name == NO_SUCH_UNIT) => {
            SystemdError::NoSuchUnit { unit: unit.to_owned() }
        }
        error => error,
    }
}

/// A CPU is a bit; the first byte has CPUs 0 to 7, the lowest bit CPU 0.
fn to_bytes(cpus: &CpuSet) -> Vec<u8> {
    let mut bytes = Vec::new();
    for cpu in cpus.iter() {
        let (at, bit) = (cpu.index() / 8, cpu.index() % 8);
        if bytes.len() <= at {
            bytes.resize(at + 1, 0);
        }
        bytes[at] |= 1 << bit;
    }
    bytes
}

fn from_bytes(bytes: &[u8]) -> CpuSet {
    let is_set = |cpu: &usize| bytes.get(cpu / 8).is_some_and(|byte| byte & (1 << (cpu % 8)) != 0);
    let count = (bytes.len() * 8).min(CPUS_MAX);
    (0..count).filter(is_set).filter_map(CpuId::from_index).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_of_cpus_survives_the_bus() {
        for text in ["", "0", "7-8", "0-23", "12-19,63,64"] {
            let cpus = CpuSet::parse_cpulist(text).expect("a cpulist");
            assert_eq!(from_bytes(&to_bytes(&cpus)), cpus, "{text}");
        }
        assert_eq!(to_bytes(&CpuSet::parse_cpulist("0,9").expect("a cpulist")), [1, 2]);
    }

    #[test]
    fn only_units_with_a_cgroup_are_asked_about() {
        for unit in ["100.scope", "vm.service", "-.slice"] {
            assert!(interface(unit).is_ok(), "{unit}");
        }
        assert!(interface("run.mount").is_err() && interface("scope").is_err());
    }
}
