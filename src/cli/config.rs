//! `qmpin config show` and `qmpin config check`.

use super::args::{
    ConfigCheckArgs, ConfigCommand, ConfigShowArgs, Global, Place, PolicyOfVmArgs, policy_failure,
};
use super::{Answer, output};
use crate::discover::{PolicyDirs, PolicyFileError};
use crate::error::{Failure, chain};
use crate::ids::VmName;
use crate::render::{ConfigDocument, config_text};

pub(super) fn run(global: &Global, command: &ConfigCommand) -> Result<Answer, Failure> {
    match command {
        ConfigCommand::Show(args) => show(global, args),
        ConfigCommand::Check(args) => check(global, args),
    }
}

fn show(global: &Global, args: &ConfigShowArgs) -> Result<Answer, Failure> {
    let PolicyOfVmArgs { vm, policy, root } = &args.of;
    let policy = policy.policy(global, &root.root()?, vm)?;
    if args.json {
        output::json(&ConfigDocument::of(&vm.vm, &policy))?;
    } else {
        output::text(&config_text(&policy))?;
    }
    Ok(Answer::Done)
}

/// Every bad file is named, not the first alone.
fn check(global: &Global, args: &ConfigCheckArgs) -> Result<Answer, Failure> {
    let dirs = global.policy_dirs(&args.root.root()?, Place::Proxmox);
    let mut lines = Vec::new();
    let mut vms: Vec<VmName> = args.vm.iter().cloned().collect();
    if vms.is_empty() {
        let (all, nobodys) = dirs.all().map_err(policy_failure)?;
        vms = all;
        lines.extend(nobodys.into_iter().map(|path| {
            format!("{}: no VM can have that name: the file says nothing", path.display())
        }));
    }
    lines.extend(bad(&dirs, &vms));
    if lines.is_empty() {
        output::text(&format!("{}\n", good(&dirs, &vms)))?;
        return Ok(Answer::Done);
    }
    for line in lines {
        output::text(&format!("{line}\n"))?;
    }
    Ok(Answer::No)
}

/// A sentence for each file that cannot be used. The host's file is a part of every VM's policy.
fn bad(dirs: &PolicyDirs, vms: &[VmName]) -> Vec<String> {
    let whose = std::iter::once(None).chain(vms.iter().map(Some));
    let mut lines: Vec<String> =
        whose.flat_map(|vm| dirs.check(vm)).map(|error: PolicyFileError| chain(&error)).collect();
    lines.sort();
    lines.dedup();
    lines
}

fn good(dirs: &PolicyDirs, vms: &[VmName]) -> String {
    let whose = std::iter::once(None).chain(vms.iter().map(Some));
    let mut paths: Vec<String> = whose
        .flat_map(|vm| dirs.files(vm))
        .filter(|(path, _)| path.exists())
        .map(|(path, _)| path.display().to_string())
        .collect();
    paths.sort();
    paths.dedup();
    if paths.is_empty() {
        return "no policy file: every VM has the defaults".to_owned();
    }
    format!("good: {}", paths.join(", "))
}
