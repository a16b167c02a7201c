//! `storage`: whether each disk has an iothread. Without one QEMU's main thread does its I/O, under the lock that every
//! vCPU needs for its devices (`PVE/QemuServer.pm: config_to_command`).

use super::advice::{Advice, costs, fine, info, unknown};
use super::facts::VmFacts;
use crate::discover::{ProxmoxConfig, has_iothread};
use crate::ids::VmName;
use crate::wording::{listed, shell_word};

const CHECK: &str = "storage";
/// The SCSI controller with one iothread for each disk.
const SINGLE: &str = "virtio-scsi-single";
/// What Proxmox takes without `scsihw`.
const SCSI_DEFAULT: &str = "lsi";
/// How many disks are named in a sentence.
const DISKS_MAX: usize = 4;

/// A disk: its key, such as `scsi0`, and the rest of its line.
type Disk<'a> = (String, &'a str);

/// Judges the disks of a Proxmox VM; of another VM nothing is known of them.
pub(super) fn storage(vm: &VmFacts<'_>) -> Vec<Advice> {
    let config = match &vm.config {
        None => return Vec::new(),
        Some(Err(why)) => return vec![unknown(CHECK, format!("not checked: {why}"))],
        Some(Ok(config)) => config,
    };
    let mut found = Vec::new();
    let virtio = without_iothread(config, "virtio");
    if !virtio.is_empty() {
        found.push(add(vm.vm, &virtio, None));
    }
    let scsi = without_iothread(config, "scsi");
    let kind = config.line("scsihw").unwrap_or(SCSI_DEFAULT);
    match kind {
        SINGLE if !scsi.is_empty() => found.push(add(vm.vm, &scsi, None)),
        // The same device of the guest, one for each disk.
        "virtio-scsi-pci" if has_disks(config, "scsi") => {
            let all = disks(config, "scsi");
            found.push(add(vm.vm, &all, Some(kind)));
        }
        SINGLE => {}
        _ if has_disks(config, "scsi") => {
            let reason = format!(
                "scsihw: {kind} has no iothreads, so QEMU's main thread does the I/O of {}; {SINGLE} has, and a guest \
                 without its driver does not start from it",
                named(&disks(config, "scsi"))
            );
            found.push(info(CHECK, reason, Some(format!("qm set {} --scsihw {SINGLE}", vm.vm))));
        }
        _ => {}
    }
    let slow: Vec<Disk<'_>> = ["sata", "ide"].iter().flat_map(|bus| disks(config, bus)).collect();
    if !slow.is_empty() {
        let reason = format!(
            "QEMU emulates the registers of {} in its main thread, several exits for each request; a disk of scsi with \
             {SINGLE} and iothread=1 has neither, and the guest needs its driver first",
            named(&slow)
        );
        found.push(info(CHECK, reason, None));
    }
    if found.is_empty() {
        let has = ["virtio", "scsi"].iter().any(|bus| has_disks(config, bus));
        found.push(fine(CHECK, if has { "each disk has an iothread" } else { "there is no disk" }));
    }
    found
}

