//! How text from outside is shown: nothing in it can drive a terminal, hide, or change the order of what is read.
//!
//! A process, a cgroup and a QEMU object can have almost any name, and files below a `--sysroot` any bytes. Every
//! text passes one of these functions where it leaves qmpin, and nowhere before:
//!
//! ```text
//!   log lines, STATUS=, table cells, errors and their causes, SVG     line   (a new line is escaped, too)
//!   standard output and standard error as a whole                     block  (keeps the ends of lines)
//!   the same with qmpin's own colours                                 painted (keeps `ESC [ ... m`)
//!   JSON documents                                                    json   (the value is unchanged)
//! ```
//!
//! What is escaped: control characters (C0, DEL, C1), bidirectional controls and other format characters, blanks that
//! are not the ordinary one, separators of lines and paragraphs, combining marks, private and unassigned characters,
//! and noncharacters such as U+FFFE. XML 1.0 allows everything that is left. Each function is idempotent.

mod cut;

use std::borrow::Cow;

pub use cut::{COLUMNS_MAX, cut};

/// What of the escaped characters is left as it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Keep {
    Nothing,
    LineEnds,
    LineEndsAndColors,
}

/// Returns the text as one line without hidden characters: each is `\n`, `\t` or `\u{1b}`.
#[must_use]
pub fn line(text: &str) -> Cow<'_, str> {
    escaped(text, Keep::Nothing)
}

/// Returns the text of many lines without hidden characters.
#[must_use]
pub fn block(text: &str) -> Cow<'_, str> {
    escaped(text, Keep::LineEnds)
}

/// Returns the text of many lines without hidden characters, with the colours that it has. Only for texts whose
/// pieces from outside have passed [`line()`] before.
#[must_use]
pub fn painted(text: &str) -> Cow<'_, str> {
    escaped(text, Keep::LineEndsAndColors)
}

/// Returns the JSON text with `\uXXXX` for each hidden character. Beyond ASCII they can only be inside of strings,
/// and so can DEL, so the value is the same.
#[must_use]
pub fn json(text: &str) -> Cow<'_, str> {
    let is_raw = |char: char| char == '\u{7f}' || (!char.is_ascii() && is_hidden(char));
    if !text.contains(is_raw) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for char in text.chars() {
        if is_raw(char) {
            for unit in char.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            out.push(char);
        }
    }
    Cow::Owned(out)
}

fn escaped(text: &str, keep: Keep) -> Cow<'_, str> {
    let is_plain =
        |byte: u8| matches!(byte, b' '..=b'~') || (byte == b'\n' && keep != Keep::Nothing);
    if text.bytes().all(is_plain) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    let mut rest = text;
    while let Some(char) = rest.chars().next() {
        let color = if keep == Keep::LineEndsAndColors { color_len(rest) } else { 0 };
        let len = if color > 0 { color } else { char.len_utf8() };
        let (head, tail) = rest.split_at(len);
        rest = tail;
        if color > 0 || !is_hidden(char) || (char == '\n' && keep != Keep::Nothing) {
            out.push_str(head);
        } else {
            match char {
                '\n' | '\r' | '\t' => out.extend(char.escape_default()),
                _ => out.extend(char.escape_unicode()),
            }
        }
    }
    Cow::Owned(out)
}

/// The length of the colour that the text begins with (`ESC [`, digits and semicolons, `m`); 0: it begins with none.
fn color_len(text: &str) -> usize {
    let Some(codes) = text.strip_prefix("\u{1b}[") else { return 0 };
    let end = codes.find(|char: char| !char.is_ascii_digit() && char != ';');
    match end {
        Some(end) if codes[end..].starts_with('m') => "\u{1b}[".len() + end + 1,
        _ => 0,
    }
}

/// Whether a reader would not see the character, or would see another text because of it.
fn is_hidden(char: char) -> bool {
    match char {
        ' '..='~' => false,
        // Letters by their category, drawn as nothing.
        '\u{115f}' | '\u{1160}' | '\u{2800}' | '\u{3164}' | '\u{ffa0}' => true,
        // The standard library knows which characters are printable, and says so only here: it escapes the others.
        _ => char.escape_debug().len() > 1,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Which XML 1.0 allows: section 2.2.
    fn is_xml(char: char) -> bool {
        matches!(char, '\t' | '\n' | '\r' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..)
    }

    #[test]
    fn hidden_characters_are_spelt_out_and_others_are_kept() {
        for (raw, shown) in [
            (
                "12-19, `it's` \"so\" C:\\x2d → … · ä 漢 │",
                "12-19, `it's` \"so\" C:\\x2d → … · ä 漢 │",
            ),
            ("\x1b[2J", "\\u{1b}[2J"),
            ("a\nb\tc\rd\0", "a\\nb\\tc\\rd\\u{0}"),
            ("\u{7f}\u{9b}31m", "\\u{7f}\\u{9b}31m"),
            ("user\u{202e}txt\u{2066}", "user\\u{202e}txt\\u{2066}"),
            ("\u{200b}\u{feff}\u{ad}\u{61c}", "\\u{200b}\\u{feff}\\u{ad}\\u{61c}"),
            ("\u{2028}\u{a0}\u{3164}", "\\u{2028}\\u{a0}\\u{3164}"),
            ("e\u{301}\u{fe0f}\u{e0041}", "e\\u{301}\\u{fe0f}\\u{e0041}"),
            ("\u{fffe}\u{ffff}\u{1fffe}\u{e000}", "\\u{fffe}\\u{ffff}\\u{1fffe}\\u{e000}"),
        ] {
            assert_eq!(line(raw), shown);
        }
    }

    #[test]
    fn ends_of_lines_and_colours_are_kept_where_they_belong() {
        let text = "a\x1b[1;31mb\x1b[0m\n\x1b[2Jc\x1b]0;title\x07\x1b[";
        assert_eq!(painted(text), "a\x1b[1;31mb\x1b[0m\n\\u{1b}[2Jc\\u{1b}]0;title\\u{7}\\u{1b}[");
        assert!(block(text).starts_with("a\\u{1b}[1;31mb\\u{1b}[0m\n"));
        assert!(!line(text).contains('\n'));
    }

    proptest! {
        #[test]
        fn nothing_hidden_is_left_and_a_second_time_changes_nothing(text in any::<String>()) {
            for shown in [line(&text), block(&text)] {
                prop_assert!(shown.chars().all(|char| char == '\n' || !char.is_control()));
                let is_left = |char: char| is_xml(char) && !('\u{202a}'..='\u{202e}').contains(&char);
                prop_assert!(shown.chars().all(is_left));
            }
            let shown = line(&text).into_owned();
            prop_assert_eq!(line(&shown), block(&shown));
            prop_assert_eq!(&line(&shown), &shown);
        }

        #[test]
        fn json_is_the_same_value(text in any::<String>(), hidden in "[\u{7f}-\u{9f}\u{202a}-\u{202e}\u{e0001}]{0,3}") {
            let value = serde_json::Value::String(text + &hidden);
            let raw = value.to_string();
            let shown = json(&raw);
            prop_assert!(shown.chars().all(|char| !is_hidden(char)));
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).expect("JSON"), value);
        }
    }
}
