//! Numbers, lists and CPU sets in sentences.

use std::borrow::Cow;

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

/// Returns the text as one word of a shell's command line: as it is where it is plain, else in single quotes.
#[must_use]
pub fn shell_word(text: &str) -> Cow<'_, str> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_./:=,@%+-".contains(&byte);
    if !text.is_empty() && text.bytes().all(is_plain) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(format!("'{}'", text.replace('\'', r"'\''")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_for_a_shell_is_one_word() {
        for (text, word) in [
            (
                "local-lvm:vm-100-disk-0,size=32G,iothread=1",
                "local-lvm:vm-100-disk-0,size=32G,iothread=1",
            ),
            ("cpus=0-3;8,memory=1024", "'cpus=0-3;8,memory=1024'"),
            ("it's $(x)", r"'it'\''s $(x)'"),
            ("", "''"),
            ("ä", "'ä'"),
        ] {
            assert_eq!(shell_word(text), word);
        }
    }
}
