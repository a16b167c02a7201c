//! A QEMU that reports more vCPUs than the VM was given gets no CPUs for them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::support::fake_qemu::FakeQemu;
use crate::support::run::{POLICY, Place, finish, masks, needs_two_cpus};
use serde_json::Value;

#[test]
fn vcpus_beyond_the_bound_are_placed_as_helpers_and_reported() {
    needs_two_cpus!("vcpus_beyond_the_bound_are_placed_as_helpers_and_reported");
    let fake = FakeQemu::start("more vCPUs than it was given");
    let place = Place::new();
    let run = |words: &[&str]| finish(&mut place.command(&[], fake.dir(), words));
    // Both are believed where nothing bounds them, and do not fit on one CPU.
    place.config("qmpin.toml", POLICY);
    run(&["plan", "100", "--json"]).says(1, &["2 vCPUs"]);
    place.config("100.toml", "max_vcpus = 1\n");
    let done = run(&["plan", "100", "--json"]);
    let plan: Value = serde_json::from_str(&done.says(0, &[]).out).unwrap();
    assert_eq!(plan["vcpus"].as_array().unwrap().len(), 1, "{plan}");
    assert_eq!(plan["exclusive"], "1");
    let findings = plan["report"].as_array().unwrap();
    let finding = findings.iter().find(|finding| finding["rule"] == "max-vcpus").unwrap();
    assert_eq!(finding["verdict"], "degraded");
    let reason = finding["reason"].as_str().unwrap();
    assert!(
        reason.contains("reports 2 vCPUs") && reason.contains("100.toml:1 allows 1"),
        "{reason}"
    );
    let before = masks(fake.pid());
    run(&["attach", "100", "--once"]).says(0, &["vCPUs on 1,"]);
    let on_vcpus = masks(fake.pid()).into_values().filter(|mask| mask == "1").count();
    assert_eq!(on_vcpus, 1);
    run(&["verify", "100"]).says(0, &[]);
    run(&["detach", "100"]).says(0, &[]);
    assert_eq!(masks(fake.pid()), before);
    place.config("100.toml", "max_vcpus = 0\n");
    run(&["plan", "100"]).says(2, &["100.toml:1", "must be 1 to 4096"]);
}
