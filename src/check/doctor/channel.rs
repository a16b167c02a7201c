//! `channel`: how QEMU is asked.

use super::advice::{Advice, costs, fine};
use super::args_line::{QemuOption, WhenThere};
use super::facts::{Asked, VmFacts};

/// Judges how QEMU is asked, and returns the option that gives qmpin a socket of its own.
pub(super) fn channel(vm: &VmFacts<'_>, asked: Asked) -> (Advice, Option<QemuOption>) {
    let name = vm.vm;
    if asked == Asked::Alone {
        let reason = "QEMU is queried over a socket that no other client needs";
        return (fine("channel", reason), None);
    }
    let reason = format!(
        "QEMU is asked by visits of {name}.qmp, a few ms each, which Proxmox needs, too (from QEMU 11.1 on there is \
         another way, once it is attached)"
    );
    let value = format!("unix:/run/qemu-server/{name}.qmpin,server=on,wait=off");
    let socket = QemuOption { name: "-qmp", value, when_there: WhenThere::Add };
    (costs("channel", reason, None), Some(socket))
}