/// The command that gives disks an iothread, and the controller that has them, where it is another one now.
fn add(vm: &VmName, disks: &[Disk<'_>], controller: Option<&str>) -> Advice {
    let missing: Vec<&Disk<'_>> = disks.iter().filter(|(_, text)| !has_iothread(text)).collect();
    let mut command = format!("qm set {vm}");
    if controller.is_some() {
        command.push_str(&format!(" --scsihw {SINGLE}"));
    }
    for (key, text) in missing {
        let kept = text.split(',').filter(|part| !part.starts_with("iothread="));
        let line = format!("{},iothread=1", kept.collect::<Vec<_>>().join(","));
        command.push_str(&format!(" --{key} {}", shell_word(&line)));
    }
    let why = controller.map_or(String::new(), |kind| {
        format!(
            " (scsihw: {kind} has no iothreads; with {SINGLE} each disk has a PCI path of its own)"
        )
    });
    let reason = format!(
        "QEMU's main thread does the I/O of {}{why}, under the lock that vCPUs need for their devices; with iothread=1 \
         each has a thread, which qmpin excludes from the vCPUs' CPUs; it counts from the next start on",
        named(disks)
    );
    costs(CHECK, reason, Some(command))
}

fn named(disks: &[Disk<'_>]) -> String {
    let keys: Vec<&str> = disks.iter().map(|(key, _)| key.as_str()).collect();
    listed(&keys, DISKS_MAX, ", ")
}

fn has_disks(config: &ProxmoxConfig, bus: &str) -> bool {
    !disks(config, bus).is_empty()
}

fn without_iothread<'a>(config: &'a ProxmoxConfig, bus: &'a str) -> Vec<Disk<'a>> {
    disks(config, bus).into_iter().filter(|(_, text)| !has_iothread(text)).collect()
}

/// The disks of a bus; drives with a medium that is changed are none.
fn disks<'a>(config: &'a ProxmoxConfig, bus: &'a str) -> Vec<Disk<'a>> {
    let is_disk = |text: &str| {
        let mut parts = text.split(',');
        parts.next() != Some("none") && !parts.any(|part| part == "media=cdrom")
    };
    let all = config.numbered(bus).filter(|(_, text)| is_disk(text));
    all.map(|(number, text)| (format!("{bus}{number}"), text)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::advice::Severity;
    use super::super::fixture::World;
    use super::*;

    fn of(config: &str) -> Vec<Advice> {
        World::flat(2).vm(2, Some(config), |vm| storage(vm))
    }

    #[test]
    fn a_disk_without_iothread_gets_its_own_line_with_one() {
        let single = "scsihw: virtio-scsi-single\n";
        for (config, mend) in [
            (
                format!("{single}scsi0: local-lvm:vm-100-disk-0,size=32G\n"),
                "qm set 100 --scsi0 local-lvm:vm-100-disk-0,size=32G,iothread=1",
            ),
            (
                format!("{single}scsi0: a:0,iothread=1\nscsi1: a:1,iothread=0,discard=on\n"),
                "qm set 100 --scsi1 a:1,discard=on,iothread=1",
            ),
            (
                "virtio0: a:0,serial=x;y\nvirtio1: a:1\n".to_owned(),
                "qm set 100 --virtio0 'a:0,serial=x;y,iothread=1' --virtio1 a:1,iothread=1",
            ),
            (
                "scsihw: virtio-scsi-pci\nscsi0: a:0,iothread=1\nscsi1: a:1\n".to_owned(),
                "qm set 100 --scsihw virtio-scsi-single --scsi1 a:1,iothread=1",
            ),
        ] {
            let found = of(&config);
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].severity, Severity::Costs, "{found:?}");
            assert_eq!(found[0].mend.as_deref(), Some(mend), "{config}");
        }
    }

    #[test]
    fn a_controller_that_needs_another_driver_is_a_choice() {
        for (config, kind) in
            [("scsi0: a:0\n", "lsi"), ("scsihw: megasas\nscsi0: a:0\n", "megasas")]
        {
            let found = of(config);
            assert_eq!((found.len(), found[0].severity), (1, Severity::Info), "{found:?}");
            assert!(found[0].reason.starts_with(&format!("scsihw: {kind}")), "{found:?}");
            assert_eq!(found[0].mend.as_deref(), Some("qm set 100 --scsihw virtio-scsi-single"));
        }
        let slow = of("sata0: a:0\nide0: a:1\nide2: a:iso/x.iso,media=cdrom\n");
        assert_eq!((slow.len(), slow[0].severity, &slow[0].mend), (1, Severity::Info, &None));
        assert!(slow[0].reason.contains("sata0, ide0 in"), "{slow:?}");
    }

    #[test]
    fn media_and_disks_with_iothreads_are_fine() {
        for config in [
            "scsihw: virtio-scsi-single\nscsi0: a:0,iothread=1\nvirtio3: a:1,iothread=on\n",
            "ide2: none,media=cdrom\nscsi1: local:100/vm-100-cloudinit.qcow2,media=cdrom\nefidisk0: a:2\n",
            "",
        ] {
            let found = of(config);
            assert!(found.len() == 1 && found[0].severity == Severity::Fine, "{config}: {found:?}");
        }
        World::flat(2).vm(2, None, |vm| {
            assert_eq!(storage(vm), [], "not Proxmox's");
            vm.config = Some(Err("it is not there".to_owned()));
            assert_eq!(storage(vm)[0].severity, Severity::Unknown);
        });
    }
}
