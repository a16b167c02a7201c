//! Mistakes in a policy file, in words: which key, which value, what it may be, and what was probably meant.

/// The sentence for people, of what the TOML parser `said` about a `value`, where it is one. `before` is the line
/// that it is on, as far as the value.
pub(super) fn in_words(said: &str, before: &str, value: &str) -> String {
    let said = said.replace('\n', " ");
    let names = quoted(&said);
    if said.starts_with("unknown field")
        && let Some((field, known)) = names.split_first()
    {
        let meant = near(field, known).map(|meant| format!("; did you mean `{meant}`?"));
        let keys = || format!("; the keys here are {}", known.join(", "));
        return format!("`{field}` is no key of a policy{}", meant.unwrap_or_else(keys));
    }
    // A table for one of them is where the number or name was left out.
    if names.is_empty() && said.contains("RawThread") {
        return format!(
            "{}{value}: such a table is for one thread, as in [vcpu.0] or [iothread.io0]",
            before.trim_start()
        );
    }
    let key = before.trim_end().strip_suffix('=').unwrap_or(before).trim();
    let is_of_value = ["invalid type", "invalid value", "unknown variant"];
    let may_be = may_be(key.rsplit('.').next().unwrap_or(key));
    match may_be {
        Some(may_be) if is_of_value.iter().any(|begin| said.starts_with(begin)) => {
            let known = names.get(1..).unwrap_or_default();
            let bare = value.trim_matches(['"', '\'']);
            let meant = near(bare, known).map(|meant| format!("; did you mean \"{meant}\"?"));
            format!("{key} = {value}: must be {may_be}{}", meant.unwrap_or_default())
        }
        _ => said,
    }
}

/// What a key takes.
fn may_be(key: &str) -> Option<&'static str> {
    Some(match key {
        "vcpus" | "iothreads" | "emulator" | "reserved" => {
            "\"auto\", or CPUs in quotes such as \"6-11,18-23\""
        }
        "shared" => "CPUs in quotes, such as \"2,14\"",
        "cores" => "\"any\", \"performance\" or \"efficiency\"",
        "cache" => "\"any\", \"large\" or \"ordinary\"",
        "smt" => "\"prefer\", \"siblings\" or \"isolate\"",
        "overflow" => "\"shared\" or \"refuse\"",
        "channel" => "\"auto\", \"lease\" or \"persistent\"",
        "isolation" => "\"none\", \"pinned\", \"exclusive\" or \"strict\"",
        "vfio_irqs" => "\"iothreads\", \"vcpus\" or \"leave\"",
        "sched_vcpus" => "indices of vCPUs in quotes, such as \"1-7\"",
        "vcpu" => {
            "a table for each vCPU: [vcpu.0] with cpu = \"6\"; for all of them, did you mean `vcpus`?"
        }
        "iothread" => "a table for each iothread: [iothread.io0] with cpu = \"2\"",
        "sched" => "\"other\", or \"fifo:1\" to \"fifo:99\"",
        "check_interval_s" => "a whole number of seconds from 1 to 3600",
        "host" => "a table of its own: [host]",
        "share" | "displace" | "partition" | "irqs" | "kthreads" | "workqueues" | "power"
        | "noise" | "core_scheduling" | "reonline" => "true or false, without quotes",
        _ => return None,
    })
}

/// The names between backquotes.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// The known word that is nearest to one that was written, where it is near.
fn near<'a>(written: &str, known: &[&'a str]) -> Option<&'a str> {
    let plain = |word: &str| word.to_lowercase().replace('-', "_");
    let written = plain(written);
    let distance = |known: &&str| distance(&written, &plain(known));
    let (nearest, steps) =
        known.iter().map(|known| (*known, distance(known))).min_by_key(|(_, steps)| *steps)?;
    // A word of which half would have to be written anew is another one.
    (steps <= 2 && steps * 2 < nearest.len()).then_some(nearest)
}

/// How many letters have to be added, removed or changed to make one of the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(WORD_CHARS_MAX).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (at, letter) in a.chars().take(WORD_CHARS_MAX).enumerate() {
        let mut diagonal = row[0];
        row[0] = at + 1;
        for (column, other) in b.iter().enumerate() {
            let changed = diagonal + usize::from(letter != *other);
            diagonal = row[column + 1];
            row[column + 1] = changed.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[b.len()]
}

/// Longer words are no keys.
const WORD_CHARS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_probably_meant_is_near() {
        let keys = ["vcpus", "iothreads", "core_scheduling", "irqs"];
        for (written, meant) in [
            ("vcpu", Some("vcpus")),
            ("VCPUs", Some("vcpus")),
            ("core-scheduling", Some("core_scheduling")),
            ("iothread", Some("iothreads")),
            ("iorthreds", Some("iothreads")),
            ("nothing", None),
            ("", None),
            ("x", None),
            ("irqsirqs", None),
        ] {
            assert_eq!(near(written, &keys), meant, "{written}");
        }
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(near(&"x".repeat(100_000), &keys), None);
    }
}
