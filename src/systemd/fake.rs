//! A systemd for tests: it knows one unit with a cgroup, and lists of names.

use std::cell::RefCell;

use super::{SystemdError, UnitState, Units};
use crate::cpuset::CpuSet;
use crate::sysroot::SysRoot;

/// Where the drop-in of `100.scope` is.
const DROP_IN: &str = "run/systemd/system/100.scope.d/50-qmpin.conf";

/// systemd, as far as one unit goes.
#[derive(Default)]
pub(crate) struct FakeUnits {
    pub(crate) state: RefCell<Option<UnitState>>,
    /// Where its drop-in is looked for at a reload.
    pub(crate) root: Option<SysRoot>,
    /// Active state and name of units that are listed.
    pub(crate) listed: Vec<(&'static str, &'static str)>,
    /// What was asked for, but for questions.
    pub(crate) log: RefCell<Vec<String>>,
}

impl FakeUnits {
    fn note(&self, what: String) {
        self.log.borrow_mut().push(what);
    }
}

impl Units for FakeUnits {
    fn state(&self, unit: &str) -> Result<UnitState, SystemdError> {
        let state = self.state.borrow().clone();
        state.ok_or_else(|| SystemdError::NoSuchUnit { unit: unit.to_owned() })
    }

    fn set_allowed_cpus(&self, _unit: &str, cpus: &CpuSet) -> Result<(), SystemdError> {
        self.note(format!("AllowedCPUs={cpus}"));
        if let Some(state) = self.state.borrow_mut().as_mut() {
            state.allowed_cpus = *cpus;
        }
        Ok(())
    }

    fn realize(&self, slice: &str) -> Result<(), SystemdError> {
        self.note(format!("realize {slice}"));
        Ok(())
    }

    fn listed(&self, state: &str, pattern: &str) -> Result<Vec<String>, SystemdError> {
        let (begin, end) = pattern.split_once('*').expect("a pattern");
        let matches = |name: &str| name.starts_with(begin) && name.ends_with(end);
        let found = self.listed.iter().filter(|(active, name)| *active == state && matches(name));
        Ok(found.map(|(_, name)| (*name).to_owned()).collect())
    }

    fn start(&self, unit: &str) -> Result<(), SystemdError> {
        self.note(format!("start {unit}"));
        Ok(())
    }

    fn reload(&self) -> Result<(), SystemdError> {
        self.note("reload".to_owned());
        let there = self.root.as_ref().map(|root| root.read(DROP_IN).is_ok());
        if let Some(state) = self.state.borrow_mut().as_mut() {
            state.delegated = match there {
                Some(true) => vec!["cpuset".to_owned()],
                _ => vec![],
            };
        }
        Ok(())
    }
}
