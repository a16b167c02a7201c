//! What the host's journal remembers: what each place was like before qmpin, and what qmpin has made of it. No I/O.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::cpuset::CpuSet;
use crate::journal::UnknownLines;
use crate::knobs::host::places::{HostView, Place, Value};

/// A line after the first.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostRecord {
    /// What a place held before anything could have changed it.
    Original {
        /// Where.
        place: Place,
        /// What.
        value: Value,
    },
    /// CPUs of one VM about to be taken away from the host: the kernel will change masks by itself.
    Off(CpuSet),
    /// A write about to happen, or what the kernel does because of one: an interrupt is created with it, a preference
    /// changes with its governor.
    Intent {
        /// Where.
        place: Place,
        /// What was seen.
        from: Value,
        /// What is to be there.
        to: Value,
    },
    /// The kernel would not take it, or made something else of it. Nothing to undo: it is for who asks later.
    Refused {
        /// Where.
        place: Place,
        /// What was to be there.
        value: Value,
    },
    /// The place is as before again, or gone, or another program's.
    Settled(Place),
}

/// What the host's journal remembers.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HostMemory {
    places: BTreeMap<Place, Known>,
    off: Vec<CpuSet>,
    pub(super) unknown: Option<UnknownLines>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Known {
    original: Value,
    ours: Vec<Value>,
    /// What of `ours` the kernel would not take the last time.
    refused: Vec<Value>,
}

