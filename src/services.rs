//! The systemd services that run qmpin, over D-Bus: which service a process belongs to, whether it runs, how to stop
//! it. Thin: it decides nothing. Every call has a limit, because a command must not hang with systemd.

use std::thread;
use std::time::{Duration, Instant};

use zbus::Connection;
use zbus::zvariant::{OwnedObjectPath, OwnedValue};

use crate::ids::{Pid, VmName};
use crate::sysroot::SysRoot;
use crate::systemd::{MANAGER, MANAGER_PATH, PROPERTIES, SystemdError, ask, call, no_such_unit};

/// How long systemd may take for one answer. A command of a user waits for it.
const CALL_LIMIT: Duration = Duration::from_secs(3);
/// How long a service may take to end after its main process has ended: `ExecStopPost=` restores again.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Between two questions whether a service has ended.
const PAUSE: Duration = Duration::from_millis(50);

const UNIT: &str = "org.freedesktop.systemd1.Unit";
const SERVICE: &str = "org.freedesktop.systemd1.Service";
/// The method's error where a process is in no unit.
const NO_UNIT: [&str; 2] =
    ["org.freedesktop.systemd1.NoUnitForPID", "org.freedesktop.systemd1.NoSuchUnit"];

/// A service as systemd describes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// `qmpin@100.service`.
    pub name: String,
    /// Its main process; none while it has none.
    pub main: Option<Pid>,
    /// What it does now.
    pub activity: Activity,
    /// How many times systemd has started it again by itself since it was last asked for.
    pub restarts: u32,
}

/// What a service does now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Activity {
    /// It runs, or starts, stops, or is about to be started again.
    Busy,
    /// It does not run, and is not about to.
    Idle,
    /// The same, after a failure.
    Failed,
}

/// The service that the package has for a VM.
#[must_use]
pub fn service_name(vm: &VmName) -> String {
    format!("qmpin@{vm}.service")
}

/// The VM of a service of that name.
fn vm_of(service: &str) -> Option<VmName> {
    service.strip_prefix("qmpin@")?.strip_suffix(".service")?.parse().ok()
}

/// Whether systemd is the service manager of this host (`man 3 sd_booted`).
#[must_use]
pub fn has_systemd(root: &SysRoot) -> bool {
    root.path("run/systemd/system").is_ok_and(|path| path.is_dir())
}

/// Returns the service that a process belongs to; `None`: it belongs to a unit of another kind, or to no unit.
///
/// # Errors
/// [`SystemdError`].
pub fn service_of(pid: Pid) -> Result<Option<Service>, SystemdError> {
    let pid = u32::try_from(pid.0).unwrap_or(0);
    let what = format!("name the unit of process {pid}");
    let found = ask(&what, CALL_LIMIT, async |bus| {
        let path = match call(bus, MANAGER_PATH, MANAGER, "GetUnitByPID", &(pid,)).await {
            Err(zbus::Error::MethodError(name, ..)) if NO_UNIT.contains(&name.as_str()) => {
                return Ok(None);
            }
            found => found?.body().deserialize::<OwnedObjectPath>()?,
        };
        service_at(bus, &path).await
    })?;
    Ok(found)
}

/// Returns the service of this name, whether it runs or not; `None`: systemd has not loaded it, so it does not run.
///
/// # Errors
/// [`SystemdError`].
pub fn service(name: &str) -> Result<Option<Service>, SystemdError> {
    let what = format!("describe {name}");
    let found = ask(&what, CALL_LIMIT, async |bus| {
        let found = call(bus, MANAGER_PATH, MANAGER, "GetUnit", &(name,)).await?;
        let path = found.body().deserialize::<OwnedObjectPath>()?;
        service_at(bus, &path).await
    });
    match found.map_err(|error| no_such_unit(error, name)) {
        Err(SystemdError::NoSuchUnit { .. }) => Ok(None),
        found => found,
    }
}

