//! The systemd services that run qmpin, over D-Bus: which service a process belongs to, whether it runs, how to stop
//! it. Thin: it decides nothing. Every call has a limit, because a command must not hang with systemd.

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use zbus::Connection;
use zbus::zvariant::OwnedObjectPath;

use crate::error::chain;
use crate::ids::{Pid, VmName};
use crate::sysroot::SysRoot;
use crate::systemd::{
    SYSTEM, SystemdError, Units, call, list_units, loaded, no_such_unit, property,
};

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

/// The services and path units of all VMs.
const SERVICES: &str = "qmpin@*.service";
pub(crate) const PATHS: &str = "qmpin@*.path";

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
    SYSTEM.ask(&what, CALL_LIMIT, async |bus| {
        let path = match call(bus, "GetUnitByPID", &(pid,)).await {
            Err(zbus::Error::MethodError(name, ..)) if NO_UNIT.contains(&name.as_str()) => {
                return Ok(None);
            }
            found => found?.body().deserialize::<OwnedObjectPath>()?,
        };
        service_at(bus, &path).await
    })
}

/// Returns the service of this name, whether it runs or not; `None`: systemd has not loaded it, so it does not run.
///
/// # Errors
/// [`SystemdError`].
pub fn service(name: &str) -> Result<Option<Service>, SystemdError> {
    describe(name, service_at).map(Option::flatten)
}

/// Returns the VMs whose service runs, starts, or is about to be started again.
///
/// # Errors
/// [`SystemdError`].
pub fn vms_with_a_service() -> Result<Vec<VmName>, SystemdError> {
    let busy = ["active", "reloading", "activating", "deactivating"];
    let names = SYSTEM.ask("list the services of VMs", CALL_LIMIT, async |bus| {
        list_units(bus, &busy, SERVICES).await
    })?;
    Ok(names.iter().filter_map(|name| vm_of(name)).collect())
}

/// Has systemd read all unit files again, and then attach VMs that started meanwhile. A path unit sees no change while
/// systemd reloads: its watches are closed and opened again, and a file that is there by then counts as one that was
/// (`path_coldplug` and `path_spec_check_good` of `src/core/path.c`).
///
/// # Errors
/// [`SystemdError`] of the reload. VMs that could not be looked for are attached by their timer, within a minute.
pub fn reload(units: &dyn Units) -> Result<(), SystemdError> {
    units.reload()?;
    if let Err(error) = start_unseen(units) {
        tracing::warn!(
            "VMs that started while systemd reloaded are attached within a minute: {}",
            chain(&error)
        );
    }
    Ok(())
}

/// Starts what attaches a VM that runs already, for each with a path unit whose service does not run and has not
/// failed.
fn start_unseen(units: &dyn Units) -> Result<(), SystemdError> {
    let idle = units.listed("inactive", SERVICES)?;
    let idle: BTreeSet<VmName> = idle.iter().filter_map(|name| vm_of(name)).collect();
    for path in units.listed("active", PATHS)? {
        let vm = path.strip_prefix("qmpin@").and_then(|name| name.strip_suffix(".path"));
        if let Some(vm) = vm.and_then(|vm| vm.parse().ok()).filter(|vm| idle.contains(vm)) {
            // Its own conditions say whether there is anything to do.
            units.start(&format!("qmpin-running@{vm}.service"))?;
        }
    }
    Ok(())
}

/// Whether a path unit starts the service of a VM when the VM starts.
///
/// # Errors
/// [`SystemdError`].
pub fn is_watched(vm: &VmName) -> Result<bool, SystemdError> {
    let state: Option<String> = describe(&format!("qmpin@{vm}.path"), async |bus, path| {
        property(bus, path, UNIT, "ActiveState").await
    })?;
    Ok(state.is_some_and(|state| state == "active"))
}

/// Asks systemd to stop a service. It does not start the service again by itself then. Returns when the job is queued.
///
/// # Errors
/// [`SystemdError`].
pub fn stop(name: &str) -> Result<(), SystemdError> {
    SYSTEM.ask(&format!("stop {name}"), CALL_LIMIT, async |bus| {
        call(bus, "StopUnit", &(name, "replace")).await.map(drop)
    })
}

/// Waits until a service has stopped; whether it has.
///
/// # Errors
/// [`SystemdError`].
pub fn wait_stopped(name: &str) -> Result<bool, SystemdError> {
    let deadline = Instant::now() + STOP_LIMIT;
    loop {
        if !matches!(service(name)?, Some(Service { activity: Activity::Busy, .. })) {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        thread::sleep(PAUSE);
    }
}

/// Asks about a unit; `None`: systemd has not loaded it.
fn describe<T>(
    name: &str,
    job: impl AsyncFnOnce(&Connection, &OwnedObjectPath) -> zbus::Result<T>,
) -> Result<Option<T>, SystemdError> {
    let found = SYSTEM.ask(&format!("describe {name}"), CALL_LIMIT, async |bus| {
        let path = loaded(bus, name).await?;
        job(bus, &path).await
    });
    match found.map_err(|error| no_such_unit(error, name)) {
        Err(SystemdError::NoSuchUnit { .. }) => Ok(None),
        found => found.map(Some),
    }
}

async fn service_at(bus: &Connection, path: &OwnedObjectPath) -> zbus::Result<Option<Service>> {
    let name: String = property(bus, path, UNIT, "Id").await?;
    if !name.ends_with(".service") {
        return Ok(None);
    }
    let state: String = property(bus, path, UNIT, "ActiveState").await?;
    let main: u32 = property(bus, path, SERVICE, "MainPID").await?;
    let restarts = property(bus, path, SERVICE, "NRestarts").await?;
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
    use crate::systemd::fake::FakeUnits;

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

    #[test]
    fn vms_that_started_during_a_reload_are_attached_and_no_others() {
        let units = FakeUnits {
            listed: vec![
                ("active", "qmpin@100.path"),
                ("inactive", "qmpin@100.service"),
                // It is attached, has failed, or is not looked after.
                ("active", "qmpin@101.path"),
                ("active", "qmpin@101.service"),
                ("active", "qmpin@102.path"),
                ("failed", "qmpin@102.service"),
                ("inactive", "qmpin@103.path"),
                ("inactive", "qmpin@103.service"),
                ("inactive", "qmpin-sweep.service"),
            ],
            ..FakeUnits::default()
        };
        reload(&units).expect("reloaded");
        assert_eq!(*units.log.borrow(), ["reload", "start qmpin-running@100.service"]);
    }
}
