//! Numbers, lists and CPU sets in sentences.

use crate::cpuset::CpuSet;

/// `CPUs 1-3`, `CPU 1`, or `no CPU`: a set in a sentence.
#[must_use]
pub fn cpus_in_words(cpus: &CpuSet) -> String {
    match cpus.len() {
        0 => "no CPU".to_owned(),
        1 => format!("CPU {cpus}"),
        _ => format!("CPUs {cpus}"),
    }
}

/// `a, b and 7 more`: a list in a sentence, cut after `most` of them.
#[must_use]
pub fn listed<T: AsRef<str>>(all: &[T], most: usize, between: &str) -> String {
    let shown: Vec<&str> = all.iter().take(most).map(AsRef::as_ref).collect();
    match all.len().saturating_sub(most) {
        0 => shown.join(between),
        left => format!("{} and {left} more", shown.join(between)),
    }
}

/// `1 core`, `3 cores`: a number in a sentence.
#[must_use]
pub fn counted(number: usize, one: &str) -> String {
    if number == 1 { format!("1 {one}") } else { format!("{number} {one}s") }
}
