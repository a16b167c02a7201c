//! `qmpin config show` and `qmpin config check`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::args::{ConfigCheckArgs, ConfigCommand, ConfigShowArgs, Global, Place};
use super::{Answer, output};
use crate::error::{Failure, chain};
use crate::policy::FileKind;
use crate::render::{ConfigCheckDocument, ConfigDocument, config_text};

pub(super) fn run(global: &Global, command: &ConfigCommand) -> Result<Answer, Failure> {
    match command {
        ConfigCommand::Show(args) => show(global, args),
        ConfigCommand::Check(args) => check(global, args),
    }
}

fn show(global: &Global, args: &ConfigShowArgs) -> Result<Answer, Failure> {
    let ConfigShowArgs { vm, policy, root, .. } = args;
    let policy = policy.policy(global, &root.root()?, vm)?;
    let document = ConfigDocument::of(&vm.vm, &policy);
    output::answer(args.json, &document, |_| config_text(&policy))?;
    Ok(Answer::Done)
}

/// Every bad file is named, not the first alone.
fn check(global: &Global, args: &ConfigCheckArgs) -> Result<Answer, Failure> {
    let dirs = global.policy_dirs(&args.root.root()?, Place::Proxmox);
    let (vms, nobodys) = match &args.vm {
        Some(vm) => (vec![vm.clone()], Vec::new()),
        None => dirs.all()?,
    };
    // The host's file is a part of every VM's policy.
    let whose = std::iter::once(None).chain(vms.iter().map(Some));
    let files: BTreeMap<PathBuf, FileKind> = whose.flat_map(|vm| dirs.files(vm)).collect();
    let checked = files.into_iter().filter_map(|(path, kind)| match dirs.check(&path, kind) {
        Ok(()) => path.exists().then_some((path, None)),
        Err(error) => Some((path, Some(chain(&error)))),
    });
    let nobodys = nobodys.into_iter().map(|path| {
        let reason = format!("{}: no VM can have that name: the file says nothing", path.display());
        (path, Some(reason))
    });
    let document = ConfigCheckDocument::of(nobodys.chain(checked));
    output::answer(args.json, &document, ConfigCheckDocument::to_text)?;
    Ok(if document.is_good() { Answer::Done } else { Answer::No })
}
