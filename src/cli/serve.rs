//! Follows a VM. As a service it also waits where the VM cannot be attached now, and goes on with a VM that is started
//! anew.

use super::Answer;
use crate::attachment::restored::restore_lines;
use crate::attachment::settings::Settings;
use crate::discover::{VmLocation, proxmox_process};
use crate::error::{Failure, chain};
use crate::knobs::ground::Host;
use crate::marks::{Reloaded, remove_mark};
use crate::policy::Policy;
use crate::qmp::Limits;
use crate::supervise::{Ended, Ending, Patience, PolicySource, Supervisor};
use crate::sysroot::SysRoot;

pub(super) fn serve(
    host: Host<'_>,
    source: PolicySource<'_>,
    mut settings: Settings,
    is_service: bool,
    limits: &dyn Fn(&Policy) -> Limits,
) -> Result<Answer, Failure> {
    let mut supervisor = Supervisor::new(host, source)?;
    let mut patience = Patience::default();
    loop {
        let followed = supervisor.follow(&settings);
        let (why, answer) = match followed {
            Ok(ended) => {
                patience = Patience::default();
                (ended.why, answer(&settings, &ended))
            }
            Err(error) if is_service => {
                match supervisor.wait(&mut settings, error, &mut patience)? {
                    None => {
                        settings.limits = limits(&settings.policy);
                        continue;
                    }
                    Some(why) => {
                        forget_reload(&settings);
                        (why, Answer::Done)
                    }
                }
            }
            Err(error) => return Err(error.into()),
        };
        let goes_on = is_service && why == Ending::QemuEnded;
        if !goes_on || !is_started_anew(host.root, &settings) {
            return Ok(answer);
        }
        tracing::info!("VM {} has been started anew", settings.vm);
        settings.policy = (source.read)()?;
        settings.limits = limits(&settings.policy);
    }
}

/// Logs what was restored.
fn answer(settings: &Settings, ended: &Ended) -> Answer {
    forget_reload(settings);
    let vm = &settings.vm;
    let Some(restored) = &ended.restored else { return Answer::Done };
    for line in restore_lines(vm, restored) {
        tracing::info!("{line}");
    }
    if restored.is_complete() { Answer::Done } else { Answer::Partly }
}

fn forget_reload(settings: &Settings) {
    let Settings { state, vm, .. } = settings;
    if let Err(error) = remove_mark::<Reloaded>(state, vm) {
        tracing::debug!("VM {vm}: the mark of its last reload stays: {}", chain(&error));
    }
}

/// Whether the VM, whose QEMU has ended, has another one by now. While its end was restored, systemd took a start of
/// this service for done, since it was running.
fn is_started_anew(root: &SysRoot, settings: &Settings) -> bool {
    match &settings.location {
        VmLocation::Proxmox { dir } => proxmox_process(root, dir, &settings.vm).is_ok(),
        VmLocation::Socket { .. } => false,
    }
}
