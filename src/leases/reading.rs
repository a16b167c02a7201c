//! How a lease is read that another version wrote. What is known counts, and what is not is kept.
//!
//! ```text
//!   qmpin.lease/1 and later  the CPUs, the process and the boot have to be there and understood; else it is unreadable
//!   unknown knobs, members   kept in [`Kept`], and written again by a process that goes on with the lease
//!   known members            that are missing, or have a value that is not understood: as if they were not set
//!   cut off somewhere        unreadable; what is before the cut is read by [`salvage`]
//! ```

use std::collections::BTreeSet;
use std::fmt;

use serde::Deserializer;
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::{Kept, Lease, SCHEMA};
use crate::cpuset::CpuSet;
use crate::ids::VmName;
use crate::policy::Knob;
use crate::state_file::version_of;
use crate::threads::ProcessKey;

/// What is known of a lease that cannot be read.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Salvaged {
    /// The boot it is valid in.
    pub boot_id: Option<String>,
    /// The QEMU process.
    pub qemu: Option<ProcessKey>,
    /// The CPUs that are the VM's alone.
    pub exclusive: Option<CpuSet>,
}

/// Reads a lease of this version or a later one.
///
/// # Errors
/// Why it cannot be read, in words.
pub(super) fn parse(text: &str, vm: &VmName) -> Result<Lease, String> {
    let mut members: Map<String, Value> =
        serde_json::from_str(text).map_err(|error| error.to_string())?;
    let schema = members.get("schema").and_then(Value::as_str).unwrap_or("missing");
    if version_of(schema, SCHEMA).is_none() {
        return Err(format!("its schema is {schema}"));
    }
    let found: VmName = required(&mut members, "vm")?;
    if found != *vm {
        return Err(format!("it is of VM {found}"));
    }
    let (knobs, unknown) = knobs(optional::<Vec<Value>>(&mut members, "knobs"));
    members.remove("schema");
    Ok(Lease {
        schema: SCHEMA.to_owned(),
        vm: found,
        boot_id: required(&mut members, "boot_id")?,
        qemu: required(&mut members, "qemu")?,
        supervisor: optional(&mut members, "supervisor"),
        since_unix_s: optional(&mut members, "since_unix_s"),
        exclusive: required(&mut members, "exclusive")?,
        emulator: optional(&mut members, "emulator"),
        iothreads: optional(&mut members, "iothreads"),
        vcpus: optional(&mut members, "vcpus"),
        floats: optional(&mut members, "floats"),
        knobs,
        partition: optional(&mut members, "partition"),
        slices: optional(&mut members, "slices"),
        vfio_irqs: optional(&mut members, "vfio_irqs"),
        sched: optional(&mut members, "sched"),
        sched_vcpus: optional(&mut members, "sched_vcpus"),
        max_vcpus: optional(&mut members, "max_vcpus"),
        displaced: optional(&mut members, "displaced"),
        writer: optional(&mut members, "writer"),
        kept: Kept { knobs: unknown, members },
    })
}

/// The text of a lease, with what was kept of an earlier one.
///
/// # Errors
/// Those of `serde_json`.
pub(super) fn text(lease: &Lease) -> Result<Vec<u8>, serde_json::Error> {
    let mut value = serde_json::to_value(lease)?;
    if let Some(members) = value.as_object_mut() {
        if let Some(Value::Array(knobs)) = members.get_mut("knobs") {
            knobs.extend(lease.kept.knobs.iter().cloned().map(Value::String));
        }
        for (name, value) in &lease.kept.members {
            members.entry(name.as_str()).or_insert_with(|| value.clone());
        }
    }
    serde_json::to_vec(&value)
}

/// Takes from the text of a lease, whole or cut off, what is known.
#[must_use]
pub(super) fn salvage(text: &str) -> Salvaged {
    let mut members = Map::new();
    // That the text is cut off is an error when it is reached; what came before it is there.
    let mut whole = serde_json::Deserializer::from_str(text);
    if whole.deserialize_map(Members(&mut members)).is_err() {
        tracing::trace!("a lease is cut off");
    }
    Salvaged {
        boot_id: required(&mut members, "boot_id").ok(),
        qemu: required(&mut members, "qemu").ok(),
        exclusive: required(&mut members, "exclusive").ok(),
    }
}

fn required<T: DeserializeOwned>(
    members: &mut Map<String, Value>,
    name: &str,
) -> Result<T, String> {
    let value = members.remove(name).ok_or_else(|| format!("it has no `{name}`"))?;
    serde_json::from_value(value).map_err(|error| format!("`{name}`: {error}"))
}

fn optional<T: DeserializeOwned + Default>(members: &mut Map<String, Value>, name: &str) -> T {
    members.remove(name).and_then(|value| serde_json::from_value(value).ok()).unwrap_or_default()
}

