//! What the kernel can do for a VM's threads beside placing them, as it says itself.

use crate::discover::rt_throttling;
use crate::journal::Memory;
use crate::knobs::core_scheduling::plan::{Cookies, NoCookies};
use crate::knobs::core_scheduling::read::cookies;
use crate::policy::{Knob, VmPolicy};
use crate::sched::Sched;
use crate::scheduling::Throttling;
use crate::sysroot::SysRoot;
use crate::threads::Thread;

/// What was read in one pass.
#[derive(Debug)]
pub struct Abilities {
    /// Whether it keeps time for others beside real-time threads.
    pub throttling: Throttling,
    /// The threads' cookies, or why it gives none. Empty where the VM has nothing to do with them.
    pub cookies: Result<Cookies, NoCookies>,
}

impl Default for Abilities {
    fn default() -> Abilities {
        Abilities { throttling: Throttling::On, cookies: Ok(Cookies::new()) }
    }
}

impl Abilities {
    /// Reads what matters by this policy, and what was changed by an earlier one.
    #[must_use]
    pub fn read(
        root: &SysRoot,
        sched: &dyn Sched,
        policy: &VmPolicy,
        memory: &Memory,
        threads: &[Thread],
    ) -> Abilities {
        let mut abilities = Abilities::default();
        if policy.sched.value.wanted().is_some() {
            abilities.throttling = rt_throttling(root);
        }
        let has_cookies = !memory.cookie().is_empty();
        if has_cookies || policy.wanted_knobs().contains(&Knob::CoreScheduling) {
            abilities.cookies = cookies(sched, threads);
        }
        abilities
    }
}
