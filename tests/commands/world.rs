//! A 5900X with its L3s as nodes, below a folder: nothing runs on it.

#![allow(clippy::expect_used)] // that is how a test says no

use std::fs;
use std::process::Output;

use serde_json::Value;

use crate::support::{clean, hosts};

pub(crate) struct World(tempfile::TempDir);

impl World {
    pub(crate) fn new() -> World {
        let dir = tempfile::tempdir().expect("a folder");
        hosts::ryzen_5900x_l3_as_numa().write(dir.path()).expect("a tree");
        let world = World(dir);
        // Proxmox's cluster file system is mounted.
        world.write("etc/pve/.version", "1");
        world
    }

    pub(crate) fn write(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        fs::write(path, text).expect("written");
    }

    /// Gives a VM a Proxmox configuration.
    pub(crate) fn vm(&self, vm: u32, config: &str) {
        self.write(&format!("etc/pve/qemu-server/{vm}.conf"), config);
    }

    pub(crate) fn run(&self, words: &[&str]) -> Output {
        let mut command = clean::command(env!("CARGO_BIN_EXE_qmpin"));
        command.args(words).arg("--proxmox-dir").arg(self.0.path().join("none"));
        if words[0] == "plan" {
            command.arg("--sysroot").arg(self.0.path());
        }
        command.output().expect("it runs")
    }

    /// What it prints, as JSON.
    pub(crate) fn document(&self, code: i32, words: &[&str]) -> Value {
        let done = self.run(&[words, &["--json"]].concat());
        assert_eq!(done.status.code(), Some(code), "{done:?}");
        serde_json::from_slice(&done.stdout).expect("a document")
    }
}
