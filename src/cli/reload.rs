//! `qmpin reload`: has the service of a VM read its policy again (`ExecReload=` of `qmpin@.service`), and says what has
//! become of it.

use super::args::{Global, ReloadArgs};
use super::{Answer, output};
use crate::discover::is_alive;
use crate::error::{Failure, Kind};
use crate::ids::VmName;
use crate::leases::StateDir;
use crate::marks::{Waiting, read_mark};
use crate::supervise::{Answered, request_reload};
use crate::sysroot::SysRoot;
use crate::threads::ProcessKey;

pub(super) fn run(global: &Global, args: &ReloadArgs) -> Result<Answer, Failure> {
    let root = SysRoot::live();
    let state = global.state(&root);
    let vm = &args.vm;
    let Some(supervisor) = supervisor(&root, &state, vm) else {
        let failure = Failure::new(Kind::No, format!("VM {vm}: no service follows it"));
        return Err(failure.hint(format!("`systemctl start qmpin@{vm}` attaches it")));
    };
    if !is_of_systemd(&root, supervisor) {
        let pid = supervisor.pid;
        let message =
            format!("VM {vm}: process {pid} was attached by hand and reads no policy again");
        let hint = format!("`qmpin detach {vm}`, then attach it again");
        return Err(Failure::new(Kind::No, message).hint(hint));
    }
    let asked = request_reload(&root, &state, vm, supervisor);
    match asked.map_err(|error| Failure::new(Kind::Permission, error))? {
        Answered::Done(mark) => {
            if let Some(why) = mark.refused {
                let message = format!("VM {vm}: the policy before stays in force: {why}");
                return Err(Failure::new(Kind::Usage, message));
            }
            output::text(&format!("VM {vm}: its policy was read again\n"))?;
            for key in mark.later {
                output::text(&format!("VM {vm}: takes effect at the next attach: {key}\n"))?;
            }
            Ok(Answer::Done)
        }
        Answered::Ended => {
            Err(Failure::new(Kind::No, format!("VM {vm}: its supervisor has ended")))
        }
        Answered::Late => Err(Failure::new(
            Kind::Partial,
            format!("VM {vm}: process {} has not read its policy yet", supervisor.pid),
        )),
    }
}

/// The process that follows the VM, or waits to.
fn supervisor(root: &SysRoot, state: &StateDir, vm: &VmName) -> Option<ProcessKey> {
    let leased = state.lease(vm).ok().flatten().and_then(|lease| lease.supervisor);
    let waiting = read_mark::<Waiting>(state, vm).map(|mark| mark.supervisor);
    let all = state.supervisor(vm).into_iter().chain(leased).chain(waiting);
    all.into_iter().find(|process| is_alive(root, *process))
}

/// Whether systemd has started this process, so that SIGHUP does not end it.
fn is_of_systemd(root: &SysRoot, process: ProcessKey) -> bool {
    let environment = root.read_lossy(&format!("proc/{}/environ", process.pid));
    let wanted = format!("SYSTEMD_EXEC_PID={}", process.pid);
    environment.is_ok_and(|text| text.split('\0').any(|variable| variable == wanted))
}
