//! The preference that the kernel changes with the governor, on a made-up host: what `amd-pstate-epp` makes of it is
//! written by the test.

#![allow(clippy::expect_used, clippy::unwrap_used)] // a test may end

use crate::support::made_up::World;
use qmpin::knobs::host::report::HostReport;
use qmpin::knobs::host::step::HostStep;
use qmpin::policy::Knob;

const BEFORE: &str = "balance_performance";

fn file(cpu: u32, name: &str) -> String {
    format!("sys/devices/system/cpu/cpu{cpu}/cpufreq/{name}")
}

fn preference(world: &World, cpu: u32) -> String {
    world.read(&file(cpu, "energy_performance_preference"))
}

fn prefer(world: &World, cpu: u32, what: &str) {
    world.write(&file(cpu, "energy_performance_preference"), &format!("{what}\n"));
}

/// A VM on CPUs 4-5, and what the kernel makes of their preferences with the governor.
fn attached() -> World {
    let world = World::new();
    world.lease("100", "4-5", [Knob::Power]);
    world.reconcile();
    for cpu in [4, 5] {
        assert_eq!(world.read(&file(cpu, "scaling_governor")), "performance");
        prefer(&world, cpu, "performance");
    }
    assert!(world.reconcile().applied.is_empty(), "it is the kernel's for now");
    world
}

fn detach(world: &World) -> HostReport {
    world.forget("100");
    world.reconcile()
}

#[test]
fn what_the_kernel_preferred_is_put_back_after_the_governor() {
    let world = attached();
    let before = World::new().read(&file(4, "scaling_governor"));
    // By itself, as intel_pstate does.
    prefer(&world, 5, BEFORE);
    let steps: Vec<String> = detach(&world)
        .applied
        .iter()
        .filter(|one| matches!(one.step, HostStep::PutBack { .. }))
        .map(|one| one.step.place().to_string())
        .filter(|place| place.contains("cpufreq"))
        .collect();
    let [governor, other, preferred] = [
        file(4, "scaling_governor"),
        file(5, "scaling_governor"),
        file(4, "energy_performance_preference"),
    ]
    .map(|path| format!("/{path}"));
    assert_eq!(steps, [governor, other, preferred]);
    for cpu in [4, 5] {
        assert_eq!(world.read(&file(cpu, "scaling_governor")), before);
        assert_eq!(preference(&world, cpu), BEFORE);
    }
    assert_eq!(world.journal(), None);
}

#[test]
fn external_preference_is_kept_and_named() {
    let world = attached();
    prefer(&world, 4, "power");
    let named: Vec<String> = detach(&world)
        .applied
        .iter()
        .filter(|one| matches!(one.step, HostStep::LeaveAlone { .. }))
        .map(|one| one.step.place().to_string())
        .collect();
    assert_eq!(named, [format!("/{}", file(4, "energy_performance_preference"))]);
    assert_eq!([4, 5].map(|cpu| preference(&world, cpu)), ["power", BEFORE]);
    assert_eq!(world.journal(), None);
}

#[test]
fn a_vm_that_goes_gives_its_own_preferences_back() {
    let world = attached();
    world.lease("101", "6", [Knob::Power]);
    world.reconcile();
    prefer(&world, 6, "performance");
    detach(&world);
    assert_eq!([4, 5, 6].map(|cpu| preference(&world, cpu)), [BEFORE, BEFORE, "performance"]);
    world.forget("101");
    world.reconcile();
    assert_eq!(preference(&world, 6), BEFORE);
    assert_eq!(world.journal(), None);
}

/// A CPU that had the highest preference already keeps it.
#[test]
fn what_was_preferred_before_stays() {
    let world = World::new();
    prefer(&world, 4, "performance");
    let before = world.picture();
    world.lease("100", "4", [Knob::Power]);
    world.reconcile();
    detach(&world);
    assert_eq!(world.changed_since(&before), [""; 0]);
    assert_eq!(world.journal(), None);
}

/// Arm has no state that polls: the first is `WFI`.
#[test]
fn the_first_state_of_arm_is_the_shallowest() {
    let world = World::new();
    for (state, name, latency) in [(0, "WFI", "1"), (1, "cpu-sleep-0", "450")] {
        for (file, text) in [("name", name), ("latency", latency)] {
            let path = format!("sys/devices/system/cpu/cpu4/cpuidle/state{state}/{file}");
            world.write(&path, &format!("{text}\n"));
        }
    }
    world.lease("100", "4-5", [Knob::Power]);
    world.reconcile();
    let allowed = |cpu: u32| {
        world.read(&format!("sys/devices/system/cpu/cpu{cpu}/power/pm_qos_resume_latency_us"))
    };
    assert_eq!([4, 5].map(allowed), ["1", "2"]);
    detach(&world);
    assert_eq!([4, 5].map(allowed), ["0", "0"]);
}
