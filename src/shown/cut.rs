//! Sentences that fit a line: where a sentence is too long, its lists are cut in the middle, with a count.
//!
//! ```text
//!   CPUs 0,2,4,6,8,10,12,14,16,18,20,22 are busy  ─▶  CPUs 0,2,4,(8 more),22 are busy
//! ```
//!
//! Lists are known by how they are written, so the author of a sentence writes the whole list: numbers and ranges
//! with commas, names with commas and blanks, pins such as `0→6` with blanks. The first and the last item stay.

use std::borrow::Cow;
use std::ops::Range;

/// How wide a line of a message is at most, in columns.
pub const COLUMNS_MAX: usize = 120;

/// A name in a list is not longer than this, in bytes; what is longer is a part of the sentence.
const ITEM_BYTES_MAX: usize = 32;
/// Fewer items are no list to be cut.
const ITEMS_MIN: usize = 4;

/// Returns the sentence with its lists cut where it is wider than `columns`. One without lists stays as it is.
#[must_use]
pub fn cut(sentence: &str, columns: usize) -> Cow<'_, str> {
    let mut line = Cow::Borrowed(sentence);
    loop {
        let over = line.chars().count().saturating_sub(columns);
        if over == 0 {
            return line;
        }
        let lists = lists(&line);
        let width =
            |items: &Vec<Range<usize>>| items.last().map_or(0, |last| last.end) - items[0].start;
        let Some(items) = lists.into_iter().max_by_key(width) else { return line };
        let shorter = without(&line, &items, over);
        if shorter.len() >= line.len() {
            return line;
        }
        line = Cow::Owned(shorter);
    }
}

/// The line with as few of the last of these items as may be replaced by their number.
fn without(line: &str, items: &[Range<usize>], over: usize) -> String {
    let end = items.last().map_or(0, |last| last.end);
    let cut_from = |first: usize| {
        let count = items.len() - first;
        (items[first].start, format!("({count} more)"))
    };
    let saves = |first: &usize| {
        let (start, count) = cut_from(*first);
        line[start..end].chars().count() >= over + count.chars().count()
    };
    let first = (0..items.len()).rev().find(saves).unwrap_or(0);
    let (start, count) = cut_from(first);
    format!("{}{count}{}", &line[..start], &line[end..])
}

/// The lists of a line; of each those items that may go, which are neither its first nor its last.
fn lists(line: &str) -> Vec<Vec<Range<usize>>> {
    let mut lists = Vec::new();
    for (separator, is_item) in
        [(",", is_number as fn(&str) -> bool), (", ", is_name), (" ", is_pin)]
    {
        let mut run: Vec<Range<usize>> = Vec::new();
        let mut at = 0;
        for part in line.split(separator) {
            let range = at..at + part.len();
            at = range.end + separator.len();
            if is_item(part) {
                run.push(range);
            } else {
                lists.push(std::mem::take(&mut run));
            }
        }
        lists.push(run);
    }
    lists.retain(|items| items.len() >= ITEMS_MIN);
    for items in &mut lists {
        // One that stays beside what stands before the first comma, which may have the sentence's beginning in it.
        items.remove(0);
        items.pop();
    }
    lists
}

/// `8`, `0-3`; in a cpulist's first and last item are words of the sentence, so these are no numbers.
fn is_number(part: &str) -> bool {
    part.starts_with(|char: char| char.is_ascii_digit())
        && part.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-')
}

/// `vm100`, `512 (kvm-pit/300)`, `node 3`: two words at most, or it is a part of the sentence. A number may follow:
/// `44 (nvme0q3): 6`.
fn is_name(part: &str) -> bool {
    let name = match part.rsplit_once(": ") {
        Some((name, count)) if is_number(count) => name,
        _ => part,
    };
    (1..=ITEM_BYTES_MAX).contains(&name.len())
        && name.split(' ').count() <= 2
        && !name.contains([':', ';'])
        && !part.ends_with(" more)")
}

fn is_pin(part: &str) -> bool {
    part.contains('→') && part.starts_with(|char: char| char.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_list_is_cut_with_a_count_and_the_sentence_stays() {
        let cpus: Vec<String> = (0..128).step_by(2).map(|cpu| cpu.to_string()).collect();
        let names: Vec<String> = (100..160).map(|vm| format!("vm{vm}")).collect();
        let pins: Vec<String> = (0..40).map(|vcpu| format!("{vcpu}→{}", vcpu + 40)).collect();
        let count = |queue: u32| format!("{} (virtio0-req.{queue}): {}", queue + 40, 300 - queue);
        let counts: Vec<String> = (0..50).map(count).collect();
        for (sentence, begin, end) in [
            (
                format!("VM 100: CPUs {} are busy", cpus.join(",")),
                "VM 100: CPUs 0,2,4,",
                "126 are busy",
            ),
            (
                format!("VMs {} have all CPUs", names.join(", ")),
                "VMs vm100, vm101, ",
                ", vm159 have all CPUs",
            ),
            (
                format!("the nearest (vCPU→CPU {})", pins.join(" ")),
                "the nearest (vCPU→CPU 0→40 ",
                " 39→79)",
            ),
            (
                format!("irqs: 56 stay, fired so far: {}, 89-90: 0", counts.join(", ")),
                "irqs: 56 stay, fired so far: 40 (virtio0-req.0): 300, ",
                " more), 89-90: 0",
            ),
            (
                format!("bound: {}, {}", cpus.join(","), names.join(", ")),
                "bound: 0,2,",
                " more), vm159",
            ),
        ] {
            let cut = cut(&sentence, COLUMNS_MAX);
            assert!(cut.chars().count() <= COLUMNS_MAX, "{cut}");
            assert!(cut.contains(" more)"), "{cut}");
            assert!(cut.starts_with(begin) && cut.ends_with(end), "{cut}");
        }
    }

    #[test]
    fn the_count_is_of_those_that_are_left_out() {
        let cpus: Vec<String> = (0..40).map(|cpu| (cpu * 2 + 100).to_string()).collect();
        let sentence = cpus.join(",");
        let cut = cut(&sentence, COLUMNS_MAX);
        let shown = cut.split(',').filter(|part| is_number(part)).count();
        let count = cut.split_once('(').and_then(|(_, rest)| rest.split_once(" more)"));
        assert_eq!(count.and_then(|(count, _)| count.parse().ok()), Some(40 - shown), "{cut}");
    }

    #[test]
    fn what_fits_or_has_no_list_stays() {
        let long = format!(
            "could not read {}: it is not there, and nothing else is; try again",
            "x".repeat(120)
        );
        let words = "VM 100: vCPUs on 12-19, iothreads on 0-11, emulator on 0-11; 13 threads moved, 2 were refused, \
                     which is because the kernel, as it is, says no";
        for sentence in ["", "CPUs 0,2,4,6,8,10", &long, words] {
            assert_eq!(cut(sentence, COLUMNS_MAX), sentence);
        }
    }
}