/// The knobs that this version knows, and the names of the others.
fn knobs(names: Vec<Value>) -> (BTreeSet<Knob>, BTreeSet<String>) {
    let (mut known, mut unknown) = (BTreeSet::new(), BTreeSet::new());
    for name in names {
        match (serde_json::from_value(name.clone()), name) {
            (Ok(knob), _) => drop(known.insert(knob)),
            (Err(_), Value::String(name)) => drop(unknown.insert(name)),
            (Err(_), other) => drop(unknown.insert(other.to_string())),
        }
    }
    (known, unknown)
}

/// Collects the members of an object up to the first that cannot be read.
struct Members<'a>(&'a mut Map<String, Value>);

impl<'de> Visitor<'de> for Members<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some((name, value)) = map.next_entry::<String, Value>()? {
            self.0.insert(name, value);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OF_0_1_0: &str = include_str!("../../tests/fixtures/state-0.1.0/strict/100.lease");

    fn vm() -> VmName {
        "100".parse().expect("a name")
    }

    /// The lease of 0.1.0, changed as a later version might.
    fn changed(change: impl FnOnce(&mut Map<String, Value>)) -> Result<Lease, String> {
        let mut members: Map<String, Value> = serde_json::from_str(OF_0_1_0).expect("a lease");
        change(&mut members);
        parse(&Value::Object(members).to_string(), &vm())
    }

    #[test]
    fn the_lease_of_0_1_0_is_read() {
        let lease = parse(OF_0_1_0, &vm()).expect("a lease");
        assert_eq!((lease.exclusive.to_string(), lease.knobs.len()), ("12-15".to_owned(), 8));
        assert_eq!(lease.partition.as_deref(), Some("qemu.slice/100.scope"));
        assert_eq!(lease.sched.to_string(), "fifo:1");
        assert_eq!(lease.kept, Kept::default());
    }

    #[test]
    fn what_a_later_version_wrote_is_kept() {
        let later = changed(|members| {
            members.insert("schema".to_owned(), "qmpin.lease/2".into());
            members.insert("cache_ways".to_owned(), serde_json::json!({"clos": 3}));
            members.insert("sched".to_owned(), "deadline:5".into());
            let knobs = members.get_mut("knobs").and_then(Value::as_array_mut);
            knobs.expect("knobs").extend(["cache_ways".into(), serde_json::json!({"x": 1})]);
        });
        let lease = later.expect("a lease");
        assert_eq!((lease.exclusive.to_string(), lease.knobs.len()), ("12-15".to_owned(), 8));
        assert_eq!(lease.sched.to_string(), "other");
        let again: Value = serde_json::from_slice(&text(&lease).expect("text")).expect("a value");
        assert_eq!(again["cache_ways"]["clos"], 3);
        assert_eq!(again["knobs"].as_array().map(Vec::len), Some(10));
        assert_eq!(again["schema"], SCHEMA);
    }

    #[test]
    fn a_lease_without_what_matters_is_unreadable() {
        for name in ["schema", "vm", "boot_id", "qemu", "exclusive"] {
            let missing = changed(|members| drop(members.remove(name)));
            assert!(missing.is_err_and(|why| why.contains(name)), "{name}");
            let odd = changed(|members| drop(members.insert(name.to_owned(), true.into())));
            assert!(odd.is_err_and(|why| why.contains(name)), "{name}");
        }
        for schema in ["qmpin.lease/0", "qmpin.lease/", "qmpin.lease/x", "qmpin.journal/1"] {
            let other = changed(|members| drop(members.insert("schema".to_owned(), schema.into())));
            assert!(other.is_err_and(|why| why.contains(schema)), "{schema}");
        }
    }

    #[test]
    fn content_before_the_cut_is_read() {
        let whole = salvage(OF_0_1_0);
        assert_eq!(whole.exclusive.map(|cpus| cpus.to_string()), Some("12-15".to_owned()));
        assert!(whole.qemu.is_some() && whole.boot_id.is_some());
        for end in 0..OF_0_1_0.trim_end().len() {
            let cut = &OF_0_1_0[..end];
            assert!(parse(cut, &vm()).is_err(), "{cut}");
            let salvaged = salvage(cut);
            for (found, known) in [
                (salvaged.exclusive.is_some(), salvaged.exclusive == whole.exclusive),
                (salvaged.qemu.is_some(), salvaged.qemu == whole.qemu),
                (salvaged.boot_id.is_some(), salvaged.boot_id == whole.boot_id),
            ] {
                assert!(!found || known, "{cut}");
            }
        }
        let cut = salvage(&OF_0_1_0[..OF_0_1_0.find("\"emulator\"").expect("a member")]);
        assert_eq!(cut, whole);
        for garbage in ["", "{", "[]", "null", "\u{0}\u{1}", "{\"exclusive\":\"12-1"] {
            assert_eq!(salvage(garbage), Salvaged::default(), "{garbage}");
        }
    }
}
