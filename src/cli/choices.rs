//! Settings of the policy that are one of a few words, as flags.

use clap::ValueEnum;
use clap::builder::PossibleValue;

use crate::policy::{ChannelChoice, Level, Overflow};

impl ValueEnum for Level {
    fn value_variants<'a>() -> &'a [Level] {
        &[Level::None, Level::Pinned, Level::Exclusive, Level::Strict]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(match self {
            Level::None => value("none", "The VM has its CPUs and is watched; no thread is moved"),
            Level::Pinned => value("pinned", "The VM's threads are pinned"),
            Level::Exclusive => {
                value("exclusive", "All else that can be moved is excluded from its CPUs")
            }
            Level::Strict => value("strict", "The kernel's own noise on its CPUs is reduced, too"),
        })
    }
}

impl ValueEnum for Overflow {
    fn value_variants<'a>() -> &'a [Overflow] {
        &[Overflow::Shared, Overflow::Refuse]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(match self {
            Overflow::Shared => {
                value("shared", "It runs on the housekeeping CPUs; reported as degraded")
            }
            Overflow::Refuse => value("refuse", "It is left where it is; reported"),
        })
    }
}

impl ValueEnum for ChannelChoice {
    fn value_variants<'a>() -> &'a [ChannelChoice] {
        &[ChannelChoice::Auto, ChannelChoice::Lease, ChannelChoice::Persistent]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(match self {
            ChannelChoice::Auto => {
                value("auto", "The VM's own socket, else a runtime monitor, else leases")
            }
            ChannelChoice::Lease => value("lease", "Short visits of the socket only"),
            ChannelChoice::Persistent => value(
                "persistent",
                "Hold the socket that `--qmp` names; no other program may need it",
            ),
        })
    }
}

fn value(name: &'static str, help: &'static str) -> PossibleValue {
    PossibleValue::new(name).help(help)
}