impl HostMemory {
    /// Sorts records.
    #[must_use]
    pub fn of<'a>(records: impl IntoIterator<Item = &'a HostRecord>) -> HostMemory {
        let mut memory = HostMemory::default();
        for record in records {
            memory.add(record);
        }
        memory
    }

    pub(super) fn add(&mut self, record: &HostRecord) {
        match record {
            HostRecord::Original { place, value } => {
                self.places.entry(place.clone()).or_insert_with(|| Known::of(value));
            }
            HostRecord::Off(cpus) => {
                if !self.off.contains(cpus) {
                    self.off.push(*cpus);
                }
            }
            HostRecord::Intent { place, from, to } => {
                let known = self.places.entry(place.clone()).or_insert_with(|| Known::of(from));
                if !known.ours.contains(to) {
                    known.ours.push(to.clone());
                }
                known.refused.retain(|value| value != to);
            }
            HostRecord::Refused { place, value } => {
                if let Some(known) = self.places.get_mut(place)
                    && !known.refused.contains(value)
                {
                    known.refused.push(value.clone());
                }
            }
            HostRecord::Settled(place) => {
                self.places.remove(place);
            }
        }
    }

    /// Whether it is known already.
    pub(super) fn covers(&self, record: &HostRecord) -> bool {
        match record {
            HostRecord::Original { place, .. } => self.places.contains_key(place),
            HostRecord::Off(cpus) => self.off.contains(cpus),
            HostRecord::Intent { place, to, .. } => self
                .places
                .get(place)
                .is_some_and(|known| known.ours.contains(to) && !known.refused.contains(to)),
            HostRecord::Refused { place, value } => {
                self.places.get(place).is_none_or(|known| known.refused.contains(value))
            }
            HostRecord::Settled(place) => !self.places.contains_key(place),
        }
    }

    /// Whether nothing is remembered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty() && self.off.is_empty() && self.unknown.is_none()
    }

    /// Lines of the file that this qmpin does not know how to undo.
    #[must_use]
    pub fn unknown(&self) -> Option<&UnknownLines> {
        self.unknown.as_ref()
    }

    /// How many records come to this.
    pub(super) fn records_len(&self) -> usize {
        let of_place = |known: &Known| 1 + known.ours.len() + known.refused.len();
        self.off.len() + self.places.values().map(of_place).sum::<usize>()
    }

    /// The records that come to this.
    pub(super) fn records(&self) -> Vec<HostRecord> {
        let mut records: Vec<HostRecord> = self.off.iter().copied().map(HostRecord::Off).collect();
        for (place, Known { original, ours, refused }) in &self.places {
            let (place, from) = (place.clone(), original.clone());
            records.push(HostRecord::Original { place: place.clone(), value: from.clone() });
            records.extend(ours.iter().map(|to| HostRecord::Intent {
                place: place.clone(),
                from: from.clone(),
                to: to.clone(),
            }));
            records.extend(
                refused.iter().map(|value| HostRecord::Refused {
                    place: place.clone(),
                    value: value.clone(),
                }),
            );
        }
        records
    }

    /// Whether units of systemd's are limited, or about to be.
    #[must_use]
    pub fn has_units(&self) -> bool {
        self.places.keys().any(|place| place.limited_cgroup().is_some())
    }

    /// Whether interrupts, where new ones go, or who balances them, are remembered.
    #[must_use]
    pub fn has_irqs(&self) -> bool {
        self.has_irqbalance()
            || self.has_new_irqs()
            || self.places.keys().any(|place| place.irq().is_some())
    }

    /// Whether it was changed where new interrupts go, or is about to be.
    #[must_use]
    pub fn has_new_irqs(&self) -> bool {
        self.places.contains_key(&Place::of_new_irqs())
    }

    /// Whether an irqbalance was configured, or is about to be.
    #[must_use]
    pub fn has_irqbalance(&self) -> bool {
        self.places.keys().any(|place| matches!(place, Place::Irqbalance(_)))
    }

    /// Whether CPUs were kept from kernel threads at any time.
    #[must_use]
    pub fn has_excluded(&self) -> bool {
        !self.off.is_empty()
    }

    /// What a place held before qmpin.
    #[must_use]
    pub fn original(&self, place: &Place) -> Option<&Value> {
        self.places.get(place).map(|known| &known.original)
    }

    /// What a place held before qmpin, where that is remembered; else what it holds now.
    #[must_use]
    pub fn before<'a>(&'a self, view: &'a HostView, place: &Place) -> Option<&'a Value> {
        self.original(place).or(view.values.get(place))
    }

    /// All places that are remembered, with what they held.
    pub fn originals(&self) -> impl Iterator<Item = (&Place, &Value)> {
        self.places.iter().map(|(place, known)| (place, &known.original))
    }

    /// Whether a place was to hold something else at any time.
    #[must_use]
    pub fn was_changed(&self, place: &Place) -> bool {
        self.places.get(place).is_some_and(|known| !known.ours.is_empty())
    }

    /// Whether a place was to hold this value once.
    #[must_use]
    pub fn was_tried(&self, place: &Place, value: &Value) -> bool {
        self.places.get(place).is_some_and(|known| known.ours.contains(value))
    }

    /// Whether a place was to hold this value, and the kernel would not take it.
    #[must_use]
    pub fn was_refused(&self, place: &Place, value: &Value) -> bool {
        self.places.get(place).is_some_and(|known| known.refused.contains(value))
    }

    /// Whether what is there now is qmpin's doing: written by it, or by the kernel as it took CPUs away
    /// or got them back. A kernel thread is then on all others, or on all.
    #[must_use]
    pub fn is_ours(&self, place: &Place, found: &Value, online: &CpuSet) -> bool {
        let Some(known) = self.places.get(place) else { return false };
        let same = |other: &Value| other.same(found, online);
        let has_exclusion_mask = |from: &CpuSet| self.has_exclusion_mask(found, from, online);
        known.ours.iter().any(same)
            || matches!(place, Place::Thread(_))
                && (same(&Value::Cpus(*online))
                    || has_exclusion_mask(online)
                    || known.original.cpus().is_some_and(|original| has_exclusion_mask(&original)))
    }

    /// Whether a kernel thread with this mask was put where it is as CPUs were taken away: it is on all of
    /// `from` but those of one or several VMs, which come and go one by one. One that is new has no mask of its
    /// own, and would be on all that are online; one that another program has set keeps what is left of that
    /// (`kernel/sched/core.c: __set_cpus_allowed_ptr`, `user_cpus_ptr`, since Linux 6.2).
    #[must_use]
    pub fn has_exclusion_mask(&self, found: &Value, from: &CpuSet, online: &CpuSet) -> bool {
        let Some(found) = found.cpus().map(|found| found & *online) else { return false };
        let missing = (*from & *online) - found;
        let off = self.off.iter().map(|off| *off & *from & *online);
        let off = off.filter(|off| off.is_subset(&missing));
        found.is_subset(from)
            && !missing.is_empty()
            && off.fold(CpuSet::EMPTY, |all, off| all | off) == missing
    }
}

impl Known {
    fn of(original: &Value) -> Known {
        Known { original: original.clone(), ours: Vec::new(), refused: Vec::new() }
    }
}
