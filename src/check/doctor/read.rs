//! Reads settings of the kernel for the checks. What cannot be read is an error in words, never a value.

use crate::error::chain;
use crate::sysroot::{ReadError, SysRoot};

/// Returns the text of a small file without the blanks around it.
///
/// # Errors
/// Why it cannot be read, with the path.
pub(super) fn text(root: &SysRoot, path: &str) -> Result<String, String> {
    let text = root.read_lossy(path).map_err(|error| chain(&error))?;
    Ok(text.trim().to_owned())
}

/// Returns the number that a file holds.
///
/// # Errors
/// As [`text`]; also where it holds something else.
pub(super) fn number(root: &SysRoot, path: &str) -> Result<u64, String> {
    let text = text(root, path)?;
    text.parse().map_err(|_| format!("/{path} has \"{text}\", which is no number"))
}

/// Returns the word in brackets of a file that lists all choices, such as `always [madvise] never`.
///
/// # Errors
/// As [`text`]; also where none is in brackets.
pub(super) fn chosen(root: &SysRoot, path: &str) -> Result<String, String> {
    let text = text(root, path)?;
    let word = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    match word {
        Some((word, _)) => Ok(word.to_owned()),
        None => Err(format!("/{path} has \"{text}\", and no word of it is chosen")),
    }
}

/// Returns a value of a file with lines such as `SwapTotal:  8388604 kB` or `ksm_merging_pages 12`.
///
/// # Errors
/// As [`text`]; also where there is no such line, or no number in it.
pub(super) fn line(root: &SysRoot, path: &str, key: &str) -> Result<u64, String> {
    let text = text(root, path)?;
    let value = text.lines().find_map(|line| {
        let rest = line.strip_prefix(key)?;
        let rest = rest.strip_prefix(':').or_else(|| rest.strip_prefix(' '))?;
        rest.split_ascii_whitespace().next()?.parse().ok()
    });
    value.ok_or_else(|| format!("/{path} has no number for {key}"))
}

/// Returns the names in a folder, sorted.
///
/// # Errors
/// [`ReadError`] with the path and the kernel's answer.
pub(super) fn names(root: &SysRoot, path: &str) -> Result<Vec<String>, ReadError> {
    root.folder(path)?.names()
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Tree;
    use super::*;

    #[test]
    fn what_is_not_understood_is_an_error_with_its_path() {
        let tree = Tree::new(&[
            ("a", "12\n"),
            ("b", "twelve\n"),
            ("c", "always [madvise] never\n"),
            ("d", "Swap: 1 kB\nSwapTotal:   8 kB\nksm_pages 3\nbad: x\n"),
        ]);
        let root = &tree.root();
        assert_eq!(number(root, "a"), Ok(12));
        assert!(number(root, "b").is_err_and(|why| why.contains("/b has \"twelve\"")));
        assert!(number(root, "none").is_err_and(|why| why.contains("none")));
        assert_eq!(chosen(root, "c").as_deref(), Ok("madvise"));
        assert!(chosen(root, "a").is_err());
        assert_eq!((line(root, "d", "SwapTotal"), line(root, "d", "ksm_pages")), (Ok(8), Ok(3)));
        assert!(line(root, "d", "bad").is_err() && line(root, "d", "Total").is_err());
    }
}