/// Returns the VMs whose service runs, starts, or is about to be started again.
///
/// # Errors
/// [`SystemdError`].
pub fn vms_with_a_service() -> Result<Vec<VmName>, SystemdError> {
    /// A row of `ListUnitsByPatterns`: name, description, load, active and sub state, followed unit, path, job number,
    /// type and path.
    type Row = (
        String,
        String,
        String,
        String,
        String,
        String,
        OwnedObjectPath,
        u32,
        String,
        OwnedObjectPath,
    );
    let busy = vec!["active", "reloading", "activating", "deactivating"];
    let rows: Vec<Row> = ask("list the services of VMs", CALL_LIMIT, async |bus| {
        let body = (busy.clone(), vec!["qmpin@*.service"]);
        let answer = call(bus, MANAGER_PATH, MANAGER, "ListUnitsByPatterns", &body).await?;
        answer.body().deserialize()
    })?;
    Ok(rows.iter().filter_map(|row| vm_of(&row.0)).collect())
}

/// Whether a path unit starts the service of a VM when the VM starts.
///
/// # Errors
/// [`SystemdError`].
pub fn is_watched(vm: &VmName) -> Result<bool, SystemdError> {
    let name = format!("qmpin@{vm}.path");
    let state = ask(&format!("describe {name}"), CALL_LIMIT, async |bus| {
        let found = call(bus, MANAGER_PATH, MANAGER, "GetUnit", &(&name,)).await?;
        let path = found.body().deserialize::<OwnedObjectPath>()?;
        get(bus, &path, UNIT, "ActiveState").await.and_then(|state| Ok(String::try_from(state)?))
    });
    match state.map_err(|error| no_such_unit(error, &name)) {
        Err(SystemdError::NoSuchUnit { .. }) => Ok(false),
        state => state.map(|state| state == "active"),
    }
}

/// Asks systemd to stop a service. It does not start the service again by itself then. Returns when the job is queued.
///
/// # Errors
/// [`SystemdError`].
pub fn stop(name: &str) -> Result<(), SystemdError> {
    ask(&format!("stop {name}"), CALL_LIMIT, async |bus| {
        call(bus, MANAGER_PATH, MANAGER, "StopUnit", &(name, "replace")).await.map(drop)
    })
}

/// Waits until a service has stopped; whether it has.
///
/// # Errors
/// [`SystemdError`].
pub fn wait_stopped(name: &str) -> Result<bool, SystemdError> {
    let deadline = Instant::now() + STOP_LIMIT;
    loop {
        match service(name)? {
            Some(Service { activity: Activity::Busy, .. }) => {}
            _ => return Ok(true),
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        thread::sleep(PAUSE);
    }
}

async fn get(
    bus: &Connection,
    path: &OwnedObjectPath,
    interface: &str,
    name: &str,
) -> zbus::Result<OwnedValue> {
    let answer = call(bus, path.as_str(), PROPERTIES, "Get", &(interface, name)).await;
    answer?.body().deserialize()
}

async fn service_at(bus: &Connection, path: &OwnedObjectPath) -> zbus::Result<Option<Service>> {
    let name = String::try_from(get(bus, path, UNIT, "Id").await?)?;
    if !name.ends_with(".service") {
        return Ok(None);
    }
    let state = String::try_from(get(bus, path, UNIT, "ActiveState").await?)?;
    let main = u32::try_from(get(bus, path, SERVICE, "MainPID").await?)?;
    let restarts = u32::try_from(get(bus, path, SERVICE, "NRestarts").await?)?;
    Ok(Some(Service {
        name,
        main: i32::try_from(main).ok().filter(|pid| *pid > 0).map(Pid),
        activity: match state.as_str() {
            "inactive" => Activity::Idle,
            "failed" => Activity::Failed,
            _ => Activity::Busy,
        },
        restarts,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_of_a_vm_is_named_after_it() {
        for name in ["100", "win11", "a.b_c-d"] {
            let vm: VmName = name.parse().expect("a name");
            assert_eq!(vm_of(&service_name(&vm)), Some(vm));
        }
        for other in ["qmpin-sweep.service", "qmpin@.service", "qmpin@100.path", "ssh.service"] {
            assert_eq!(vm_of(other), None, "{other}");
        }
    }
}
