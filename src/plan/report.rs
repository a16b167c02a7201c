//! What the planner says about its plan: a finding per rule, and the reason for each choice.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::{CpuId, VcpuIndex};

/// How far a rule was kept.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Wholly.
    Met,
    /// Not wholly; the reason says how far.
    Degraded,
    /// Not at all.
    Impossible,
}

/// One rule, and how far this plan keeps it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Finding {
    /// The rule's short name.
    pub rule: Cow<'static, str>,
    /// How far it is kept.
    pub verdict: Verdict,
    /// A sentence with the numbers.
    pub reason: String,
}

impl Finding {
    /// A rule that is wholly kept.
    pub fn met(rule: &'static str, reason: impl Into<String>) -> Finding {
        Finding { rule: Cow::Borrowed(rule), verdict: Verdict::Met, reason: reason.into() }
    }

    /// A rule that is kept in part.
    pub fn degraded(rule: &'static str, reason: impl Into<String>) -> Finding {
        Finding { rule: Cow::Borrowed(rule), verdict: Verdict::Degraded, reason: reason.into() }
    }

    /// A rule that cannot be kept.
    pub fn impossible(rule: &'static str, reason: impl Into<String>) -> Finding {
        Finding { rule: Cow::Borrowed(rule), verdict: Verdict::Impossible, reason: reason.into() }
    }

    /// Whether the rule is not wholly kept.
    #[must_use]
    pub fn falls_short(&self) -> bool {
        self.verdict != Verdict::Met
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.reason)
    }
}

/// Why a vCPU is where it is. Typed, so that planning formats no text that is not read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// It has a core of its own.
    OwnCore,
    /// Its guest sibling is on the same core.
    SiblingOf(VcpuIndex),
    /// No core was left, so it has the second thread of a core of this VM.
    SecondThreadBeside(VcpuIndex),
    /// Beside another vCPU, because cores are to be filled (`smt = "siblings"`).
    Fills(VcpuIndex),
    /// More vCPUs than CPUs, and sharing is allowed: it shares its CPU.
    Wrapped,
    /// The policy has it float over a set.
    Floats,
    /// The policy names this CPU for it.
    ByHand,
    /// It was there before, and still may be.
    Held,
    /// It no longer fitted: it is with the housekeeping CPUs.
    Overflow,
}

impl Why {
    /// The name of the rule that chose.
    #[must_use]
    pub fn rule(self) -> &'static str {
        match self {
            Why::OwnCore => "own-core",
            Why::SiblingOf(_) => "guest-siblings",
            Why::SecondThreadBeside(_) => "cores-then-siblings",
            Why::Fills(_) => "smt",
            Why::Wrapped => "share",
            Why::Floats => "float",
            Why::ByHand => "by-hand",
            Why::Held => "stay",
            Why::Overflow => "overflow",
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::OwnCore => f.write_str("a core of its own"),
            Why::SiblingOf(vcpu) => write!(f, "guest sibling of vCPU {vcpu}: the same host core"),
            Why::SecondThreadBeside(vcpu) => {
                write!(f, "every core of the set has a vCPU: the sibling beside vCPU {vcpu}")
            }
            Why::Fills(vcpu) => write!(f, "smt = \"siblings\": the same core as vCPU {vcpu}"),
            Why::Wrapped => f.write_str("more vCPUs than CPUs and share = true: the CPU is shared"),
            Why::Floats => f.write_str("it may run on any CPU of the set"),
            Why::ByHand => f.write_str("the policy names this CPU for it"),
            Why::Held => f.write_str("it was there before and still may be"),
            Why::Overflow => f.write_str("no CPU is left: overflow = \"shared\""),
        }
    }
}

/// One vCPU's place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Placed {
    /// Which vCPU.
    pub vcpu: VcpuIndex,
    /// On which CPU.
    pub cpu: CpuId,
    /// Why there.
    pub why: Why,
}
